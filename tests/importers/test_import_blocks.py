"""Networks of the other blocks: ACNet, OREPA, QARepVGG, RepOpt-VGG."""

import pytest
import torch
from import_laws import assert_imports, backbone_of, import_weights
from laws import image, randomise
from official_acnet import ACB, StagewiseResNet
from official_dbb_networks import ResNet
from official_orepa import OREPA, OREPA1x1, OREPALarge, OREPARepVGGBlock
from official_repopt import PlainBlock, QARepVGGBlock, SearchBlock
from official_repvgg import RepVGG
from torch import nn

from mmrep.benchmark import peak_memory
from mmrep.engine.searched_scales import read_scales
from mmrep.errors import CheckpointError
from mmrep.models.backbones import RepOptVGG

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
DEPTHS = {18: dict(num_blocks=(2, 2, 2, 2)), 50: dict(num_blocks=(3, 4, 6, 3))}
OREPA_UNITS = dict(unit=OREPA, pointwise=OREPA1x1, stem=OREPALarge)
TINY = dict(num_blocks=(1, 3, 2, 1), widths=(16, 24, 32, 64))
TINY_ARCH = dict(num_blocks=(1, 3, 2, 1), width_factor=(0.25, 0.1875, 0.125, 0.125))


def x():
    return image(2, 3, 64, 64, dtype=torch.float32)


def resnet(depth, **options) -> nn.Module:
    model = ResNet(**DEPTHS[depth], bottleneck=depth == 50, width=8, **options)
    return randomise(model).eval()


def reparam_resnet(depth, block, **options) -> dict:
    """What the backbone's config must be."""
    return dict(
        type='mmrep.ReparamResNet',
        depth=depth,
        out_indices=(3,),
        style='pytorch',
        zero_init_residual=False,
        stem_channels=8,
        base_channels=8,
        block_cfg=dict(type=f'mmrep.{block}'),
        **options,
    )


@FORMS
@pytest.mark.parametrize('depth', DEPTHS)
def test_acnet_in_the_project_of_dbb(depth, deploy, tmp_path):
    model = resnet(depth, unit=ACB, deploy=deploy)
    done = assert_imports(model, model.state_dict(), x(), tmp_path, 'acnet')
    form = dict(deploy=True) if deploy else {}
    assert done.backbone == reparam_resnet(depth, 'AsymmetricConvBlock', **form)
    assert done.used == len(model.state_dict()) and not done.left_out


def test_acnet_in_its_own_project(tmp_path):
    model = randomise(StagewiseResNet(**DEPTHS[50], width=8)).eval()
    weights = dict(model=model.state_dict(), optimizer={}, iteration=7)
    done = assert_imports(model, weights, x(), tmp_path, 'acnet')
    expected = reparam_resnet(50, 'AsymmetricConvBlock', reparam_kernels=(3, 5, 7))
    assert done.backbone == expected
    assert done.used == len(model.state_dict())


@FORMS
@pytest.mark.parametrize('depth', DEPTHS)
def test_orepa(depth, deploy, tmp_path):
    model = resnet(depth, deploy=deploy, **OREPA_UNITS)
    state = model.state_dict()
    # As its training script saves it.
    weights = {f'module.{key}': value for key, value in state.items()}
    optimizer = dict(state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=[])
    weights = dict(epoch=120, state_dict=weights, optimizer=optimizer)
    done = assert_imports(model, weights, x(), tmp_path, 'orepa')
    form = dict(deploy=True) if deploy else {}
    assert done.backbone == reparam_resnet(depth, 'OREPABlock', **form)
    # Of 16 blocks and of the three in the stem.
    constants = 0 if deploy else 3 * (16 + 3)
    assert done.left_out == ({'constants of its blocks': constants} if constants else {})
    assert done.used == len(state) - constants


def test_acnet_with_norms_in_deploy_form_is_refused(tmp_path):
    state = StagewiseResNet(**DEPTHS[50], width=8, deploy=True).state_dict()
    with pytest.raises(
        CheckpointError, match='fused and its other convs are not: give the'
    ):
        import_weights(state, tmp_path)


def test_what_a_stem_lacks_is_named(tmp_path):
    state = resnet(18, **OREPA_UNITS).state_dict()
    del state['stage0.conv1.weight2.weight_orepa_pfir_conv']
    with pytest.raises(CheckpointError, match=r'branch_prior.conv.weight of the stem'):
        import_weights(state, tmp_path)


@pytest.mark.parametrize(
    'shapes',
    [
        {
            'stage1.0.conv1.weight_or1x1_origin': (1000, 1000, 1, 1),
            'stage1.0.conv1.weight_or1x1_l2i_conv1': (1, 1000, 50, 1),
            'stage1.0.conv1.weight_or1x1_l2i_conv2': (1000, 1, 50, 1),
            'stage1.0.conv1.vector': (2, 1000),
        },
        {'stage2.0.conv2.id_tensor': (10000, 1, 1, 1)},
        {'stage0.conv1.weight0.weight_orepa_origin': (8, 10000, 1, 1)},
        {'stage1.0.conv2.weight_orepa_origin': (10000, 1, 3, 3)},
    ],
    ids=lambda shapes: next(iter(shapes)),
)
def test_small_files_stay_small(shapes, tmp_path):
    """Weights of which a product, or the network, would be large."""
    state = resnet(50, **OREPA_UNITS).state_dict()
    state |= {key: torch.zeros(shape) for key, shape in shapes.items()}

    def refused() -> None:
        with pytest.raises(CheckpointError):
            import_weights(state, tmp_path)

    assert peak_memory(refused) < 100 * 2**20


