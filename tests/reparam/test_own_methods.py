"""Blocks of other packages, by the methods that these have for it."""

import copy

import pytest
import timm
import torch
from laws import assert_same, image, randomise
from torch import Tensor, nn

from mmrep.reparam import (
    NotFoldableError,
    block_references,
    compare_blocks,
    fuse_conv_norm,
    reparam_blocks,
    seen_inputs,
    switch_method,
    switch_to_deploy,
)

#: Networks of timm, and the size of their images.
NETWORKS = {
    'fastvit_t8': 64,
    'ghostnetv3_050': 64,
    'levit_128s': 224,
    'mobileone_s0': 64,
    'nextvit_small': 64,
    'repghostnet_050': 64,
    'repvit_m0_9': 64,
}


class ConvNorm(nn.Sequential):
    """A conv and its norm, replaced by what ``fuse`` returns, as in timm."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))

    def fuse(self) -> nn.Module:
        return fuse_conv_norm(*self)


class TwoConvs(nn.Module):
    """Two of them, whose own ``fuse`` needs theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(), ConvNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + self.conv2(x)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        conv, other = self.conv1.fuse(), self.conv2.fuse()
        conv.weight += other.weight
        conv.bias += other.bias
        return conv


class RepConv(TwoConvs):
    """In the style of Ultralytics: another ``forward`` is for the deploy form."""

    fuse = None

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def fuse_convs(self) -> None:
        if not hasattr(self, 'conv'):
            self.conv = TwoConvs.fuse(self)
            del self.conv1, self.conv2


