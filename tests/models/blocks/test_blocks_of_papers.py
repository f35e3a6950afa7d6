"""The blocks that came after DBB, against their papers written down plainly."""

import math

import pytest
import torch
import torch.nn.functional as F
from laws import (
    assert_deploy_equivalent,
    assert_differ,
    assert_same,
    assert_same_step,
    count_convs,
    image,
    randomise,
    step,
)
from mmpretrain.models.backbones.mobileone import MobileOneBlock as MMPretrainMobileOne
from mmpretrain.models.backbones.replknet import ReparamLargeKernelConv
from timm.models.byobnet import MobileOneBlock as TimmMobileOne
from torch import Tensor, nn

from mmrep.models.blocks import (
    AsymmetricConvBlock,
    BranchBlock,
    DilatedReparamBlock,
    LargeKernelBlock,
    MobileOneBlock,
    OREPABlock,
    OREPARepVGGBlock,
    QARepVGGBlock,
    RepVGGBlock,
)

X = image(3, 4, 9, 10)


def drawn(block: nn.Module) -> nn.Module:
    return randomise(block.double())


def normed(branch: nn.Module, y: Tensor) -> Tensor:
    """What a branch's norm makes of a map."""
    return branch.norm(y)


class TestAsymmetricConvBlock:
    @pytest.mark.parametrize('training', [True, False])
    def test_is_the_paper_s(self, training):
        block = drawn(AsymmetricConvBlock(4, 6, 5, stride=2, dilation=2)).train(training)
        square, column, row = block.branches().values()
        options = dict(stride=2, dilation=2)
        expected = (
            normed(square, F.conv2d(X, square.conv.weight, padding=(4, 4), **options))
            + normed(column, F.conv2d(X, column.conv.weight, padding=(4, 0), **options))
            + normed(row, F.conv2d(X, row.conv.weight, padding=(0, 4), **options))
        )
        assert column.conv.weight.shape == (6, 4, 5, 1)
        assert row.conv.weight.shape == (6, 4, 1, 5)
        assert_same(expected, block(X))

    @pytest.mark.parametrize(
        ('kernel_size', 'others'),
        [((1, 1), []), ((3, 1), ['1xk']), ((1, 3), ['kx1']), ((2, 3), ['kx1', '1xk'])],
    )
    def test_has_the_strips_that_are_others(self, kernel_size, others):
        block = AsymmetricConvBlock(4, 4, kernel_size, padding=1)
        names = [name.removeprefix('branch_') for name in block.branches()]
        assert names == ['kxk', *others]


class TestMobileOneBlock:
    @pytest.mark.parametrize(
        'options',
        [
            dict(in_channels=4, out_channels=4, kernel_size=3, num_convs=3),
            dict(in_channels=4, out_channels=6, kernel_size=3, num_convs=1, stride=2),
            dict(in_channels=4, out_channels=4, kernel_size=3, num_convs=2, groups=4),
            dict(in_channels=4, out_channels=6, kernel_size=1, num_convs=4, padding=0),
            dict(
                **dict(in_channels=16, out_channels=16, kernel_size=3, num_convs=2),
                se_cfg=dict(ratio=4, divisor=1),
            ),
        ],
    )
    def test_trains_as_mmpretrains(self, options):
        theirs = drawn(MMPretrainMobileOne(**options))
        ours = MobileOneBlock(**options).double()
        ours.load_state_dict(theirs.state_dict())
        x = image(3, options['in_channels'], 7, 8)
        for _ in range(2):
            assert_same_step(step(theirs, x), step(ours, x))
        assert_same(theirs.eval()(x), ours.eval()(x))
        ours.switch_to_deploy()
        theirs.switch_to_deploy()
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert_same(theirs(x), ours(x))

    def test_is_timm_s(self):
        theirs = drawn(TimmMobileOne(4, 4, 3, num_conv_branches=2)).eval()
        ours = MobileOneBlock(4, 4, 3, 2).double().eval()
        names = {
            'conv_kxk.': 'branch_conv_list.',
            'conv_scale.': 'branch_scale.',
            'identity.': 'branch_norm.',
            '.bn.': '.norm.',
        }
        state = theirs.state_dict()
        for old, new in names.items():
            state = {key.replace(old, new): tensor for key, tensor in state.items()}
        ours.load_state_dict(state)
        assert_same(theirs(X), ours(X))

    def test_needs_a_conv(self):
        with pytest.raises(ValueError, match='num_convs must be at least 1, not 0'):
            MobileOneBlock(4, 4, 3, 0)


