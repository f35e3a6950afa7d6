import copy

import pytest
import torch
from laws import (
    always_one_conv,
    assert_differ,
    assert_same,
    count_convs,
    image,
    randomise,
)
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmpretrain.models.backbones.repvgg import RepVGG as MMPretrainRepVGG
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmrep.models.backbones import DBBResNet, RepVGG
from mmrep.models.blocks import ConvNormBlock, DiverseBranchBlock, RepVGGBlock
from mmrep.models.layers import SELayer
from mmrep.reparam import (
    DeployReport,
    NotFoldableError,
    count_parameters,
    fuse_conv_norm,
    register_linear_conv,
    reparam_blocks,
    set_kernel,
    switch_to_deploy,
)

ARCH = dict(
    num_blocks=(1, 2), width_factor=(1, 1), group_layer_map={2: 2}, se_cfg=dict(ratio=4)
)
ARCH_BLOCKS = ['stem', 'stage_1.0', 'stage_2.0', 'stage_2.1']


def network(**options) -> nn.Module:
    """Blocks of every type between other layers."""
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            RepVGGBlock(4, 4, **options),
            nn.Sequential(nn.ReLU(), DiverseBranchBlock(4, 6, 3, stride=2)),
            ConvNormBlock(6, 6, 5, groups=6),
        )
    )


BLOCK_NAMES = ['1', '2.1', '3']


def test_equals_and_reports():
    model = network().eval().double()
    x = image(2, 3, 9, 9)
    expected, before = model(x), count_parameters(model)
    report = switch_to_deploy(model)
    assert_same(expected, model(x))
    assert report.switched == BLOCK_NAMES
    assert report.deployed == []
    assert report.params_before == before
    assert report.params_after == sum(p.numel() for p in model.parameters()) < before
    assert {name for name, _ in model[1].named_children()} == {'branch_reparam', 'act'}


def test_is_idempotent():
    model = network()
    switch_to_deploy(model)
    state = copy.deepcopy(model.state_dict())
    report = switch_to_deploy(model)
    assert (report.switched, report.deployed) == ([], BLOCK_NAMES)
    assert report.params_before == report.params_after
    assert_same(state, model.state_dict(), tolerance=0)
    for block in reparam_blocks(model).values():
        conv = block.branch_reparam
        block.switch_to_deploy()
        assert block.branch_reparam is conv