class TakesArguments(nn.Module):
    """Methods of these names that are about something else."""

    def fuse(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def reparameterize(self, mean: Tensor, *, scale: Tensor) -> Tensor:
        return mean + scale


class WithALayer(nn.Module):
    """A layer of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(4, 4, 1)
        self.reparameterize = True


def network(*layers: nn.Module) -> nn.Sequential:
    return randomise(nn.Sequential(*layers)).double().eval()


def test_inner_ones_first():
    """A network may fuse what its blocks have become."""

    class Block(ConvNorm):
        fuse = None

        def switch_to_deploy(self) -> None:
            self[0], self[1] = fuse_conv_norm(*self), nn.Identity()

    class Network(nn.Sequential):
        def fuse(self) -> nn.Module:
            (block,) = self
            assert isinstance(block[1], nn.Identity)
            return block[0]

    model, x = network(Network(Block())), image(1, 4, 6, 6)
    expected = model(x)
    assert sorted(switch_to_deploy(model).switched) == ['0', '0.0']
    assert isinstance(model[0], nn.Conv2d)
    assert_same(expected, model(x))


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=pytest.mark.long)
        if n in ('ghostnetv3_050', 'nextvit_small')
        else n
        for n in NETWORKS
    ],
)
def test_networks_of_timm(name):
    model = network(timm.create_model(name))
    x = image(1, 3, NETWORKS[name], NETWORKS[name])
    with torch.no_grad(), seen_inputs(model) as seen:
        expected = model(x)
    references = block_references(model, seen)
    before = copy.deepcopy(model)
    report = switch_to_deploy(model)
    assert report.switched and report.params_after < report.params_before
    with torch.no_grad():
        # timm makes some fused convs in float32.
        assert_same(expected, model(x), 1e-6)
    differences = compare_blocks(references, model)
    assert differences.keys() >= set(report.switched)
    assert all(difference.is_within(1e-5) for difference in differences.values())
    # A second time does nothing.
    again = switch_to_deploy(model)
    assert again.params_after == report.params_after
    methods = {switch_method(model.get_submodule(name)) for name in again.switched}
    assert methods <= {'switch_to_deploy'}
    # Of the blocks, none is the same as before.
    assert set(report.switched) <= reparam_blocks(before).keys()


@pytest.mark.parametrize('block', [ConvNorm, TwoConvs, RepConv])
def test_methods(block):
    model, x = network(nn.ReLU(), block(), block()), image(1, 4, 6, 6)
    assert list(reparam_blocks(model)) == ['1', '2']
    with torch.no_grad(), seen_inputs(model) as seen:
        expected = model(x)
    references = block_references(model, seen)
    assert switch_to_deploy(model).switched == ['1', '2']
    with torch.no_grad():
        assert_same(expected, model(x))
        worst = max(d.worst for d in compare_blocks(references, model).values())
        assert worst < 1e-12
        next(m for m in model[2].modules() if isinstance(m, nn.Conv2d)).weight.mul_(1.01)
    differences = compare_blocks(references, model)
    assert differences['1'].is_within(1e-4) and not differences['2'].is_within(1e-4)
    again = switch_to_deploy(model)
    assert again.switched == []
    assert sorted(again.deployed) == (['1', '2'] if block is RepConv else [])
    assert copy.deepcopy(model)(x).shape == expected.shape


@pytest.mark.parametrize('trainable', [True, False])
def test_what_it_makes_is_as_it_was(trainable):
    class Own(TwoConvs):
        fuse = None

        def reparameterize(self) -> None:
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Identity()

    model = network(Own(), ConvNorm(), nn.Conv2d(4, 4, 1)).half()
    model[2].float()
    model.requires_grad_(trainable)
    switch_to_deploy(model)
    assert not any(module.training for module in model.modules())
    made = [model[0].conv1, model[1]]
    assert {p.dtype for m in made for p in m.parameters()} == {torch.float16}
    assert model[2].weight.dtype == torch.float32
    assert {p.requires_grad for p in model.parameters()} == {trainable}


def test_is_replaced_under_all_its_names():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = ConvNorm()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))

    model, x = network(Shared()), image(1, 4, 6, 6)
    expected = model(x)
    assert switch_to_deploy(model).switched == ['0.one']
    assert type(model[0].one) is nn.Conv2d and model[0].one is model[0].other
    assert_same(expected, model(x))


@pytest.mark.parametrize('module', [TakesArguments, WithALayer])
def test_what_is_no_such_method(module):
    assert switch_method(module()) is None
    assert switch_to_deploy(network(module(), ConvNorm())).switched == ['1']


def test_the_first_of_several_methods():
    class Both(ConvNorm):
        """mmpretrain's have one that is only a part of the other."""

        def reparameterize(self) -> tuple:
            raise AssertionError

        def switch_to_deploy(self) -> None:
            self[0], self[1] = self.fuse(), nn.Identity()

    model = network(Both())
    assert switch_method(model[0]) == 'switch_to_deploy'
    assert switch_to_deploy(model).switched == ['0']


def test_inside_a_container_that_has_the_method():
    """It does what is inside; a ``switch_to_deploy`` there is a block by itself."""

    class Deploys(ConvNorm):
        fuse = None

        def switch_to_deploy(self) -> None:
            self[0], self[1] = fuse_conv_norm(*self), nn.Identity()

    class Network(nn.Sequential):
        def fuse(self) -> 'Network':
            self[0] = self[0].fuse()
            return self

    model, x = network(Network(ConvNorm(), Deploys())), image(1, 4, 6, 6)
    assert list(reparam_blocks(model)) == ['0', '0.1']
    with torch.no_grad(), seen_inputs(model) as seen:
        expected = model(x)
    references = block_references(model, seen)
    assert references.keys() == {'0', '0.0'}
    report = switch_to_deploy(model)
    assert sorted(report.switched) == ['0', '0.1']
    assert_same(expected, model(x))
    assert all(d.worst < 1e-12 for d in compare_blocks(references, model).values())


def test_a_model_that_is_one_block():
    with pytest.raises(NotFoldableError, match='ConvNorm: its own fuse returns another'):
        switch_to_deploy(network(ConvNorm())[0])


def test_one_that_raises():
    class Raises(nn.Module):
        def reparameterize(self) -> None:
            raise KeyError('gamma')

    says = "0: its own reparameterize raises KeyError: 'gamma'"
    with pytest.raises(NotFoldableError, match=says):
        switch_to_deploy(network(Raises()))


def test_a_switch_that_needs_arguments():
    """It is not passed over: nothing else has this name."""

    class Needs(nn.Module):
        def switch_to_deploy(self, how: str) -> None: ...

    assert switch_method(Needs()) == 'switch_to_deploy'
    says = '0: its own switch_to_deploy raises TypeError'
    with pytest.raises(NotFoldableError, match=says):
        switch_to_deploy(network(Needs()))
