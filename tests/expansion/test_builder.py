"""``type='mmrep.Expanded'`` in the configs of hosts."""

import copy
import pickle

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import ImageClassifier, ResNet
from mmseg.apis import init_model
from mmseg.models import FPN, EncoderDecoder
from tiny_projects import classifier_model, segmentor_model
from torch import nn

from mmrep.expansion import collapse
from mmrep.models.blocks import DiverseBranchBlock, ReparamBlock
from mmrep.reparam import branch_by_branch

DBB = dict(type='mmrep.DiverseBranchBlock')
RESNET = dict(type='ResNet', depth=18, base_channels=4, stem_channels=4)
X = image(1, 3, 32, 32, dtype=torch.float32)


def build(config: dict, scope: str = 'mmpretrain') -> nn.Module:
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    # mmpretrain's backbones return nothing.
    model.eval()
    return model


def expanded(config: dict, **expand) -> dict:
    """The config of a model with blocks in it."""
    expand = dict(of=config['type'], block=DBB, **expand)
    return dict(config, type='mmrep.Expanded', expand=expand)


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, ReparamBlock)]


@pytest.fixture
def plain() -> ImageClassifier:
    return randomise(build(classifier_model(RESNET, 32)))


class TestExpanded:
    def test_a_model(self, plain):
        model = build(expanded(classifier_model(RESNET, 32)))
        assert type(model) is ImageClassifier and type(model.backbone) is ResNet
        assert len(blocks_of(model)) == 16
        assert type(model.data_preprocessor) is type(plain.data_preprocessor)
        model.load_state_dict(plain.state_dict(), strict=True)
        with torch.no_grad(), branch_by_branch(model):
            expected = plain(X, mode='tensor')
            assert_same(expected, model(X, mode='tensor'), 1e-6)
        randomise(model, seed=1)
        with torch.no_grad(), branch_by_branch(model):
            expected = model(X, mode='tensor')
        collapse(model)
        plain.load_state_dict(model.state_dict(), strict=True)
        assert_same(expected, plain(X, mode='tensor'), 1e-5)

    def test_a_backbone(self, plain):
        model = build(classifier_model(expanded(RESNET), 32))
        assert type(model) is ImageClassifier and type(model.backbone) is ResNet
        assert len(blocks_of(model)) == 16
        model.load_state_dict(plain.state_dict(), strict=True)
        with torch.no_grad(), branch_by_branch(model):
            assert_same(plain(X, mode='tensor'), model(X, mode='tensor'), 1e-6)

    def test_a_neck(self):
        neck = dict(type='FPN', in_channels=[4, 8, 16], out_channels=4, num_outs=3)
        model = build(expanded(neck), 'mmseg')
        assert type(model) is FPN
        assert blocks_of(model) == [f'fpn_convs.{level}.conv' for level in range(3)]

    def test_a_head(self):
        config = segmentor_model(RESNET | dict(type='mmseg.ResNet', out_indices=(3,)), 32)
        head = expanded(config['decode_head'], shape=[(32, 8, 8)])
        model = build(dict(config, decode_head=head), 'mmseg')
        assert blocks_of(model) == ['decode_head.convs.0.conv']

    def test_choice(self):
        config = expanded(
            classifier_model(RESNET, 32),
            include='backbone.layer[12].*',
            exclude='*.conv2',
            kernel_sizes=[3],
            shape=(3, 32, 32),
        )
        names = blocks_of(build(config))
        assert names == [
            f'backbone.layer{stage}.{unit}.conv1' for stage in (1, 2) for unit in (0, 1)
        ]

    def test_size_and_channels_of_what_it_is_tried_with(self):
        seen = []

        class Net(nn.Conv2d):
            def forward(self, x):
                seen.append(tuple(x.shape))
                return super().forward(x)

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = Net(5, 4, 3)
                self.other = nn.Conv2d(4, 4, 3)

            def forward(self, x):
                return self.other(self.conv(x))

        build(dict(type='mmrep.Expanded', expand=dict(of=Outer, block=DBB)))
        assert set(seen) == {(1, 5, 224, 224)}
        seen.clear()
        expand = dict(of=Outer, block=DBB, shape=(5, 9, 7), include='other')
        build(dict(type='mmrep.Expanded', expand=expand))
        assert set(seen) == {(1, 5, 9, 7)}

    def test_one_seed_is_one_model(self):
        def build_from_seed() -> nn.Module:
            torch.manual_seed(3)
            return build(expanded(classifier_model(RESNET, 32)))

        one, other = build_from_seed().parameters(), build_from_seed().parameters()
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize(
        'copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    )
    def test_copies(self, copied):
        model = randomise(build(expanded(classifier_model(RESNET, 32))))
        again = copied(model)
        assert torch.equal(model(X, mode='tensor'), again(X, mode='tensor'))

    def test_weights_of_the_plain_model_by_init_cfg(self, plain, tmp_path):
        torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'a.pth')
        pretrained = dict(type='Pretrained', checkpoint=f'{tmp_path}/a.pth')
        whole = dict(classifier_model(RESNET, 32), init_cfg=pretrained)
        part = dict(RESNET, init_cfg=dict(pretrained, prefix='backbone.'))
        for config in (
            expanded(whole),
            expanded(classifier_model(part, 32)),
            classifier_model(expanded(part), 32),
        ):
            model = build(config)
            model.init_weights()
            model.head.load_state_dict(plain.head.state_dict())
            model.eval()
            with torch.no_grad(), branch_by_branch(model):
                assert_same(plain(X, mode='tensor'), model(X, mode='tensor'), 1e-6)

    def test_mmseg_finds_what_it_looks_for(self, tmp_path):
        config = segmentor_model(RESNET | dict(type='mmseg.ResNet', out_indices=(3,)), 32)
        pretrained = dict(type='Pretrained', checkpoint='nowhere.pth')
        config['backbone']['init_cfg'] = pretrained
        cfg = Config(dict(model=expanded(config), default_scope='mmseg', test_pipeline=[]))
        model = init_model(cfg, device='cpu')
        assert type(model) is EncoderDecoder and blocks_of(model)