@pytest.mark.parametrize(
    ('position', 'channels', 'options', 'message'),
    [
        (
            0,
            3,
            dict(norm_cfg=dict(type='GN', num_groups=3)),
            'branch_3x3: GroupNorm without',
        ),
        (
            4,
            6,
            dict(conv_cfg=dict(type='ConvWS')),
            'branch_3x3: ConvWS2d has a forward',
        ),
        (
            4,
            6,
            dict(conv_cfg=dict(type='Conv2dAdaptivePadding'), stride=2),
            'branch_3x3: .*run one forward pass first',
        ),
    ],
    ids=['first', 'last', 'size not known'],
)
def test_all_or_nothing(position, channels, options, message):
    """An unfoldable block anywhere leaves all the others as they are."""
    model = network()
    model.insert(position, RepVGGBlock(channels, channels, **options))
    state = copy.deepcopy(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(NotFoldableError, match=rf'^{position}\.{message}'):
        switch_to_deploy(model)
    assert [name for name, _ in model.named_modules()] == modules
    assert_same(state, model.state_dict(), tolerance=0)
    assert not any(block.deploy for block in reparam_blocks(model).values())


def test_error_of_a_lone_block_names_its_type():
    block = RepVGGBlock(4, 4, norm_cfg=dict(type='GN', num_groups=2))
    with pytest.raises(NotFoldableError, match=r'^RepVGGBlock.branch_3x3: GroupNorm'):
        switch_to_deploy(block)
    with pytest.raises(NotFoldableError, match=r'^branch_3x3: GroupNorm'):
        block.switch_to_deploy()
    assert block.branches()


@pytest.mark.parametrize('training', [True, False])
def test_keeps_the_mode(training):
    model = network().train(training)
    switch_to_deploy(model)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_keeps_the_dtype(dtype):
    model = network().to(dtype)
    switch_to_deploy(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_keeps_the_device():
    model = network().to('meta')
    switch_to_deploy(model)
    assert {parameter.device.type for parameter in model.parameters()} == {'meta'}


@pytest.mark.parametrize('part', ['branch_3x3.conv.weight', 'branch_norm.bias'])
def test_can_be_trained_if_any_part_can(part):
    block = RepVGGBlock(4, 4).requires_grad_(False)
    block.get_parameter(part).requires_grad_()
    block.switch_to_deploy()
    assert all(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize('requires_grad', [True, False])
def test_keeps_requires_grad(requires_grad):
    """A frozen block stays frozen, and the others can be trained."""
    model = network()
    model[1].requires_grad_(requires_grad)
    switch_to_deploy(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags.pop('1.branch_reparam.weight') is requires_grad
    assert flags.pop('1.branch_reparam.bias') is requires_grad
    assert all(flags.values())


def test_deployed_model_can_be_tuned():
    model = network().train()
    switch_to_deploy(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image(2, 3, 8, 8, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(before[name], parameter), name


def test_fuses_in_float64():
    """A float32 model's kernel is off by its last rounding alone."""
    block = randomise(RepVGGBlock(16, 16))
    exact, _ = copy.deepcopy(block).double().equivalent_kernel_bias()
    block.switch_to_deploy()
    assert torch.equal(block.branch_reparam.weight, exact.float())


def test_blocks_are_innermost():
    model = nn.ModuleDict({'backbone': RepVGG(ARCH, 3, 4, (1,)), 'head': nn.ReLU()})
    names = list(reparam_blocks(model))
    assert names == [
        f'backbone.{n}' for n in ('stem', 'stage_1.0', 'stage_2.0', 'stage_2.1')
    ]
    plain = DBBResNet(18, base_channels=4, block_cfg=None)
    assert reparam_blocks(plain) == {}


@pytest.mark.parametrize('training', [True, False])
def test_what_takes_a_plain_norms_place_keeps_the_mode(training):
    model = DBBResNet(18, base_channels=4, avg_down=True).train(training)
    switch_to_deploy(model)
    assert {module.training for module in model.modules()} == {training}


def test_body_tells_what_its_blocks_are():
    body = RepVGG(ARCH, 3, 4, (1,))
    assert not body.deploy
    for name, block in reparam_blocks(body).items():
        assert not body.deploy, name
        block.switch_to_deploy()
    assert body.deploy
    assert not DBBResNet(18, base_channels=4, block_cfg=None).deploy


class Nested(ConvNormBlock):
    """A block whose second branch is a block with a norm after it."""

    def build_branches(self):
        inner = RepVGGBlock(4, 4, act_cfg=None)
        return {
            **super().build_branches(),
            'branch_inner': nn.Sequential(inner, self.norm()),
        }

    def norm(self):
        return nn.BatchNorm2d(4)


class TestNested:
    """A block inside a block is folded as it is."""

    @pytest.mark.parametrize('first', ['both', 'outer', 'inner'])
    def test_every_order(self, first):
        block = randomise(Nested(4, 4, 3).double()).eval()
        inner = block.branch_inner[0]
        x = image(2, 4, 7, 7)
        expected = block(x)
        with always_one_conv(block):
            assert count_convs(block, x) == 1
            assert_same(expected, block(x))
        inside = inner(x)
        if first == 'both':
            report = switch_to_deploy(block)
            assert report.switched == ['']
        else:
            (block if first == 'outer' else inner).switch_to_deploy()
        assert block.deploy is (first != 'inner')
        assert inner.deploy is (first == 'inner')
        for each in (block, inner):
            assert each.deploy is not bool(each.branches())
        assert_same(inside, inner(x))
        assert_same(expected, block(x))
        switch_to_deploy(block)
        assert block.deploy
        assert_same(expected, block(x))

    @pytest.mark.parametrize(
        ('part', 'layer'), [('act', nn.ReLU()), ('se_layer', SELayer(4))]
    )
    def test_with_an_activation_inside(self, part, layer):
        block = Nested(4, 4, 3)
        setattr(block.branch_inner[0], part, layer)
        with pytest.raises(NotFoldableError, match='branch_inner: RepVGGBlock has an act'):
            switch_to_deploy(block)
        assert not block.deploy
        assert not block.branch_inner[0].deploy


@pytest.mark.parametrize('options', [dict(deep_stem=True, avg_down=True), {}])
def test_a_second_switch_replaces_no_parameter(options):
    """An optimizer would go on with dead ones."""
    model = DBBResNet(18, base_channels=4, **options)
    switch_to_deploy(model)
    before = dict(model.named_parameters())
    switch_to_deploy(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_mmpretrains_blocks():
    """Blocks of other packages are switched by their own method."""
    model = MMPretrainRepVGG(ARCH | {'se_cfg': None}, 3, 4, (1,), (2, 2), (1, 1))
    model.double()
    randomise(model).train(False)
    x = image(1, 3, 16, 16)
    expected = model(x)
    report = switch_to_deploy(model)
    assert report.switched == ARCH_BLOCKS
    assert report.params_after < report.params_before
    assert all(block.deploy for block in reparam_blocks(model).values())
    assert_same(expected, model(x))
    assert switch_to_deploy(model).deployed == report.switched


class Foreign(nn.Module):
    """A block of another package: it can be switched, and says no more."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error, self.switches = error, 0

    def switch_to_deploy(self) -> None:
        self.switches += 1
        if self.error is not None:
            raise self.error


def test_a_block_that_does_not_say_whether_it_is_deployed_is_switched():
    model = nn.Sequential(Foreign())
    assert switch_to_deploy(model).switched == ['0']
    assert model[0].switches == 1


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (RuntimeError('no'), '^{}: its own switch_to_deploy raises RuntimeError: no$'),
        (NotFoldableError('odd: no'), '^odd: no$'),
    ],
    ids=['any error', 'that of a block'],
)
def test_a_block_that_offers_no_check_is_switched_before_all_others(error, message):
    """Its error leaves these as they are."""
    for position in (0, 1):
        model = nn.Sequential(RepVGGBlock(4, 4))
        model.insert(position, Foreign(error))
        with pytest.raises(NotFoldableError, match=message.format(position)):
            switch_to_deploy(model)
        assert not model[1 - position].deploy


def test_the_error_of_a_block_that_is_the_model_names_its_type():
    with pytest.raises(NotFoldableError, match=r'^Foreign: its own switch_to_deploy'):
        switch_to_deploy(Foreign(RuntimeError('no')))


def test_a_flag_is_no_method():
    """Of the names that a model is asked for, only methods are called."""
    module = nn.ReLU()
    module.switch_to_deploy = module.fuse_plain_units = True
    assert switch_to_deploy(module).switched == []


def test_plain_units_are_fused_too():
    """Those of a body beyond its blocks: a deployed one has no norm."""
    model = randomise(DBBResNet(18, base_channels=4, avg_down=True).double()).eval()
    x = image(1, 3, 32, 32)
    expected = model(x)
    switch_to_deploy(model)
    assert_same(expected, model(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_an_empty_report():
    assert switch_to_deploy(nn.ReLU()) == DeployReport() == DeployReport([], [], 0, 0)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


#: What makes a conv's weight of other tensors.
WEIGHT_FORCERS = {
    'pruned': lambda conv: prune.l1_unstructured(conv, 'weight', 0.5),
    'weight norm': lambda conv: parametrizations.weight_norm(conv),
    'spectral norm': lambda conv: parametrizations.spectral_norm(conv),
    'spectral norm, by a hook': lambda conv: nn.utils.spectral_norm(conv),
}


class TestFuseConvNorm:
    @pytest.mark.parametrize(
        'options',
        [
            dict(kernel_size=3, padding=1),
            dict(kernel_size=(3, 5), stride=2, dilation=2, groups=2, bias=False),
            dict(kernel_size=3, padding=1, padding_mode='reflect'),
            dict(kernel_size=3, padding='same'),
        ],
        ids=str,
    )
    def test_equals(self, options):
        unit = nn.Sequential(nn.Conv2d(4, 6, **options), nn.BatchNorm2d(6))
        unit = randomise(unit.double()).eval()
        state = copy.deepcopy(unit.state_dict())
        x = image(2, 4, 13, 13)
        fused = fuse_conv_norm(*unit)
        assert type(fused) is nn.Conv2d
        assert_same(unit(x), fused(x))
        assert_differ(unit[0].weight, fused.weight)
        assert_same(state, unit.state_dict(), tolerance=0)

    @pytest.mark.parametrize('requires_grad', [True, False])
    def test_keeps_mode_dtype_and_requires_grad(self, requires_grad):
        conv = nn.Conv2d(2, 2, 1, bias=False).half().requires_grad_(requires_grad)
        fused = fuse_conv_norm(conv.eval(), nn.BatchNorm2d(2))
        for parameter in (fused.weight, fused.bias):
            assert parameter.dtype == torch.float16
            assert parameter.requires_grad is requires_grad
        assert not fused.training

    def test_in_float64(self):
        unit = randomise(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)))
        exact = fuse_conv_norm(*copy.deepcopy(unit).double())
        assert torch.equal(fuse_conv_norm(*unit).weight, exact.weight.float())

    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    def test_keeps_the_memory_format(self, layout):
        conv = nn.Conv2d(4, 6, 3).to(memory_format=layout)
        fused = fuse_conv_norm(conv, nn.BatchNorm2d(6))
        assert fused.weight.stride() == conv.weight.stride()

    def test_draws_no_random_number(self):
        unit = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        before = torch.get_rng_state()
        fuse_conv_norm(*unit)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize('size', [(7, 8), (8, 7)], ids=str)
    def test_a_type_that_pads_by_the_size_of_its_input(self, size):
        """And that knows no padding mode."""
        unit = nn.Sequential(Conv2dAdaptivePadding(2, 3, 3, stride=2), nn.BatchNorm2d(3))
        unit = randomise(unit.double()).eval()
        x = image(1, 2, *size)
        assert_same(unit(x), fuse_conv_norm(*unit)(x))

    @pytest.mark.parametrize(
        ('conv', 'norm'),
        [
            (nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)),
            (nn.Conv2d(2, 2, 1), nn.ReLU()),
            (nn.AvgPool2d(2), nn.BatchNorm2d(2)),
            (nn.ReLU(), nn.Identity()),
        ],
        ids=['group norm', 'activation', 'pooling', 'no conv'],
    )
    def test_none_where_they_are_not_one_conv(self, conv, norm):
        assert fuse_conv_norm(conv, norm) is None

    @pytest.mark.parametrize('forced', WEIGHT_FORCERS.values(), ids=WEIGHT_FORCERS)
    def test_a_conv_whose_weight_is_made_of_others(self, forced):
        """By a hook or a parametrization, which a copy would bring along."""
        conv = nn.Conv2d(4, 6, 3, bias=False)
        forced(conv)
        unit = randomise(nn.Sequential(conv, nn.BatchNorm2d(6)).double()).eval()
        x = image(2, 4, 9, 9)
        expected = unit(x)
        # In train mode a spectral norm moves its estimate whenever it is asked.
        unit.train()
        state = copy.deepcopy(dict(unit.state_dict()))
        fused = fuse_conv_norm(*unit)
        assert_same(state, unit.state_dict(), tolerance=0)
        assert set(fused.state_dict()) == {'weight', 'bias'}
        assert_same(expected, fused(x))

    def test_none_for_a_norm_with_a_forward_of_its_own(self):
        assert fuse_conv_norm(nn.Conv2d(2, 2, 1), Doubled(2)) is None

    def test_a_type_that_takes_names_only(self):
        class Named(nn.Conv2d):
            def __init__(self, in_channels, out_channels, kernel_size, *, stride=1, **more):
                super().__init__(in_channels, out_channels, kernel_size, stride, **more)

        register_linear_conv(Named)
        unit = nn.Sequential(Named(2, 3, 3, stride=2), nn.BatchNorm2d(3))
        unit = randomise(unit.double()).eval()
        fused = fuse_conv_norm(*unit)
        assert type(fused) is Named
        x = image(1, 2, 7, 7)
        assert_same(unit(x), fused(x))

    def test_none_for_a_type_that_is_made_of_other_arguments(self):
        class Square(nn.Conv2d):
            def __init__(self, channels):
                super().__init__(channels, channels, 3)

        register_linear_conv(Square)
        assert fuse_conv_norm(Square(2), nn.BatchNorm2d(2)) is None


#: Kernels by their layout in memory.
LAYOUTS = {
    'contiguous': torch.zeros(4, 2, 3, 3),
    'channels last': torch.zeros(4, 2, 3, 3).to(memory_format=torch.channels_last),
    'both': torch.zeros(4, 2, 1, 1),
    'neither': torch.zeros(4, 2, 3, 3).transpose(2, 3),
}


class TestSetKernel:
    @pytest.mark.parametrize('given', ['contiguous', 'channels last'])
    @pytest.mark.parametrize('layout', LAYOUTS)
    def test_has_the_memory_format_of_the_first_kernel(self, layout, given):
        conv, bias = nn.Conv2d(2, 4, 3), nn.Parameter(torch.zeros(4))
        others = [nn.Parameter(torch.zeros(1, 2, 3)), nn.Parameter(LAYOUTS['contiguous'])]
        replaced = [bias, nn.Parameter(LAYOUTS[layout]), *others]
        set_kernel(conv, LAYOUTS[given], torch.zeros(4), iter(replaced))
        expected = 'channels last' if layout == 'channels last' else 'contiguous'
        assert conv.weight.stride() == LAYOUTS[expected].stride()

    @pytest.mark.parametrize('size', [(4,), (4, 2, 3, 3)], ids=str)
    def test_has_the_dtype_of_the_first_kernel_or_parameter(self, size):
        conv = nn.Conv2d(2, 4, 3)
        first = [] if len(size) == 1 else [nn.Parameter(torch.zeros(4))]
        replaced = [*first, nn.Parameter(torch.zeros(size, dtype=torch.float64))]
        set_kernel(conv, torch.ones(4, 2, 3, 3), torch.ones(4), replaced)
        assert conv.weight.dtype == conv.bias.dtype == torch.float64