class TestQARepVGGBlock:
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('average', [True, False])
    @pytest.mark.parametrize('stride', [1, 2])
    def test_is_the_paper_s(self, training, average, stride):
        block = drawn(QARepVGGBlock(4, 4, stride=stride, average=average)).train(training)
        square, point = block.branch_kxk, block.branch_1x1
        expected = normed(square, F.conv2d(X, square.conv.weight, None, stride, 1))
        expected = expected + F.conv2d(X, point.conv.weight, None, stride)
        if stride == 1:
            expected = expected + X
            if average:
                expected = expected + F.avg_pool2d(X, 3, 1, 1)
        assert_same(block.post_norm(expected).relu(), block(X))

    @pytest.mark.parametrize('average', [True, False])
    def test_takes_the_identity_out_of_a_conv(self, average):
        conv = drawn(nn.Conv2d(4, 4, 3, padding=1, bias=False))
        norm = drawn(nn.BatchNorm2d(4)).eval()
        before = conv.weight.clone()
        block = QARepVGGBlock.from_conv(conv, norm, average=average).eval()
        taken = before - block.main_conv.weight
        expected = torch.full((4, 3, 3), 1 / 9 if average else 0.0, dtype=X.dtype)
        expected[:, 1, 1] += 1
        assert_same(torch.diag_embed(expected.permute(1, 2, 0)).permute(2, 3, 0, 1), taken)
        assert torch.equal(conv.weight, before)
        assert_same(norm(conv(X)), block(X))

    @pytest.mark.parametrize('point', [True, False])
    def test_initializers_mean_all_of_the_kernel(self, point):
        """With a branch that starts at zero, or none but the fixed one."""
        bare = dict(norm=False)
        branches = ['kxk', dict(type='identity', **bare)]
        branches += [dict(kernel_size=1, **bare)] * point
        block = BranchBlock.from_conv(
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            branches=branches,
            post_norm=True,
        )

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, 0.5)

        block.apply(init)
        kernel, _ = block._kernel_of_sum((9, 9))
        assert_same(torch.full_like(kernel, 0.5), kernel, 1e-6)

    def test_what_initializes_nothing_leaves_all_to_the_bit(self):
        conv = drawn(nn.Conv2d(4, 4, 3, padding=1, bias=False)).float()
        block = QARepVGGBlock.from_conv(conv, nn.BatchNorm2d(4))
        with torch.no_grad():
            # Adding the identity and taking it out would round it.
            block.weight.fill_(1e-4)
        before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
        block.apply(lambda module: None)
        assert all(torch.equal(before[k], t) for k, t in block.state_dict().items())

    def test_beside_a_norm_there_is_no_place_for_what_is_fixed(self):
        conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        branches = ('kxk', dict(type='identity', norm=False))
        with pytest.raises(ValueError, match='BranchBlock has a branch without para'):
            BranchBlock.from_conv(conv, nn.BatchNorm2d(4), branches=branches)


