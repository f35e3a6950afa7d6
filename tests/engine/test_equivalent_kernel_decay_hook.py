"""RepVGG's custom L2, as a term of the loss."""

import copy
from types import SimpleNamespace

import pytest
import torch
from laws import assert_differ, assert_same, image, randomise
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS
from mmengine.utils import digit_version
from tiny_runner import TinyModel, tiny_runner
from torch import Tensor, nn
from torch.optim import SGD

from mmrep.engine import equivalent_kernel_l2
from mmrep.errors import ConfigError
from mmrep.models.blocks import RepVGGBlock

HOOK = dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=0.1)
TERM = 'loss_equivalent_kernels'


def penalty(block: RepVGGBlock) -> Tensor:
    """Tap by tap; the scales of the norms are constants."""
    scale3, scale1 = (
        (b.norm.weight / (b.norm.running_var + b.norm.eps).sqrt()).detach()[:, None]
        for b in (block.branch_3x3, block.branch_1x1)
    )
    kernel3, kernel1 = block.branch_3x3.conv.weight, block.branch_1x1.conv.weight
    total = 0
    for row in range(3):
        for column in range(3):
            tap = kernel3[:, :, row, column]
            if row == column == 1:
                tap = scale3 * tap + scale1 * kernel1[:, :, 0, 0]
                tap = tap / (scale3**2 + scale1**2).sqrt()
            total = total + tap.square().sum()
    return total


def model() -> TinyModel:
    return randomise(TinyModel())


def batch(seed: int = 1) -> dict:
    x = image(2, 3, 6, 6, dtype=torch.float32, seed=seed)
    return dict(inputs=x, labels=torch.tensor([0, 1]))


def hooked(network: nn.Module) -> nn.Module:
    """The network with the hook, as at the beginning of a training."""
    HOOKS.build(HOOK).before_train(SimpleNamespace(model=network))
    return network


class ScaledOptimWrapper(AmpOptimWrapper):
    """mmengine's, which asks for a GPU, on the CPU."""

    def __init__(self, **options) -> None:
        OptimWrapper.__init__(self, **options)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=65536.0)
        self._scale_update_param = None
        self.cast_dtype = torch.bfloat16


needs_scaler = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch has neither a GradScaler nor a fused SGD for CPUs',
)


@pytest.mark.parametrize('steps', [1, 2], ids=['every batch', 'two batches a step'])
@pytest.mark.parametrize('amp', [False, pytest.param(True, marks=needs_scaler)])
def test_a_step_is_that_of_the_loss_with_the_term(tmp_path, steps, amp):
    """Also where gradients are accumulated, and unscaled by the optimizer itself."""
    network = model()
    wrapper = ScaledOptimWrapper if amp else OptimWrapper
    # torch 2.1 does not know the argument.
    optimizer = SGD(network.parameters(), lr=0.5, **(dict(fused=True) if amp else {}))
    optim_wrapper = wrapper(optimizer=optimizer, accumulative_counts=steps)
    options = dict(optim_wrapper=optim_wrapper, custom_hooks=[HOOK])
    runner = tiny_runner(tmp_path, model=network, **options)
    batches = list(runner.build_dataloader(runner._train_dataloader))
    assert len(batches) == 2
    runner.train()

    expected = model().train()
    without = copy.deepcopy(expected)
    for twin, weight_decay in ((expected, 0.1), (without, 0)):
        optimizer = SGD(twin.parameters(), lr=0.5)
        for i, data in enumerate(batches, start=1):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                loss = twin(**data, mode='loss')['loss']
            loss = loss + weight_decay / 2 * penalty(twin.block)
            (loss / steps).backward()
            if i % steps == 0:
                optimizer.step()
                optimizer.zero_grad()
    found = network.state_dict()
    assert_same(dict(expected.state_dict()), dict(found))
    key = 'block.branch_1x1.conv.weight'
    assert_differ(without.state_dict()[key], found[key])


def test_the_term_is_shown_beside_the_loss(tmp_path):
    runner = tiny_runner(tmp_path, model=model(), custom_hooks=[HOOK])
    runner.train()
    scalars = runner.message_hub.log_scalars
    shown = {key: scalars[f'train/{key}'].current() for key in (TERM, 'loss')}
    assert 0 < shown[TERM] < shown['loss']


