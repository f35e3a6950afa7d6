import pytest
import torch
from laws import randomise
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from tiny_runner import TinyModel, tiny_runner

from mmrep.checkpoints import use_safe_reading
from mmrep.engine import SwitchToDeployHook

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
