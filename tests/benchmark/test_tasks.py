import pytest
import torch
from laws import image, randomise, running_statistics
from mmengine.config import Config
from torch import nn

from mmrep.benchmark import channels_last, evaluation, onnxruntime, step
from mmrep.deployment import build_model, deploy_config
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import has_running_statistics, switch_to_deploy

X = image(2, 3, 8, 9, dtype=torch.float32)


@pytest.fixture
def model() -> nn.Module:
    return randomise(nn.Sequential(RepVGGBlock(3, 4), DiverseBranchBlock(4, 4)))


class Watch:
    """Remembers how a model was called."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs, self.outputs, self.norms = [], [], []
        model.register_forward_hook(self.see)

    def see(self, model, inputs, output) -> None:
        self.inputs.append(inputs[0])
        self.outputs.append(output)
        norms = filter(has_running_statistics, model.modules())
        self.norms.append({norm.training for norm in norms})


class TestStep:
    def test_modes(self, model):
        watch = Watch(model)
        before = running_statistics(model)
        step(model, X)()
        assert model.training
        assert watch.norms == [{True}]
        after = running_statistics(model)
        assert not any(torch.equal(before[key], after[key]) for key in before)

    def test_norm_eval(self, model):
        watch = Watch(model)
        before = running_statistics(model)
        step(model, X, norm_eval=True)()
        assert model.training
        assert watch.norms == [{False}]
        after = running_statistics(model)
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_train_after_norm_eval(self, model):
        step(model, X, norm_eval=True)()
        watch = Watch(model)
        step(model, X)()
        assert watch.norms == [{True}]

    @pytest.mark.parametrize('norm_eval', [False, True])
    def test_computes_all_gradients_and_leaves_none(self, model, norm_eval):
        seen = set()
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: seen.add(name))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run = step(model, X, norm_eval=norm_eval)
        for _ in range(2):
            run()
            assert seen == before.keys()
            assert all(p.grad is None for p in model.parameters())
            seen.clear()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_several_outputs(self):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

            def forward(self, x):
                return self.a(x), [self.b(x)]

        model, seen = Two(), set()
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: seen.add(name))
        step(model, X)()
        assert len(seen) == 4


class TestEvaluation:
    def test_mode(self, model):
        watch = Watch(model.train())
        before = running_statistics(model)
        evaluation(model, X)()
        assert not model.training
        assert watch.norms == [{False}]
        assert watch.outputs[0].is_inference()
        after = running_statistics(model)
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_channels_last(self, model):
        watch = Watch(model)
        channels_last(model, X)()
        for tensor in (watch.inputs[0], watch.outputs[0]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('task', [step, evaluation])
def test_amp(model, task, amp):
    kinds = []
    model[0].branch_3x3.conv.register_forward_hook(
        lambda conv, inputs, output: kinds.append(output.dtype)
    )
    model[0].one_conv = False
    task(model, X, amp=amp)()
    assert kinds == [torch.bfloat16 if amp else torch.float32]


def test_onnxruntime():
    """The session has the model's weights: its outputs are the model's."""
    pytest.importorskip('onnxruntime')
    arch = dict(num_blocks=[1, 1], width_factor=[0.125, 0.125])
    config = Config(
        dict(
            default_scope='mmengine',
            model=dict(type='mmrep.RepVGG', arch=arch, out_indices=(1,)),
        )
    )
    model = randomise(build_model(config)).eval()
    switch_to_deploy(model)
    x = image(2, 3, 32, 24, dtype=torch.float32)
    (output,) = onnxruntime(model, x, deploy_config(config))()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(output), model(x)[0], rtol=1e-3, atol=1e-5
        )
