"""``configs/expanded``: networks of the hosts with blocks, and their plain forms."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict

from mmrep.deployment import build_model, deploy_config, read_config, without_pretrained
from mmrep.models.blocks import ReparamBlock

FOLDER = Path(__file__).parents[1] / 'configs' / 'expanded'
PLAIN = 'resnet18-tiny_1xb64_digits'
#: How many blocks each has: the 3x3 convs, counted by hand in the papers' tables.
BLOCKS = {
    'expanded-resnet18-tiny_1xb64_digits': 16,
    'dbbconv-resnet18-tiny_1xb64_digits': 16,
    'expanded-resnet50_8xb32_in1k': 16,
    'expanded-mobilenet-v2_8xb32_in1k': 18,
    'expanded-hrnet-w18_4xb32_in1k': 272,
    'expanded-r50-d8_pspnet_4xb2-80k_cityscapes-512x1024': 1,
    'expanded-r50-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024': 6,
    'expanded-r50_upernet_4xb2-80k_cityscapes-512x1024': 5,
    'expanded-retinanet_r50_fpn_1x_coco': 16,
    'expanded-faster-rcnn_r50_fpn_1x_coco': 16,
}
#: Those that take long to build.
LONG = {n for n in BLOCKS if re.search('hrnet|cityscapes|faster-rcnn|mobilenet', n)}


def base_of(name: str) -> ConfigDict:
    """The model of the config that a config inherits from."""
    (base,) = Config._get_base_files(str(FOLDER / f'{name}.py'))
    own = FOLDER / base
    if own.exists():
        return Config.fromfile(own).model
    return Config.fromstring(f'_base_ = {base!r}', '.py').model


def test_all_are_listed():
    assert {path.stem for path in FOLDER.glob('*.py')} == {PLAIN, *BLOCKS}


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in BLOCKS]
)
def test_a_host_s_model_with_blocks(name):
    if name.endswith('_coco'):
        pytest.importorskip('mmdet')
    config = read_config(FOLDER / f'{name}.py')
    model = build_model(config)
    assert not type(model).__module__.startswith('mmrep')
    assert sum(isinstance(m, ReparamBlock) for m in model.modules()) == BLOCKS[name]

    plain, base = deploy_config(config), without_pretrained(base_of(name))
    assert 'mmrep' not in plain.pretty_text
    if name.startswith('dbbconv'):
        assert plain.model.backbone.pop('conv_cfg') is None
    assert plain.model == base


def test_the_plain_network_of_the_digits():
    model = build_model(read_config(FOLDER / f'{PLAIN}.py'))
    assert not any(isinstance(m, ReparamBlock) for m in model.modules())
