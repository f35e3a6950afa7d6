import pytest
import torch
from import_laws import assert_imports
from laws import image, randomise

byobnet = pytest.importorskip('timm.models.byobnet')
model_utils = pytest.importorskip('timm.utils.model')

FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['train', 'deploy'])
ARCH = dict(num_blocks=(1, 3, 1, 2), width_factor=(0.25, 0.25, 0.125, 0.125))


def tiny(groups=0, **attention):
    """timm's network of these blocks; ``groups`` is the number of channels of a group."""
    widths = [int(64 * 2**i * factor) for i, factor in enumerate(ARCH['width_factor'])]
    blocks = tuple(
        byobnet.ByoBlockCfg(type='rep', d=count, c=width, s=2, gs=groups)
        for count, width in zip(ARCH['num_blocks'], widths, strict=True)
    )
    config = byobnet.ByoModelCfg(blocks=blocks, stem_type='rep', stem_chs=16, **attention)
    return byobnet.ByobNet(config, num_classes=10)


@FORMS
@pytest.mark.parametrize(
    ('build', 'arch'),
    [
        (byobnet.repvgg_a0, 'A0'),
        (tiny, ARCH),
        (
            lambda: tiny(attn_layer='se', attn_kwargs=dict(rd_ratio=1 / 8, rd_divisor=1)),
            dict(ARCH, se_cfg=dict(ratio=8, divisor=1)),
        ),
        (
            lambda: tiny(groups=8),
            dict(ARCH, group_layer_map={1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 4, 7: 8}),
        ),
    ],
    ids=['A0', 'own', 'se', 'groups'],
)
def test_timm(build, arch, deploy, tmp_path):
    model = randomise(build()).eval()
    if deploy:
        model = model_utils.reparameterize_model(model)
    x = image(2, 3, 32, 32, dtype=torch.float32)
    done = assert_imports(model, model.state_dict(), x, tmp_path, 'timm')
    assert done.backbone['arch'] == arch
    assert done.backbone.get('deploy', False) == deploy
    assert done.used == len(model.state_dict())