class TestTerm:
    def test_is_one_of_the_losses(self):
        network = hooked(model())
        losses = network(**batch(), mode='loss')
        assert losses.keys() == {'loss', TERM}
        # By the statistics of this forward pass, as in the official code.
        assert_same(0.05 * penalty(network.block), losses[TERM])

    @pytest.mark.parametrize('mode', ['tensor', 'predict'])
    def test_is_not_in_other_modes(self, mode):
        expected = model()(**batch(), mode=mode)
        assert_same(expected, hooked(model())(**batch(), mode=mode), tolerance=0)

    def test_counts_every_block_in_train_form(self):
        network = TinyModel()
        network.block = nn.Sequential(*(RepVGGBlock(*c) for c in ((3, 4), (4, 4), (4, 4))))
        hooked(randomise(network))
        network.block[1].eval().switch_to_deploy()
        expected = 0.05 * (penalty(network.block[0]) + penalty(network.block[2]))
        assert_same(expected, network.eval()(**batch(), mode='loss')[TERM])

    def test_moves_no_frozen_kernel(self):
        network = hooked(model())
        network.block.branch_1x1.requires_grad_(False)
        network(**batch(), mode='loss')[TERM].backward()
        grads = {key: p.grad is not None for key, p in network.named_parameters()}
        assert {key for key in grads if grads[key]} == {'block.branch_3x3.conv.weight'}

    def test_is_computed_in_float32(self):
        """Under autocast, and of kernels of less precision."""
        network = hooked(model())
        with torch.autocast('cpu', torch.bfloat16):
            term = network(**batch(), mode='loss')[TERM]
        assert term.dtype == torch.float32
        assert_same(0.05 * penalty(network.block), term)

        block = randomise(RepVGGBlock(3, 4))
        for branch in (block.branch_3x3, block.branch_1x1):
            branch.conv.to(torch.bfloat16)
        term = equivalent_kernel_l2(block)
        assert term.dtype == torch.float32
        assert_same(penalty(block.float()), term)

    def test_norms_without_scales(self):
        block = randomise(RepVGGBlock(3, 4, norm_cfg=dict(type='BN', affine=False)))
        twin = RepVGGBlock(3, 4)
        twin.load_state_dict(block.state_dict(), strict=False)
        assert_same(penalty(twin), equivalent_kernel_l2(block))


def test_it_ends_with_the_training(tmp_path):
    runner = tiny_runner(tmp_path, model=model(), custom_hooks=[HOOK])
    runner.train()
    assert runner.model(**batch(), mode='loss').keys() == {'loss'}


class TestErrors:
    def test_a_model_without_blocks(self, tmp_path):
        network = model()
        network.block.switch_to_deploy()
        with pytest.raises(ConfigError, match='no RepVGG block in train form'):
            tiny_runner(tmp_path, model=network, custom_hooks=[HOOK]).train()

    def test_a_norm_without_running_statistics(self):
        block = RepVGGBlock(3, 4)
        block.branch_1x1.norm = nn.BatchNorm2d(4, track_running_stats=False)
        with pytest.raises(ConfigError, match='running statistics, not BatchNorm2d'):
            equivalent_kernel_l2(block)

    def test_a_loss_that_is_no_dict(self):
        class Bare(TinyModel):
            def forward(self, inputs, labels, mode):
                return super().forward(inputs, labels, mode)['loss']

        with pytest.raises(ConfigError, match='Bare returns Tensor instead of a dict'):
            hooked(Bare())(**batch(), mode='loss')

    def test_a_training_step_that_asks_for_no_loss(self, tmp_path):
        """It would train the kernels without any decay."""

        class OwnStep(TinyModel):
            def train_step(self, data, optim_wrapper):
                logits = self(data['inputs'])
                loss = nn.functional.cross_entropy(logits, data['labels'])
                optim_wrapper.update_params(loss)
                return dict(loss=loss)

        runner = tiny_runner(tmp_path, model=OwnStep(), custom_hooks=[HOOK])
        with pytest.raises(ConfigError, match=r"OwnStep .* forward with mode='loss'"):
            runner.train()
