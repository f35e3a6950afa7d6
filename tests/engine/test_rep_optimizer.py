"""Plain convs with RepOptimizer learn as the scaled branches that they stand for."""

import copy
import logging

import pytest
import torch
from laws import assert_same, image, on_meta, randomise
from mmengine.optim import build_optim_wrapper
from mmengine.utils import digit_version
from torch import nn

from mmrep.checkpoints import write_checkpoint
from mmrep.engine.searched_scales import read_scales, scaled_convs
from mmrep.errors import CheckpointError, ConfigError
from mmrep.models.backbones import RepOptVGG
from mmrep.models.blocks import ConvNormBlock, ScaleSumBlock
from mmrep.reparam import count_parameters

TINY = dict(num_blocks=(1, 2), width_factor=(1, 1.5), group_layer_map={3: 2}, se_cfg=None)
SMALL = dict(arch=TINY, base_channels=4, out_indices=(1,))
SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.05)


class Net(nn.Module):
    """A backbone by its name in a model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def searched(**options) -> Net:
    """A network of the search, drawn."""
    blocks = dict(type='mmrep.ScaleSumBlock')
    net = randomise(Net(RepOptVGG(**SMALL | options, block_cfg=blocks)).double())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith('scale.weight'):
                # A search leaves factors of either sign.
                parameter[::2] *= -1
    return net


@pytest.fixture
def scales(tmp_path) -> str:
    """The checkpoint of a search."""
    path = tmp_path / 'search.pth'
    write_checkpoint(path, searched().state_dict(), {})
    return str(path)


class Branches(nn.Module):
    """Constant multiples of trained kernels, without a norm: what the paper starts from."""

    def __init__(
        self, scales: dict, kernel: torch.Tensor, stride: int, groups: int
    ) -> None:
        super().__init__()
        self.scales, self.stride, self.groups = scales, stride, groups
        outs, ins = kernel.shape[:2]
        self.kxk = nn.Parameter(kernel.clone())
        self.point = nn.Parameter(image(outs, ins, 1, 1, seed=5))
        has_identity = 'branch_identity' in scales
        self.diagonal = nn.Parameter(image(outs, seed=6)) if has_identity else None

    def kernel(self) -> torch.Tensor:
        """The sum of the branches' kernels, written down plainly."""
        weight = self.scales['branch_kxk'].view(-1, 1, 1, 1) * self.kxk
        centre = self.scales['branch_1x1'].view(-1, 1) * self.point[:, :, 0, 0]
        if self.diagonal is not None:
            eye = torch.eye(weight.shape[1], dtype=weight.dtype).repeat(self.groups, 1)
            own = self.scales['branch_identity'] * self.diagonal
            centre = centre + own[:, None] * eye
        return weight + nn.functional.pad(centre[:, :, None, None], (1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = dict(stride=self.stride, padding=1, groups=self.groups)
        return nn.functional.conv2d(x, self.kernel(), None, **options)


@pytest.mark.parametrize(
    ('optimizer', 'tolerance'),
    [
        (SGD, 1e-12),
        (dict(SGD, nesterov=True, lr=0.03), 1e-12),
        (dict(type='AdamW', lr=0.01, weight_decay=0.1, eps=1e-20), 1e-9),
    ],
    ids=['SGD', 'Nesterov', 'AdamW'],
)
@pytest.mark.parametrize('name', ['stem', 'stage_1.0', 'stage_2.0', 'stage_2.1'])
def test_steps_are_those_of_the_branches(name, optimizer, tolerance, scales):
    """The same kernels after twenty steps; with an identity, a stride, groups."""
    model = Net(RepOptVGG(**SMALL)).double()
    block = model.backbone.get_submodule(name)
    of_block = read_scales(scales)[f'backbone.{name}']
    branches = Branches(of_block, block.weight.detach(), block.stride[0], block.groups)
    with torch.no_grad():
        block.weight.copy_(branches.kernel())

    cfg = dict(type='OptimWrapper', optimizer=optimizer)
    plain = build_optim_wrapper(
        model, dict(cfg, constructor='mmrep.RepOptimizerConstructor', scales=scales)
    ).optimizer
    reference = build_optim_wrapper(branches, cfg).optimizer
    before = block.weight.detach().clone()
    conv = block.branch_kxk.conv
    for number in range(20):
        x = image(2, block.in_channels, 6, 6, seed=number)
        for optimizer_, function in ((plain, conv), (reference, branches)):
            optimizer_.zero_grad()
            (function(x) - image(1, seed=number)).square().mean().backward()
            optimizer_.step()
    assert (block.weight - before).norm() > 1e-2 * before.norm()
    assert_same(branches.kernel(), block.weight, tolerance)


def test_other_parameters_learn_as_ever(scales):
    model = randomise(Net(RepOptVGG(**SMALL)).double())
    cfg = dict(type='OptimWrapper', optimizer=SGD)
    other = copy.deepcopy(model)
    options = dict(constructor='mmrep.RepOptimizerConstructor', scales=scales)
    for m, own in ((model, options), (other, {})):
        wrapper = build_optim_wrapper(m, cfg | own)
        wrapper.update_params(m.backbone(image(2, 3, 16, 16))[0].square().mean())
    kernels = [name for name, p in model.named_parameters() if p.dim() == 4]
    moved = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, moved[name]) is (name not in kernels), name


def test_multiplier(scales):
    """s_k^2 all around, s_1^2 more in the centre, s_0^2 more on its diagonal."""
    model = Net(RepOptVGG(**SMALL)).double()
    block = model.backbone.stage_2[1]
    of_block = read_scales(scales)['backbone.stage_2.1']
    squares = {
        name: {branch: value**2 for branch, value in own.items()}
        for name, own in read_scales(scales).items()
    }
    _, branches = scaled_convs(model, squares, scales)['backbone.stage_2.1']
    assert model.backbone.stage_2[1] is block
    kernel = branches.sum_kernel()
    around, point, own = (
        of_block[f'branch_{name}'][7] ** 2 for name in ('kxk', '1x1', 'identity')
    )
    # Channel 7 of 12 in 2 groups is the second of its group.
    expected = torch.full((6, 3, 3), around.item(), dtype=torch.float64)
    expected[:, 1, 1] += point
    expected[1, 1, 1] += own
    assert_same(expected, kernel[7])


def test_networks_start_as_the_sum_of_branches(scales):
    init_cfg = [
        dict(type='Kaiming', layer='Conv2d'),
        dict(type='mmrep.SearchedScales', scales=scales),
    ]
    torch.manual_seed(3)
    plain = RepOptVGG(**SMALL, init_cfg=init_cfg[:1])
    plain.init_weights()
    torch.manual_seed(3)
    model = RepOptVGG(**SMALL, init_cfg=init_cfg)
    model.init_weights()
    found = read_scales(scales)
    for name, block in model.named_modules():
        if not isinstance(block, ConvNormBlock):
            continue
        of_block = found[f'backbone.{name}']
        ring = torch.ones(3, 3, dtype=torch.bool)
        ring[1, 1] = False
        first = plain.get_submodule(name).weight * of_block['branch_kxk'].view(-1, 1, 1, 1)
        assert_same(first[..., ring], block.weight.double()[..., ring], 1e-6)
        rest = (block.weight - first)[..., 1, 1]
        if 'branch_identity' in of_block:
            eye = torch.eye(rest.shape[1]).repeat(block.groups, 1)
            rest = rest - of_block['branch_identity'][:, None] * eye
        drawn = rest / of_block['branch_1x1'][:, None]
        # Kaiming, fan out: a variance of 2 / outputs of a group.
        spread = (2 * block.groups / block.out_channels) ** 0.5
        assert 0.4 < drawn.std() / spread < 1.9


def test_search_starts_with_smaller_scales_in_later_blocks_of_a_stage():
    arch = dict(num_blocks=(1, 4), width_factor=(1, 1))
    blocks = dict(type='mmrep.ScaleSumBlock')
    model = RepOptVGG(arch, base_channels=4, out_indices=(1,), block_cfg=blocks)
    expected = {'stem': 1, 'stage_1.0': 1, 'stage_2.0': 1}
    expected |= {f'stage_2.{i}': (2 / i) ** 0.5 for i in (1, 2, 3)}
    found = {
        name: {branch: set(b.scale.weight.tolist()) for branch, b in m.branches().items()}
        for name, m in model.named_modules()
        if isinstance(m, ScaleSumBlock)
    }
    assert found.keys() == expected.keys()
    for name, scales in found.items():
        assert scales.pop('branch_identity', {1.0}) == {1.0}
        for values in scales.values():
            assert list(values) == pytest.approx([expected[name]])


def test_scales_of_the_config_are_those_of_every_block():
    blocks = dict(type='mmrep.ScaleSumBlock', scale=0.5)
    model = RepOptVGG(**SMALL, block_cfg=blocks)
    assert (model.stage_2[1].branch_1x1.scale.weight == 0.5).all()


@pytest.mark.parametrize(
    ('arch', 'millions'), [('B1', 51.83), ('B2', 80.32), ('L1', None), ('L2', None)]
)
def test_sizes(arch, millions):
    """B1 and B2 are RepVGG's; L1 and L2 have more blocks of the same widths."""
    model = on_meta(RepOptVGG, arch, deploy=True)
    depths = [len(getattr(model, name)) for name in model.stages]
    assert depths == ([4, 6, 16, 1] if arch[0] == 'B' else [8, 14, 24, 1])
    widths = [getattr(model, name)[0].out_channels for name in model.stages]
    assert widths[-1] == {'1': 2048, '2': 2560}[arch[1]]
    if millions is not None:
        count = count_parameters(model) + 1000 * widths[-1] + 1000
        assert abs(count / 1e6 - millions) < 0.01


class TestRefuses:
    def build(self, model=None, **options):
        cfg = dict(type='OptimWrapper', optimizer=SGD)
        cfg['constructor'] = 'mmrep.RepOptimizerConstructor'
        return build_optim_wrapper(model or Net(RepOptVGG(**SMALL)), cfg | options)

    def written(self, folder, state) -> str:
        path = folder / 'other.pth'
        write_checkpoint(path, state, {})
        return str(path)

    def test_no_scales(self):
        with pytest.raises(ConfigError, match='needs scales: give optim_wrapper scales='):
            self.build()

    def test_no_path(self):
        with pytest.raises(ConfigError, match='scales are the path of a checkpoint, not 3'):
            self.build(scales=3)

    @pytest.mark.parametrize(
        ('optimizer', 'message'),
        [
            (dict(type='RMSprop', lr=0.1), 'with SGD and AdamW, not RMSprop'),
            pytest.param(
                dict(type='AdamW', lr=0.1, fused=True),
                'cannot use a fused AdamW',
                marks=pytest.mark.skipif(
                    digit_version(torch.__version__) < digit_version('2.4'),
                    reason='fused on GPUs only',
                ),
            ),
        ],
        ids=['RMSprop', 'fused'],
    )
    def test_another_optimizer(self, optimizer, message, scales):
        with pytest.raises(ConfigError, match=message):
            self.build(scales=scales, optimizer=optimizer)

    @pytest.mark.parametrize('num_blocks', [(1, 1), (1, 3)], ids=['shallow', 'deep'])
    def test_another_network(self, num_blocks, scales):
        arch = dict(num_blocks=num_blocks, width_factor=(1, 1.5))
        with pytest.raises(ConfigError, match=r'differ in backbone\.stage_2\.'):
            self.build(Net(RepOptVGG(**SMALL | dict(arch=arch))), scales=scales)

    def test_a_fused_network(self, scales):
        with pytest.raises(ConfigError, match='with ConvNormBlocks that are not fused'):
            self.build(Net(RepOptVGG(**SMALL, deploy=True)), scales=scales)

    def test_another_width(self, scales):
        with pytest.raises(ConfigError, match=r'search.pth does not fit .*\(4,\).*\(8,\)'):
            self.build(Net(RepOptVGG(**SMALL | dict(base_channels=8))), scales=scales)

    def test_another_conv(self, scales):
        conv_cfg = dict(type='Conv2dAdaptivePadding')
        with pytest.raises(
            ConfigError, match=r'Conv2dAdaptivePadding is not an nn\.Conv2d'
        ):
            self.build(Net(RepOptVGG(**SMALL, conv_cfg=conv_cfg)), scales=scales)

    def test_no_search(self, tmp_path):
        path = self.written(tmp_path, nn.Linear(2, 2).state_dict())
        with pytest.raises(ConfigError, match='has no scales: give a checkpoint in train'):
            self.build(scales=path)

    def test_not_finite(self, tmp_path):
        state = searched().state_dict()
        state['backbone.stem.branch_1x1.scale.weight'][1] = torch.nan
        with pytest.raises(ConfigError, match=r'nan or inf \(backbone\.stem\.branch_1x1'):
            self.build(scales=self.written(tmp_path, state))

    def test_no_file(self, tmp_path):
        with pytest.raises(CheckpointError):
            self.build(scales=str(tmp_path / 'a.pth'))

    def test_another_prefix(self, scales):
        init_cfg = dict(type='mmrep.SearchedScales', scales=scales, prefix='body.')
        with pytest.raises(ConfigError, match=r"no scales whose names begin with 'body\."):
            RepOptVGG(**SMALL, init_cfg=init_cfg).init_weights()

    def test_a_closure(self, scales):
        optimizer = self.build(scales=scales).optimizer
        with pytest.raises(RuntimeError, match='without a closure'):
            optimizer.step(lambda: 0)

    def test_clipping_is_warned_of(self, scales, monkeypatch):
        said = []
        monkeypatch.setattr(
            'mmrep.engine.rep_optimizer_constructor.print_log',
            lambda message, logger, level: said.append((message, level)),
        )
        self.build(scales=scales)
        assert not said
        self.build(scales=scales, clip_grad=dict(max_norm=1))
        ((message, level),) = said
        assert 'RepOptimizer with clip_grad is not equivalent' in message
        assert level == logging.WARNING
