import math
from dataclasses import asdict

import pytest
import torch
from laws import always_one_conv, count_convs, image

from mmrep.models.backbones import RepVGG
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import (
    branch_by_branch,
    compare_outputs,
    compare_tensors,
    flatten_outputs,
    switch_to_deploy,
)


def test_same_tensors():
    x = image(2, 3, 4)
    difference = compare_tensors(x, x.clone())
    assert asdict(difference) == dict(rel_l2=0.0, max_abs=0.0, argmax_agreement=1.0)


def test_numbers():
    """Of ``(3, 4)`` and ``(3, 9)`` the errors are 5 of 5 and 5."""
    reference = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    output = torch.tensor([[3.0, 9.0], [0.0, 0.0]])
    difference = compare_tensors(reference, output)
    assert difference.rel_l2 == 1
    assert difference.max_abs == 5
    assert difference.argmax_agreement == 1


def test_a_difference_is_a_value():
    x = torch.ones(1, 2)
    assert len({compare_tensors(x, x), compare_tensors(x, x)}) == 1


def test_argmax_is_over_channels():
    reference = torch.eye(4).reshape(1, 4, 2, 2)
    output = reference.clone()
    output[0, :, 0, 0] = output[0, :, 0, 0].flip(0)
    assert compare_tensors(reference, output).argmax_agreement == 0.75
    assert compare_tensors(torch.tensor([1.0, 2]), torch.tensor([1.0, 3])).rel_l2 > 0


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize('where', ['reference', 'output', 'both'])
def test_not_a_number_is_never_agreement(bad, where):
    reference, output = image(2, 3), image(2, 3)
    if where != 'output':
        reference[0, 1] = bad
    if where != 'reference':
        output[0, 1] = bad
    difference = compare_tensors(reference, output)
    assert difference.rel_l2 == difference.max_abs == math.inf


def test_zeros_prove_nothing():
    """A float reference of zeros has no relative error, even where it is met exactly."""
    zeros = torch.zeros(2, 3)
    for output in (zeros, zeros + 1e-6):
        difference = compare_tensors(zeros, output)
        assert difference.rel_l2 == math.inf
        assert difference.max_abs == output.max()


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64], ids=str)
def test_classes_and_masks_are_numbers(dtype):
    """Zeros among them are an answer: the first class, an empty mask."""
    reference = torch.tensor([[0, 1], [0, 1]]).to(dtype)
    output = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert compare_tensors(reference, reference).rel_l2 == 0
    difference = compare_tensors(reference, output)
    assert asdict(difference) == dict(rel_l2=1.0, max_abs=1.0, argmax_agreement=0.5)
    zeros = torch.zeros_like(reference)
    assert compare_tensors(zeros, zeros).rel_l2 == 0
    assert compare_tensors(zeros, zeros.float()).rel_l2 == 0
    assert compare_tensors(zeros.float(), zeros).rel_l2 == math.inf
    assert compare_tensors(zeros, output).rel_l2 == math.inf


def test_complex_numbers_are_refused():
    """Rather than compared by their real parts."""
    x = torch.ones(1, 2, dtype=torch.complex64)
    for pair in ((x, x + 1j), (x.real, x), (x, x.real)):
        with pytest.raises(ValueError, match='complex'):
            compare_tensors(*pair)


@pytest.mark.parametrize('shape', [(0,), (0, 4), (2, 0, 3)], ids=str)
def test_an_empty_tensor_has_no_difference(shape):
    empty = torch.zeros(shape)
    difference = compare_tensors(empty, empty)
    assert asdict(difference) == dict(rel_l2=0.0, max_abs=0.0, argmax_agreement=1.0)
    differences = compare_outputs([empty, torch.ones(1)], [empty, torch.ones(1) + 1])
    assert [d.rel_l2 for d in differences.values()] == [0, 1]
    with pytest.raises(ValueError, match='outputs cannot be compared'):
        compare_outputs([empty, empty], [empty, empty])


def test_a_number():
    """A tensor without dimensions is one position."""
    difference = compare_tensors(torch.tensor(4.0), torch.tensor(5.0))
    assert asdict(difference) == dict(rel_l2=0.25, max_abs=1.0, argmax_agreement=1.0)


def test_half_precision_is_compared_in_float64():
    x = torch.full((1, 4), 6e4, dtype=torch.float16)
    difference = compare_tensors(x, x - 32)
    assert math.isclose(difference.rel_l2, 32 / float(x[0, 0]))
    assert difference.max_abs == 32


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 2\) cannot be compared'):
        compare_tensors(torch.zeros(2, 3), torch.zeros(3, 2))


def test_nested_outputs():
    tensors = [image(1, 2, seed=seed) for seed in range(3)]
    outputs = (tensors[0], {'a': [tensors[1]], 'b': 'text'}, tensors[2])
    names = ['output[0]', 'output[1][a][0]', 'output[2]']
    assert list(flatten_outputs(outputs)) == names
    other = (tensors[0], {'a': [tensors[1] + 1], 'b': 'other'}, tensors[2])
    differences = compare_outputs(outputs, other)
    assert list(differences) == names
    assert [d.max_abs > 0.5 for d in differences.values()] == [False, True, False]


@pytest.mark.parametrize(
    'outputs', [((), ()), ({'a': torch.ones(1)}, {'b': torch.ones(1)}), ('text', 'text')]
)
def test_outputs_must_hold_the_same_tensors(outputs):
    with pytest.raises(ValueError, match='outputs cannot be compared'):
        compare_outputs(*outputs)


class TestBranchByBranch:
    def test_computes_every_branch(self):
        block, x = RepVGGBlock(4, 4).eval(), image(2, 4, 16, 16, dtype=torch.float32)
        with always_one_conv(block):
            with branch_by_branch(block) as same:
                assert same is block
                assert count_convs(block, x) == 2
            assert count_convs(block, x) == 1

    def test_reaches_all_blocks_of_a_model(self):
        arch = dict(num_blocks=(1, 1), width_factor=(1, 1))
        model = RepVGG(arch, base_channels=4, out_indices=(1,)).eval()
        x = image(2, 3, 64, 64, dtype=torch.float32)
        with always_one_conv(model):
            with branch_by_branch(model):
                assert count_convs(model, x) == 6
            assert count_convs(model, x) < 6

    def test_restores_after_an_error(self):
        allowed, forbidden = RepVGGBlock(4, 4), DiverseBranchBlock(4, 4, one_conv=False)
        model = torch.nn.Sequential(allowed, forbidden)
        with pytest.raises(RuntimeError), branch_by_branch(model):
            assert not allowed.one_conv
            raise RuntimeError
        assert allowed.one_conv
        assert not forbidden.one_conv

    def test_is_nothing_to_a_deployed_model(self):
        block, x = RepVGGBlock(4, 4).eval(), image(1, 4, 8, 8, dtype=torch.float32)
        switch_to_deploy(block)
        with branch_by_branch(block):
            assert count_convs(block, x) == 1
