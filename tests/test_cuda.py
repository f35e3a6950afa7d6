"""Tests of blocks, networks and trainings that need a GPU.

The references are computed on the CPU, branch by branch and in float64. The tests run
without the hosts and with mmcv-lite.
"""

import copy
import functools

import pytest
import torch
from laws import (
    TOLERANCE,
    always_one_conv,
    assert_deploy_equivalent,
    assert_same,
    assert_same_step,
    image,
    randomise,
    step,
)
from tiny_runner import TinyModel, tiny_runner
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmrep.benchmark import peak_memory
from mmrep.models.backbones import DBBResNet, RepVGG
from mmrep.models.blocks import (
    DiverseBranchBlock,
    PointwiseBlock,
    ReparamBlock,
    RepVGGBlock,
)
from mmrep.registry import MODELS
from mmrep.reparam import (
    block_references,
    branch_by_branch,
    compare_blocks,
    reparam_blocks,
    seen_inputs,
    switch_to_deploy,
)

DEVICE = 'cuda'

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

LARGE = ('DilatedReparamBlock', 'LargeKernelBlock')
#: Every registered block with 8 channels, and variants that none of them covers.
BLOCKS = {
    name: functools.partial(kind, 8, 8, kernel_size=7 if name in LARGE else 3)
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and issubclass(kind, ReparamBlock)
} | {
    'PointwiseBlock': functools.partial(PointwiseBlock, 8, 8),
    'with SE': functools.partial(RepVGGBlock, 8, 8, se_cfg=dict(ratio=2, divisor=1)),
    'depthwise': functools.partial(DiverseBranchBlock, 8, 8, 3, groups=8),
}
NETWORKS = {
    'RepVGG': functools.partial(
        RepVGG, dict(num_blocks=(1, 2), width_factor=(0.125, 0.125)), out_indices=(0, 1)
    ),
    'DBBResNet': functools.partial(
        DBBResNet,
        **dict(depth=18, base_channels=8, stem_channels=8, num_stages=2, strides=(1, 2)),
        **dict(dilations=(1, 1), out_indices=(0, 1)),
    ),
}

every_block = pytest.mark.parametrize('name', BLOCKS)
every_model = pytest.mark.parametrize('name', [*BLOCKS, *NETWORKS])
low_precision = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convs compute in float32 without TF32, and by deterministic algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)


def build(name: str, **options) -> nn.Module:
    """A model with random weights on the CPU, in train mode."""
    return randomise((BLOCKS | NETWORKS)[name](**options).double()).train()


def pixels(name: str, **options) -> torch.Tensor:
    """A batch for a model."""
    shape = (4, 3, 32, 32) if name in NETWORKS else (4, 8, 12, 13)
    return image(*shape, **options)


def step_of(wrapper: nn.Module, prefix: str, x: torch.Tensor) -> dict:
    """:func:`laws.step`, with the names that the wrapped module had before."""
    outcome = step(wrapper, x)
    for part in ('gradients', 'statistics'):
        outcome[part] = {k.removeprefix(prefix): v for k, v in outcome[part].items()}
    return outcome


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', TOLERANCE)
@every_model
def test_deploy_form(name, dtype, layout):
    """It agrees with the branches on the GPU, and with those on the CPU in float64."""
    if name in NETWORKS and dtype.itemsize < 4:
        pytest.skip('many layers amplify the rounding of half precision')
    model = build(name).to(dtype=dtype, device=DEVICE, memory_format=layout)
    x = pixels(name, dtype=dtype)
    deployed = assert_deploy_equivalent(model, on_gpu := x.to(DEVICE, memory_format=layout))
    with torch.no_grad(), branch_by_branch(exact := copy.deepcopy(model).cpu().double()):
        expected = exact(x.double())
        assert_same(expected, deployed(on_gpu))
    tensors = [t for t in deployed.state_dict().values() if t.dim() == 4]
    assert {(t.device.type, t.dtype) for t in tensors} == {(DEVICE, dtype)}
    assert all(t.is_contiguous(memory_format=layout) for t in tensors)


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('mode', ['train', 'norm_eval', 'norm_eval, one conv'])
@every_model
def test_step(name, mode, with_cp):
    """Outputs, gradients and statistics are those of the CPU."""
    x, models = pixels(name), [build(name), build(name, with_cp=with_cp).to(DEVICE)]
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.train(mode == 'train')
    with branch_by_branch(models[0]):
        expected = step(models[0], x)
    form = always_one_conv if 'one conv' in mode else branch_by_branch
    with form(models[1]):
        assert_same_step(expected, step(models[1], x.to(DEVICE)))


def error(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The relative L2 error of all tensors together."""
    first, second = (
        torch.cat([t.flatten().double() for t in each.values()])
        for each in (reference, other)
    )
    return ((second - first).norm() / first.norm()).item()


@low_precision
@pytest.mark.parametrize('with_cp', [False, True])
@every_block
def test_autocast_step(name, with_cp, dtype):
    x = pixels(name, dtype=torch.float32).to(DEVICE)
    block = build(name, with_cp=with_cp, act_cfg=None).float().to(DEVICE)
    expected = step(copy.deepcopy(block), x)
    block.forward = torch.autocast(DEVICE, dtype)(block.forward)
    low = step(block, x)
    gradients = low['gradients']
    assert gradients.keys() == expected['gradients'].keys()
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for part in ('outputs', 'gradients', 'statistics'):
        rounding = error(expected[part], low[part])
        assert 0 < rounding <= 2 * torch.finfo(dtype).eps, part


@low_precision
@every_block
@torch.no_grad()
def test_autocast_evaluation(name, dtype):
    x = pixels(name, dtype=torch.float32).to(DEVICE)
    block = build(name).float().to(DEVICE).eval()
    with branch_by_branch(block):
        expected = block(x)
    deployed = copy.deepcopy(block)
    deployed.switch_to_deploy()
    with torch.autocast(DEVICE, dtype), always_one_conv(block):
        outputs = [block(x), deployed(x)]
        with branch_by_branch(block):
            outputs.append(block(x))
    for output in outputs:
        assert assert_same(expected, output, 2 * torch.finfo(dtype).eps) > 0


class DroppingModel(TinyModel):
    """Draws random numbers on the GPU in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            self.block, DiverseBranchBlock(4, 4), nn.Dropout(0.5), nn.BatchNorm2d(4)
        )