FRESH = {
    'model': expanded(classifier_model(RESNET, 32)),
    'backbone': classifier_model(expanded(RESNET), 32),
    'conv layers': classifier_model(
        dict(RESNET, conv_cfg=dict(type='mmrep.DBBConv2d')), 32
    ),
    'MobileNetV2': expanded(
        classifier_model(dict(type='MobileNetV2', widen_factor=0.25), 1280)
    ),
}


class TestFreshWeights:
    """The host's initializers mean its own convs and norms."""

    @pytest.mark.parametrize('name', FRESH)
    def test_start_as_the_plain_network(self, name):
        model = build(FRESH[name])
        model.init_weights()
        blocks = [m for m in model.modules() if isinstance(m, ReparamBlock)]
        assert len(blocks) >= 16
        for block in blocks:
            _, *others = block.branch_kernels().values()
            assert others and not any(kernel.any() for kernel in others)
        main = [block.main_conv.weight.std() for block in blocks]
        assert len(set(main)) == len(blocks), 'the host has initialized them'

    def test_residual_blocks_start_as_their_shortcuts(self):
        model = build(FRESH['model'])
        model.init_weights()
        for unit in model.backbone.layer1:
            assert not unit.conv2.equivalent_kernel_bias()[0].any()
            assert unit.conv1.equivalent_kernel_bias()[0].any()

    def test_what_is_trained_is_initialized_as_any_other(self):
        block = randomise(build(FRESH['model'])).backbone.layer1[0].conv1
        visited = []

        def initialize(module: nn.Module) -> None:
            visited.append(module)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 2)

        assert block.apply(initialize) is block
        assert set(visited) == set(block.modules())
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 6 and all((norm.weight == 2).all() for norm in norms)

    def test_a_block_of_a_body_is_initialized_as_any_other(self):
        block = DiverseBranchBlock(4, 4, 3)
        block.apply(lambda m: isinstance(m, nn.Conv2d) and nn.init.constant_(m.weight, 0))
        block.apply(lambda m: isinstance(m, nn.Conv2d) and nn.init.constant_(m.weight, 1))
        assert all(kernel.any() for kernel in block.branch_kernels().values())


class TestWrongInput:
    @pytest.mark.parametrize(
        'expand, error, message',
        [
            (dict(block=DBB), TypeError, "expand has no 'of': give the type"),
            (dict(of='ResNet'), TypeError, "expand has no 'block': give the type"),
            (dict(of='ResNet', block=DBB, kernels=3), TypeError, "no key 'kernels'"),
            (dict(of='ResNet', block=DBB, dry_run=True), TypeError, "no key 'dry_run'"),
            (dict(of='ResNet', block=dict(type='BN')), TypeError, "'BN' is not a re-para"),
            (dict(of='Resnet', block=DBB), KeyError, 'Resnet is not in the'),
            (
                dict(of='ResNet', block=DBB, include='stage*'),
                ValueError,
                r"'stage\*' matches no conv",
            ),
            (
                dict(of='ResNet', block=DBB, shape=(4, 32, 32)),
                ValueError,
                r'ResNet does not take an input of shape \(4, 32, 32\) .* fitting shape',
            ),
        ],
    )
    def test_is_refused(self, expand, error, message):
        config = {**RESNET, 'type': 'mmrep.Expanded', 'expand': expand}
        with pytest.raises(error, match=message):
            build(config)


def test_the_block_may_have_options():
    config = expanded(RESNET)
    config['expand']['block'] = dict(DBB, branches=('kxk', 'avg'))
    model = build(config)
    block = model.layer1[0].conv1
    assert type(block) is DiverseBranchBlock
    assert block.branch_names == ('branch_kxk', 'branch_avg')
