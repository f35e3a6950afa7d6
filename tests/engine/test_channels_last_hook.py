import copy

import pytest
import torch
from laws import assert_same, image, randomise, step
from mmengine.registry import HOOKS
from tiny_runner import TinyModel, tiny_runner
from torch import Tensor, nn

from mmrep.checkpoints import (
    load_strictly,
    read_checkpoint,
    state_dict_of,
    use_safe_reading,
)
from mmrep.engine import ChannelsLastHook
from mmrep.models.backbones import DBBResNet
from mmrep.reparam import switch_to_deploy

HOOK = dict(type='mmrep.ChannelsLastHook')
X = image(2, 3, 6, 6, dtype=torch.float32)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def train(folder, hooks: list[dict]) -> nn.Module:
    """A model after a run; its layouts while it trained are its ``seen``."""
    use_safe_reading()
    model = randomise(TinyModel())
    model.seen = []
    conv = model.block.branch_3x3.conv
    conv.register_forward_hook(
        lambda conv, inputs, output: model.seen.append(
            (is_channels_last(conv.weight), is_channels_last(output))
        )
    )
    tiny_runner(folder, model=model, custom_hooks=hooks).train()
    return model


@pytest.fixture
def runs(tmp_path) -> dict[str, nn.Module]:
    """Without the hook and with it, each in a folder of its name."""
    return {
        name: train(tmp_path / name, hooks) for name, hooks in (('no', []), ('yes', [HOOK]))
    }


def test_it_is_found_by_its_name():
    assert isinstance(HOOKS.build(HOOK), ChannelsLastHook)


def test_training(runs):
    assert runs['no'].seen == [(False, False)] * 2
    assert runs['yes'].seen == [(True, True)] * 2
    assert_same(runs['no'].state_dict(), runs['yes'].state_dict(), tolerance=1e-5)


def test_its_checkpoint(runs, tmp_path):
    """Is loaded strictly, into every layout, and fused."""
    path = tmp_path / 'yes' / 'epoch_1.pth'
    model = TinyModel()
    load_strictly(model, state_dict_of(read_checkpoint(path), path), path)
    assert_same(runs['yes'].state_dict(), model.state_dict(), tolerance=0)
    assert model.block.branch_3x3.conv.weight.is_contiguous()
    expected = runs['yes'].eval()(X)
    assert_same(expected, model.eval()(X))
    for fused in (model, runs['yes']):
        switch_to_deploy(fused)
        assert fused.block.branch_reparam.weight.is_contiguous()
        assert_same(expected, fused(X))


def test_testing(runs, tmp_path):
    path = str(tmp_path / 'no' / 'epoch_1.pth')
    logits = [
        tiny_runner(tmp_path, load_from=path, custom_hooks=hooks).test()['logits']
        for hooks in ([], [HOOK])
    ]
    assert logits[1] == pytest.approx(logits[0], rel=1e-5)


@pytest.mark.parametrize('channels', [4, 16])
def test_a_network_with_strided_1x1_convs(channels):
    """torch's own gradient of theirs is wrong where they have few channels."""
    x = image(4, 3, 64, 64, dtype=torch.float32)
    small = dict(base_channels=channels, stem_channels=channels)

    class Run:
        model = randomise(DBBResNet(18, **small))

    exact = copy.deepcopy(Run.model).double()
    ChannelsLastHook().before_run(Run)
    convs = [m for m in Run.model.modules() if isinstance(m, nn.Conv2d)]
    wide = [conv for conv in convs if conv.kernel_size != (1, 1)]
    assert wide and all(is_channels_last(conv.weight) for conv in wide)
    # torch's gradient writes beyond its memory: only sometimes are the values wrong.
    strided = [c for c in convs if c.kernel_size == (1, 1) and c.stride == (2, 2)]
    seen = []
    for conv in strided:
        conv.register_forward_hook(
            lambda conv, inputs, output: seen.append(
                (conv.in_channels, inputs[0].is_contiguous())
            )
        )
    expected = step(exact, x.double())['gradients']
    assert_same(expected, step(Run.model, x)['gradients'], tolerance=1e-3)
    assert seen
    assert all(first is (channels < 16) for channels, first in seen)