def test_orepa_learns_on_as_its_own(tmp_path):
    """Every branch is there, not their sum alone."""
    model = resnet(18, **OREPA_UNITS)
    done = import_weights(model.state_dict(), tmp_path)
    theirs, ours = model.stage2[0].conv1, backbone_of(done.out).layer2[0].conv1
    assert torch.equal(ours.branch_kxk.conv.weight, theirs.weight_orepa_origin)
    assert torch.equal(ours.branch_1x1.conv.weight, theirs.weight_orepa_1x1)
    assert torch.equal(ours.branch_separable.scale.weight, theirs.vector[5])
    assert torch.equal(ours.post_norm.running_var, theirs.bn.running_var)


@pytest.mark.parametrize(
    ('key', 'change'),
    [
        ('stage0.conv1.weight1.weight_orepa_gconv_pw', None),
        ('stage0.conv1.weight2.weight_orepa_origin', (8, 7, 3, 3)),
        ('stage1.0.conv1.weight_or1x1_l2i_conv2', (8, 9, 1, 1)),
        ('stage1.0.conv1.weight_or1x1_l2i_conv1', None),
        ('stage1.0.conv1.vector', (3, 8)),
        ('stage1.0.conv2.vector', (5, 8)),
        ('stage1.0.conv2.vector', (7, 8)),
        ('stage1.0.conv2.weight_or1x1_origin', (8, 8, 1, 1)),
        ('stage1.0.conv1.weight_or1x1_l2i_conv2', (8, 8, 2, 1)),
        ('stage1.0.conv2.weight_orepa_prior', (8, 3, 3)),
    ],
)
def test_orepa_that_is_not_whole_is_refused(key, change, tmp_path):
    state = resnet(50, **OREPA_UNITS).state_dict()
    if change is None:
        del state[key]
    else:
        state[key] = torch.randn(change)
    with pytest.raises(CheckpointError, match='give a whole and unchanged checkpoint'):
        import_weights(state, tmp_path)


@pytest.mark.parametrize(
    'name', ['id_tensor', 'weight_orepa_prior', 'weight_orepa_avg_avg']
)
@pytest.mark.parametrize('block', ['stage0.conv1.weight1', 'stage3.0.conv2'])
def test_orepa_of_other_constants_is_refused(block, name, tmp_path):
    state = resnet(18, **OREPA_UNITS).state_dict()
    state[f'{block}.{name}'] += 0.01
    with pytest.raises(CheckpointError, match=rf'{block}.{name} is not the constant'):
        import_weights(state, tmp_path)


BLOCKS = {
    'orepa-repvgg': (OREPARepVGGBlock, 'RepVGG', 'OREPARepVGGBlock'),
    'qarepvgg': (QARepVGGBlock, 'RepVGG', 'QARepVGGBlock'),
    'repopt': (PlainBlock, 'RepOptVGG', None),
    'repopt-search': (SearchBlock, 'RepOptVGG', 'ScaleSumBlock'),
}


@pytest.mark.parametrize('groups', [None, {2: 2, 4: 4}], ids=['dense', 'groups'])
@pytest.mark.parametrize('layout', BLOCKS)
def test_repvgg_of_other_blocks(layout, groups, tmp_path):
    block, kind, name = BLOCKS[layout]
    if groups and layout == 'orepa-repvgg':
        pytest.skip('its code has no groups')
    model = randomise(RepVGG(**TINY, groups=groups, block=block)).eval()
    done = assert_imports(model, dict(model=model.state_dict()), x(), tmp_path, layout)
    arch = TINY_ARCH if groups is None else TINY_ARCH | dict(group_layer_map=groups)
    expected = dict(type=f'mmrep.{kind}', arch=arch, out_indices=(3,))
    if name:
        expected['block_cfg'] = dict(type=f'mmrep.{name}')
    assert done.backbone == expected
    constants = 3 * (1 + sum(TINY['num_blocks'])) if layout == 'orepa-repvgg' else 0
    assert done.left_out == ({'constants of its blocks': constants} if constants else {})
    assert done.used == len(model.state_dict()) - constants


def test_names_of_repopt_vgg(tmp_path):
    with torch.device('meta'):
        model = RepVGG((8, 14, 24, 1), (128, 256, 512, 2048), block=PlainBlock)
    state = {
        key: torch.zeros(()).expand(value.shape) if value.dim() else torch.tensor(0)
        for key, value in model.state_dict().items()
    }
    from mmrep.importers.repopt import REPOPT

    renamed = REPOPT.rename(state, 'here').state
    own = {key.removeprefix('backbone.'): value for key, value in renamed.items()}
    assert REPOPT.family(own, REPOPT, None)['arch'] == 'L1'
    assert RepOptVGG.arch_settings['L1']['num_blocks'] == (8, 14, 24, 1)


def test_scales_of_a_search_elsewhere(tmp_path):
    """What the authors' search found is what ours would have left."""
    model = randomise(RepVGG(**TINY, block=SearchBlock))
    done = import_weights(model.state_dict(), tmp_path)
    scales = read_scales(done.out)
    assert len(scales) == 1 + sum(TINY['num_blocks'])
    found = scales['backbone.stage_2.1']
    block = model.stage2[1]
    assert torch.equal(found['branch_identity'], block.scale_identity.weight)
    assert torch.equal(found['branch_1x1'], block.scale_1x1.weight)
    assert torch.equal(found['branch_kxk'], block.scale_conv.weight)
