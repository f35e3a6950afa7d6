"""torch and mmengine replace the norms inside a model by others; everything else holds."""

import copy

import pytest
import torch
from laws import (
    assert_deploy_equivalent,
    assert_one_conv_exact,
    assert_same,
    assert_same_step,
    image,
    randomise,
    running_statistics,
    step,
)
from mmengine.model import revert_sync_batchnorm
from torch import nn

from mmrep.models.backbones import DBBMobileNetV1, DBBResNetV1d, RepVGG
from mmrep.reparam import branch_by_branch

ARCH = dict(num_blocks=(1, 2), width_factor=(0.125, 0.125))
TWO_STAGES = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
MODELS = {
    'RepVGG': lambda **options: RepVGG(ARCH, out_indices=(0, 1), **options),
    'RepVGG with pyramid pooling': lambda **options: RepVGG(
        ARCH, out_indices=(1,), add_ppf=True, **options
    ),
    'DBBResNetV1d': lambda **options: DBBResNetV1d(
        depth=18, base_channels=4, stem_channels=8, **TWO_STAGES, **options
    ),
    'DBBMobileNetV1': lambda **options: DBBMobileNetV1(width_factor=0.125, **options),
}
X = image(2, 3, 32, 32)

every_model = pytest.mark.parametrize('name', MODELS)
every_way = pytest.mark.parametrize('way', ['to SyncBN', 'to SyncBN and back'])


def converted(model: nn.Module, way: str) -> nn.Module:
    """A copy with other norms."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    kinds = {type(m) for m in model.modules() if hasattr(m, 'running_mean')}
    assert kinds == {nn.SyncBatchNorm}
    if way == 'to SyncBN and back':
        model = revert_sync_batchnorm(model)
        # mmengine's own type, which is no nn.BatchNorm2d.
        kinds = {type(m) for m in model.modules() if hasattr(m, 'running_mean')}
        assert not kinds & {nn.SyncBatchNorm, nn.BatchNorm2d}
    return model


@every_model
@every_way
class TestConversion:
    def test_same_function(self, name, way):
        model = randomise(MODELS[name]().double())
        other = converted(model, way)
        assert other.state_dict().keys() == model.state_dict().keys()
        # In training, which moves the running statistics, then in eval mode.
        assert_same_step(step(model, X), step(other, X))
        with torch.no_grad(), branch_by_branch(model):
            reference = model.eval()(X)
        assert_same(reference, other.eval()(X))

    def test_deploy_form(self, name, way):
        assert_deploy_equivalent(converted(MODELS[name]().double(), way), X)

    def test_one_conv_in_the_train_form(self, name, way):
        assert_one_conv_exact(converted(MODELS[name]().double(), way), X)

    def test_checkpointing_moves_the_statistics_once(self, name, way):
        models = [
            converted(randomise(MODELS[name](with_cp=with_cp).double()), way)
            for with_cp in (False, True)
        ]
        plain, saving = (step(model, X) for model in models)
        assert_same_step(plain, saving)

    def test_norm_eval(self, name, way):
        model = converted(randomise(MODELS[name](norm_eval=True).double()), way)
        before = running_statistics(model)
        step(model.train(), X)
        assert_same(before, running_statistics(model), tolerance=0)
        model.norm_eval = False
        step(model.train(), X)
        after = running_statistics(model)
        assert not any(torch.equal(before[key], after[key]) for key in before)