class TestResuming:
    """A run in mixed precision, with the hooks of tools/train.py, is resumed."""

    hooks = dict(
        resume=dict(type='mmrep.ResumeHook'),
        random_state=dict(type='mmrep.RandomStateHook'),
        plain_checkpoint=dict(type='mmrep.PlainCheckpointHook'),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3),
    )

    @pytest.fixture(autouse=True)
    def no_sleep(self, monkeypatch):
        """Skip the pause that mmengine makes before each pass over the data."""
        monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)

    def train(self, folder, hooks: dict = hooks, **options) -> dict:
        """Train for six iterations; returns the last checkpoint, which opens anywhere."""
        tiny_runner(
            folder,
            model=DroppingModel(),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=6),
            optim_wrapper=dict(
                type='AmpOptimWrapper',
                loss_scale=dict(init_scale=256.0, growth_interval=2),
                optimizer=dict(type='Adam', lr=0.02),
            ),
            default_hooks=hooks,
            custom_hooks=[dict(type='EMAHook', momentum=0.5)],
            randomness=dict(seed=7),
            **options,
        ).train()
        places = []
        end = torch.load(
            folder / 'iter_6.pth',
            weights_only=True,
            map_location=lambda storage, place: places.append(place) or storage,
        )
        assert {*places} == {'cpu'}
        return end

    def test_it_is_the_run_that_it_would_have_been(self, tmp_path):
        """To the bit; without ``RandomStateHook`` it is another run."""
        whole = self.train(tmp_path)
        resume = dict(load_from=str(tmp_path / 'iter_3.pth'), resume=True)
        resumed = self.train(tmp_path / 'resumed', **resume)
        scaler = whole['optimizer']['loss_scaler']
        assert scaler['scale'] == 256.0 * 2**3
        assert resumed['optimizer']['loss_scaler'] == scaler
        same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
        same(resumed['optimizer']['state'], whole['optimizer']['state'])
        for weights in ('state_dict', 'ema_state_dict'):
            same(resumed[weights], whole[weights])
        ((state,), (expected,)) = (end['random_state'] for end in (resumed, whole))
        same([state['cuda'], state['torch']], [expected['cuda'], expected['torch']])
        hooks = {k: hook for k, hook in self.hooks.items() if k != 'random_state'}
        other = self.train(tmp_path / 'other', hooks, **resume)
        with pytest.raises(AssertionError, match='not equal'):
            same(other['state_dict'], whole['state_dict'])


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group(
        'nccl', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@every_model
def test_sync_bn(process_group, name):
    """In a group of one process SyncBN is batch norm."""
    x = pixels(name).to(DEVICE)
    model = build(name, norm_cfg=dict(type='SyncBN', requires_grad=True)).to(DEVICE)
    norms = [m for m in model.modules() if hasattr(m, 'running_mean')]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    actual = step_of(DistributedDataParallel(model), 'module.', x)
    assert_same_step(step(build(name).to(DEVICE), x), actual)
    assert_deploy_equivalent(model, x)


@every_block
def test_compiled_step(name):
    """By inductor, in one graph."""
    torch._dynamo.reset()
    x, block = pixels(name).to(DEVICE), build(name).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    assert_same_step(step(block, x), step_of(compiled, '_orig_mod.', x))


@every_model
@torch.no_grad()
def test_compiled_deploy_form(name):
    torch._dynamo.reset()
    x, model = pixels(name).to(DEVICE), build(name).to(DEVICE).eval()
    with branch_by_branch(model):
        expected = model(x)
    switch_to_deploy(model)
    assert_same(expected, torch.compile(model, fullgraph=True)(x))


@pytest.mark.parametrize('kind', [RepVGGBlock, DiverseBranchBlock])
def test_checkpointing_saves_memory(kind):
    x = image(8, 32, 64, 64, dtype=torch.float32).to(DEVICE)

    def peak(with_cp: bool) -> int:
        blocks = [kind(32, 32, with_cp=with_cp) for _ in range(8)]
        stack = nn.Sequential(*blocks).to(DEVICE)
        # The first step loads kernels and reserves their workspaces.
        stack(x).sum().backward()
        stack.zero_grad(set_to_none=True)
        return peak_memory(lambda: stack(x).sum().backward(), DEVICE)

    saving, plain = peak(True), peak(False)
    # A stack keeps each block's input, and the maps of one block at a time.
    assert 9 * x.nbytes < saving < 0.6 * plain


@every_model
@torch.no_grad()
def test_every_block_is_verified(name):
    """Each by itself and on the GPU; a wrong kernel is detected."""
    model = build(name).float().to(DEVICE).eval()
    with branch_by_branch(model), seen_inputs(model) as seen:
        model(pixels(name, dtype=torch.float32).to(DEVICE))
        references = block_references(model, seen)
    switch_to_deploy(model)
    differences = compare_blocks(references, model)
    assert differences
    assert all(difference.is_within(1e-5) for difference in differences.values())
    block, *_ = reparam_blocks(model).values()
    block.main_conv.weight.mul_(1.001)
    differences = compare_blocks(references, model)
    assert not all(difference.is_within(1e-5) for difference in differences.values())
