from types import SimpleNamespace

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from tiny_runner import TinyModel, tiny_runner
from torch import nn

from mmrep.checkpoints import use_safe_reading
from mmrep.engine import SwitchToDeployHook
from mmrep.models.blocks import RepVGGBlock
from mmrep.reparam import NotFoldableError

EMA = dict(type='EMAHook', momentum=0.5)
SWITCH = dict(type='mmrep.SwitchToDeployHook')


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run with averaged weights, which are far from the others."""
    use_safe_reading()
    runner = tiny_runner(tmp_path, custom_hooks=[EMA])
    runner.train()
    return tmp_path / 'epoch_1.pth'


def test_it_is_found_by_its_name():
    assert isinstance(HOOKS.build(SWITCH), SwitchToDeployHook)


@pytest.mark.parametrize('hooks', [[], [EMA]], ids=['plain', 'ema'])
def test_same_outputs(tmp_path, checkpoint, hooks):
    def test(more: list[dict]) -> tuple:
        runner = tiny_runner(
            tmp_path, load_from=str(checkpoint), custom_hooks=[*hooks, *more]
        )
        return runner.test()['logits'], runner.model

    expected, train = test([])
    actual, deployed = test([SWITCH])
    assert actual == pytest.approx(expected, rel=1e-5)
    assert not train.block.deploy
    assert deployed.block.deploy
    assert hasattr(deployed.block, 'branch_reparam')


def test_averaged_weights_are_other_weights(checkpoint):
    """Else the test above could not tell which of the two were tested."""
    read = torch.load(checkpoint, weights_only=False)
    key = 'block.branch_3x3.conv.weight'
    averaged, last = read['state_dict'][key], read['ema_state_dict'][f'module.{key}']
    assert (averaged - last).norm() > 1e-4 * last.norm()


def test_training_is_not_affected(tmp_path):
    runner = tiny_runner(tmp_path, custom_hooks=[SWITCH])
    runner.train()
    assert not runner.model.block.deploy


def test_wrapped_model():
    class OfOneProcess(MMDistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

    class OneRunner:
        model = OfOneProcess(randomise(TinyModel()))
        hooks = ()
        cfg = None

    SwitchToDeployHook().before_test(OneRunner)
    assert OneRunner.model.module.block.deploy


class Foreign(nn.Module):
    """A block of another package, whose switch may be wrong by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x)

    def switch_to_deploy(self) -> None:
        self.conv.weight.data *= self.factor


class TestVerification:
    @pytest.mark.parametrize('factor', [1.0, 1.01])
    def test_of_another_package(self, factor):
        model = TinyModel()
        model.block = Foreign(factor)
        randomise(model)
        runner = SimpleNamespace(model=model, hooks=(), cfg=None)
        if factor == 1:
            SwitchToDeployHook((3, 8, 8)).before_test(runner)
            assert model.training
        else:
            with pytest.raises(NotFoldableError, match=r'^block is 0\.01 .*branches'):
                SwitchToDeployHook((3, 8, 8)).before_test(runner)

    def test_of_ours(self, monkeypatch):
        switch = RepVGGBlock.switch_to_deploy

        def spoil(block: RepVGGBlock) -> None:
            switch(block)
            block.branch_reparam.weight.data[0] *= 1.01

        monkeypatch.setattr(RepVGGBlock, 'switch_to_deploy', spoil)
        runner = SimpleNamespace(model=randomise(TinyModel()), hooks=(), cfg=None)
        with pytest.raises(NotFoldableError, match=r'^block is 0\.01 .*branches'):
            SwitchToDeployHook().before_test(runner)

    def test_not_finite(self):
        model = TinyModel()
        nn.init.constant_(model.block.branch_3x3.conv.weight, float('nan'))
        runner = SimpleNamespace(model=model, hooks=(), cfg=None)
        with pytest.raises(NotFoldableError, match='block: its output is not finite'):
            SwitchToDeployHook().before_test(runner)


class TestKernelsThatDependOnTheSize:
    @staticmethod
    def fuse(model: TinyModel, shape: tuple | None = None) -> None:
        SwitchToDeployHook(shape).before_test(
            SimpleNamespace(model=model, hooks=(), cfg=Config())
        )

    @staticmethod
    def model() -> TinyModel:
        model = TinyModel()
        conv_cfg = dict(type='Conv2dAdaptivePadding')
        model.block = RepVGGBlock(3, 4, stride=2, conv_cfg=conv_cfg)
        return randomise(model).eval()

    @pytest.mark.parametrize('size', [8, 9])
    def test_the_size_that_is_told(self, size):
        model, x = self.model(), image(1, 3, size, size, dtype=torch.float32)
        expected = model(x)
        fresh = self.model()
        fresh.load_state_dict(model.state_dict())
        self.fuse(fresh.train(), (3, size, size))
        assert fresh.training
        assert_same(expected, fresh.eval()(x))

    def test_the_size_that_was_seen(self):
        model, x = self.model(), image(1, 3, 9, 9, dtype=torch.float32)
        expected = model(x)
        self.fuse(model)
        assert_same(expected, model(x))
        # Nothing is left to do, whatever the size in the config.
        self.fuse(model)
        assert_same(expected, model(x))

    def test_a_size_that_the_model_does_not_take(self):
        with pytest.raises(NotFoldableError, match='give SwitchToDeployHook the shape'):
            self.fuse(self.model(), (4, 8, 8))
