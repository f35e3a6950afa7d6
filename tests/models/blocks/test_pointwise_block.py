"""The block whose kernel is 1x1, which the table of contracts has no place for."""

import copy
import pickle

import pytest
import torch
from laws import (
    always_one_conv,
    assert_deploy_equivalent,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)

from mmrep.models.blocks import PointwiseBlock
from mmrep.reparam import NotFoldableError, branch_by_branch

OPTIONS = {
    'plain': {},
    'no act': dict(act_cfg=None),
    'se': dict(se_cfg=dict(ratio=2)),
    'groups': dict(groups=2),
    'stride': dict(stride=2),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
    'norm without scale': dict(norm_cfg=dict(type='BN', affine=False)),
}


def block(**options) -> PointwiseBlock:
    return randomise(PointwiseBlock(6, 4, **options).double())


@pytest.mark.parametrize('name', OPTIONS)
def test_deploy_form(name):
    x = image(2, 6, 5, 7)
    deployed = assert_deploy_equivalent(block(**OPTIONS[name]), x)
    built = PointwiseBlock(6, 4, **OPTIONS[name], deploy=True).double().eval()
    built.load_state_dict(deployed.state_dict())
    assert_same(deployed(x), built(x))


@pytest.mark.parametrize('name', OPTIONS)
def test_one_conv_in_the_train_form(name):
    first, x = block(**OPTIONS[name]).eval(), image(2, 6, 5, 7)
    with branch_by_branch(first):
        reference = step(first, x)
    with always_one_conv(first):
        assert_same_step(reference, step(first, x))


def test_with_cp_changes_nothing():
    x = image(2, 6, 5, 7)
    assert_same_step(step(block(), x), step(block(with_cp=True), x))


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies(clone):
    first, x = block().eval(), image(2, 6, 5, 7)
    assert_same(first(x), clone(first)(x))
    first.switch_to_deploy()
    assert_same(first(x), clone(first)(x))


def test_norm_that_uses_the_batch_is_refused():
    first = block(norm_cfg=dict(type='GN', num_groups=2))
    with pytest.raises(NotFoldableError, match=r'branch_1x1.*GroupNorm'):
        first.switch_to_deploy()


def test_scales_start_as_they_are_told():
    assert (PointwiseBlock(6, 4).branch_1x1.scale.weight == 1e-6).all()
    assert (PointwiseBlock(6, 4, layer_scale=0.5).branch_1x1.scale.weight == 0.5).all()


@pytest.mark.parametrize('options', [dict(kernel_size=3), dict(padding=1)], ids=str)
@pytest.mark.parametrize('deploy', [False, True])
def test_refuses_other_geometry(options, deploy):
    with pytest.raises(ValueError, match='takes only kernel_size=1 and padding=0, not'):
        PointwiseBlock(6, 4, **options, deploy=deploy)


def test_keeps_the_size():
    x = torch.zeros(1, 6, 5, 7, dtype=torch.float64)
    assert block(kernel_size=(1, 1), padding=0)(x).shape == (1, 4, 5, 7)