class TestDilatedReparamBlock:
    #: UniRepLKNet, appendix: kernels beside a large one, and their dilations.
    KERNELS = {
        17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
        15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
        13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
        11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
        9: ((5, 5, 3, 3), (1, 2, 3, 4)),
        7: ((5, 3, 3), (1, 2, 3)),
        5: ((3, 3), (1, 2)),
    }

    @pytest.mark.parametrize('size', KERNELS)
    def test_is_the_paper_s(self, size):
        block = drawn(DilatedReparamBlock(4, 4, size, groups=4, act_cfg=None)).eval()
        large, *others = block.branches().values()
        x = image(2, 4, 20, 19)
        options = dict(groups=4)
        expected = normed(
            large, F.conv2d(x, large.conv.weight, padding=size // 2, **options)
        )
        for branch, kernel, dilation in zip(others, *self.KERNELS[size], strict=True):
            assert branch.conv.kernel_size == (kernel, kernel)
            options.update(dilation=dilation, padding=dilation * (kernel // 2))
            expected = expected + normed(branch, F.conv2d(x, branch.conv.weight, **options))
        assert_same(expected, block(x))
        assert_deploy_equivalent(block, x)

    def test_kernels_of_one_s_own(self):
        block = DilatedReparamBlock(4, 4, (9, 5), kernels=[(3, 1), (3, 2)])
        assert list(block.branches()) == ['branch_large', 'branch_k3_d1', 'branch_k3_d2']
        assert_deploy_equivalent(block.double(), X)

    @pytest.mark.parametrize('kernel_size', [3, 19, (7, 5)])
    def test_refuses(self, kernel_size):
        with pytest.raises(ValueError, match='no dilated kernels are known for'):
            DilatedReparamBlock(4, 4, kernel_size)

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match='does not fit into the middle'):
            DilatedReparamBlock(4, 4, 5, kernels=[(3, 3)])


class TestLargeKernelBlock:
    def test_trains_as_mmpretrains(self):
        theirs = ReparamLargeKernelConv(4, 4, 13, 1, 4, 5).double()
        randomise(theirs)
        ours = LargeKernelBlock(4, 4, 13, groups=4, act_cfg=None).double()
        ours.load_state_dict(theirs.state_dict())
        x = image(2, 4, 15, 14)
        assert_same(theirs(x), ours(x))
        assert_same(theirs.eval()(x), ours.eval()(x))


def orepa_kernel(block: OREPABlock) -> Tensor:
    """The kernel of the paper's code, for one group."""
    branches = {n.removeprefix('branch_'): b for n, b in block.branches().items()}
    rows, columns = block.kernel_size
    outs, ins = block.out_channels, block.in_channels
    kernels = {'kxk': branches['kxk'].conv.weight}
    if 'avg' in branches:
        point = branches['avg'].conv.weight
        kernels['avg'] = point.expand(-1, -1, rows, columns) / (rows * columns)
    if 'prior' in branches:
        point = branches['prior'].conv.weight
        prior = torch.zeros(outs, rows, columns, dtype=point.dtype)
        half = outs // 2
        for i in range(outs):
            for r in range(rows):
                for c in range(columns):
                    prior[i, r, c] = (
                        math.cos(math.pi * (r + 0.5) * (i + 1) / rows)
                        if i < half
                        else math.cos(math.pi * (c + 0.5) * (i + 1 - half) / columns)
                    )
        kernels['prior'] = torch.einsum('oi,ohw->oihw', point[..., 0, 0], prior)
    if '1x1_kxk' in branches:
        first = branches['1x1_kxk'].conv1.weight[..., 0, 0] + torch.eye(ins).double()
        second = branches['1x1_kxk'].conv2.weight
        kernels['1x1_kxk'] = torch.einsum('ti,othw->oihw', first, second)
    if '1x1' in branches:
        conv = branches['1x1'].conv
        kernels['1x1'] = F.pad(conv.weight, 2 * (columns // 2,) + 2 * (rows // 2,))
    if 'separable' in branches:
        depthwise = branches['separable'].depthwise.weight.reshape(ins, 8, rows, columns)
        pointwise = branches['separable'].pointwise.weight.reshape(outs, ins, 8)
        kernels['separable'] = torch.einsum('ithw,oit->oihw', depthwise, pointwise)
    assert kernels.keys() == branches.keys()
    scales = {name: branch.scale.weight for name, branch in branches.items()}
    return sum(scales[name][:, None, None, None] * kernels[name] for name in kernels)


class TestOREPABlock:
    @pytest.mark.parametrize('kernel_size', [1, 3, 5, 7, (3, 5)])
    @pytest.mark.parametrize('stride', [1, 2])
    def test_is_the_paper_s(self, kernel_size, stride):
        block = drawn(OREPABlock(4, 7, kernel_size, stride=stride))
        kernel = orepa_kernel(block)
        padding = tuple(size // 2 for size in block.kernel_size)
        assert_same(kernel, block._kernel_of_sum((9, 10))[0])
        y = F.conv2d(X, kernel, None, stride, padding)
        assert_same(block.post_norm(y), block(X))

    def test_trains_as_one_conv(self):
        block, x = OREPABlock(4, 4).double().train(), image(2, 4, 30, 30)
        # That of the input, and that of the kernels of a 1x1 conv before a kxk one.
        assert count_convs(block, x) == 2
        block.one_conv = False
        assert count_convs(block, x) > 6

    def test_scales_start_as_the_paper_s(self):
        block = OREPABlock(4, 4)
        starts = [
            branch.scale.weight.unique().item() for branch in block.branches().values()
        ]
        assert starts == pytest.approx([0.25, 0.25, 0, 0.5, 1, 0.5])
        block = OREPARepVGGBlock(4, 4).branch_orepa
        starts = [
            branch.scale.weight.unique().item() for branch in block.branches().values()
        ]
        assert starts == pytest.approx([0.25, 0.25, 0, 0.5, 0.5])

    def test_identity_of_the_first_pointwise_conv(self):
        assert not OREPABlock(8, 8, groups=4).branch_1x1_kxk.conv1.weight.any()
        conv = OREPABlock(8, 8, groups=8).branch_1x1_kxk.conv1
        assert (conv.out_channels, conv.groups) == (16, 8)

    @pytest.mark.parametrize('scales', [{}, dict(avg=1.0), dict(kxk=1.0, odd=1.0)])
    def test_refuses(self, scales):
        with pytest.raises(
            ValueError, match="scales must include 'kxk', and only names of kxk, avg"
        ):
            OREPABlock(4, 4, scales=scales)

    def test_chosen_branches(self):
        block = OREPABlock(4, 4, scales=dict(avg=0.5, kxk=1.0))
        assert list(block.branches()) == ['branch_kxk', 'branch_avg']

    @pytest.mark.parametrize('training', [True, False])
    def test_in_repvgg(self, training):
        block = drawn(OREPARepVGGBlock(4, 4)).train(training)
        inner, point = block.branch_orepa, block.branch_1x1
        y = inner.post_norm(F.conv2d(X, orepa_kernel(inner), None, 1, 1))
        y = y + normed(point, F.conv2d(X, point.conv.weight)) + block.branch_norm(X)
        assert_same(y.relu(), block(X))


class TestBranchBlock:
    def test_of_repvgg_s_branches(self):
        theirs = drawn(RepVGGBlock(4, 4))
        ours = BranchBlock(4, 4).double()
        names = {'branch_norm.': 'branch_identity.'}
        state = theirs.state_dict()
        for old, new in names.items():
            state = {key.replace(old, new): tensor for key, tensor in state.items()}
        ours.load_state_dict(state)
        assert_same(step(theirs, X)['outputs'], step(ours, X)['outputs'])

    def test_of_qarepvgg_s_branches(self):
        bare = dict(norm=False)
        branches = ('kxk', dict(kernel_size=1, **bare), dict(type='identity', **bare))
        branches += (dict(type='avg', **bare),)
        ours = drawn(BranchBlock(4, 4, branches=branches, post_norm=True))
        theirs = QARepVGGBlock(4, 4, average=True).double()
        theirs.load_state_dict(
            {k.replace('branch_3x3', 'branch_kxk'): t for k, t in ours.state_dict().items()}
        )
        assert_same(theirs(X), ours(X))

    def test_names(self):
        block = BranchBlock(
            4,
            4,
            (5, 7),
            branches=(
                *('kxk', '1x1', '1x1', '5x1', 'avg', 'identity', 'identity'),
                *(dict(kernel_size=3, dilation=2), dict(kernel_size=3, dilation=(1, 2))),
            ),
        )
        assert list(block.branches()) == [
            f'branch_{label}'
            for label in (
                *('5x7', '1x1', '1x1_2', '5x1', 'avg', 'identity', 'identity_2'),
                *('3x3_d2', '3x3_d1x2'),
            )
        ]
        assert_deploy_equivalent(block.double(), X)

    def test_where_the_shape_changes(self):
        block = BranchBlock(4, 6, stride=2, branches=('kxk', 'avg', 'identity'))
        assert list(block.branches()) == ['branch_3x3']
        block = BranchBlock(4, 4, stride=2, branches=('kxk', 'avg', 'identity'))
        assert list(block.branches()) == ['branch_3x3', 'branch_avg']

    def test_dilation_is_in_taps(self):
        block = BranchBlock(
            4, 4, 5, dilation=3, branches=('kxk', dict(kernel_size=3, dilation=2))
        )
        assert block.get_submodule('branch_3x3_d2').conv.dilation == (6, 6)

    @pytest.mark.parametrize('kind', ['mmrep.RepVGGBlock', RepVGGBlock])
    def test_a_block(self, kind):
        block = BranchBlock(
            4,
            4,
            branches=('kxk', dict(type=kind, padding_mode='zeros')),
            norm_cfg=dict(type='BN', eps=0.3),
        ).double()
        inner = block.branch_RepVGGBlock
        assert inner.act is None and inner.branch_norm.eps == 0.3
        assert_deploy_equivalent(block, X)

    def test_from_conv_with_a_block(self):
        """All of its branches start at zero."""
        conv, norm = drawn(nn.Conv2d(4, 4, 3, padding=1)), drawn(nn.BatchNorm2d(4))
        branches = ('kxk', dict(type='mmrep.RepVGGBlock'), dict(type='mmrep.OREPABlock'))
        block = BranchBlock.from_conv(conv, norm, branches=branches).eval()
        assert_same(norm.eval()(conv(X)), block(X))

    @pytest.mark.parametrize(
        ('branches', 'message'),
        [
            ((), "branches is empty: give at least one, as branches=('kxk',)"),
            (('1x1', 'kxk'), "must have the block's own kernel size, as 'kxk', not '1x1'"),
            (('identity',), "the first branch must have the block's own kernel size"),
            (('kxk', 'dense'), "'dense' is not a valid branch: choose 'kxk', rows"),
            (('kxk', 3), '3 is not a valid branch: choose'),
            (
                ('kxk', dict(kernel_size=1, kernel=3)),
                'is not a valid branch: got an unexpected keyword argument',
            ),
            (('kxk', dict(norm=True)), "branch: missing a required argument: 'kern"),
            (('kxk', dict(type='avg', dilation=2)), 'is not a valid branch: got an'),
            (('kxk', '5x5'), 'does not fit into the middle'),
            (('kxk', dict(type='BN')), "'BN' is not a re-parameterizable block"),
            (('kxk', dict(type='Odd')), "'Odd' is not a re-parameterizable block"),
        ],
    )
    def test_refuses(self, branches, message):
        with pytest.raises(ValueError) as error:
            BranchBlock(4, 4, branches=branches)
        assert message in str(error.value)


def test_blocks_differ():
    """A check of the checks above: another kernel is another function."""
    block = drawn(OREPABlock(4, 4))
    before = block(X)
    with torch.no_grad():
        block.branch_prior.scale.weight.add_(1)
    assert_differ(before, block(X))
