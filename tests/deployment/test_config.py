import copy
import importlib.util
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from tiny_projects import HEIGHT, WIDTH, classifier_model, segmentor_model
from torch import nn

from mmrep.deployment import (
    build_model,
    deploy_argument,
    deploy_config,
    enter_scope,
    input_shape,
    model_nodes,
    read_config,
    without_pretrained,
)
from mmrep.deployment.config import unknown_type
from mmrep.errors import ConfigError
from mmrep.models.backbones import RepVGG

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class TestReadConfig:
    def test_options_and_scope(self, tmp_path):
        init_default_scope('mmseg')
        path = write(
            tmp_path / 'a.py',
            "default_scope = 'mmpretrain'\nmodel = dict(type='A', a=dict(b=1))",
        )
        cfg = read_config(path, {'model.a.b': 2, 'more': 3})
        assert cfg.model.a.b == 2
        assert cfg.more == 3
        assert DefaultScope.get_current_instance().scope_name == 'mmpretrain'

    def test_no_scope_is_that_of_mmengine(self, tmp_path):
        init_default_scope('mmseg')
        read_config(write(tmp_path / 'a.py', "model = dict(type='A')"))
        assert DefaultScope.get_current_instance().scope_name == 'mmengine'

    @pytest.mark.parametrize('name', ['repvgg-a0_8xb32_in1k', 'repvgg-tiny_1xb64_digits'])
    def test_a_base_of_mmrep(self, tmp_path, name):
        """From anywhere, and the names are in the host's scope."""
        pytest.importorskip('mmpretrain')
        path = write(
            tmp_path / 'a.py',
            f"_base_ = 'mmrep::repvgg/{name}.py'\nmodel = dict(head=dict(num_classes=4))",
        )
        cfg = read_config(path)
        shipped = read_config(CONFIGS / 'repvgg' / f'{name}.py')
        shipped.model.head.num_classes = 4
        assert cfg.to_dict() == shipped.to_dict()
        assert build_model(cfg).head.fc.out_features == 4

    def test_other_scopes_are_left(self, tmp_path):
        text = "model = dict(type='A', _scope_='mmseg', a=[dict(_scope_='mmrep', b=1)])"
        cfg = read_config(write(tmp_path / 'a.py', text))
        assert cfg.model == dict(type='A', _scope_='mmseg', a=[dict(b=1)])

    @pytest.mark.parametrize(
        ('text', 'message'),
        [
            ('model = dict(', r'SyntaxError: .* was never closed'),
            ("model = open('/no/such/file')", 'FileNotFoundError'),
            ("_base_ = './no.py'", r'no\.py'),
            ('data = 1', r'has no model=dict\(\.\.\.\)'),
            ("model = 'A'", r'has no model=dict\(\.\.\.\)'),
            ("custom_imports = dict(imports='no_such_package')", 'no_such_package'),
            (
                "default_scope = 'mmnothing'\nmodel = dict(type='A')",
                'needs mmnothing, which is not installed: pip install mmnothing$',
            ),
        ],
    )
    def test_wrong_text(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message) as info:
            read_config(write(tmp_path / 'a.py', text))
        assert '\n' not in str(info.value)

    def test_wrong_path(self, tmp_path):
        with pytest.raises(ConfigError, match=r'no\.py does not exist'):
            read_config(tmp_path / 'no.py')
        with pytest.raises(ConfigError, match='is a folder'):
            read_config(tmp_path)

    def test_wrong_options(self, tmp_path):
        path = write(tmp_path / 'a.py', "model = [dict(type='A')]")
        with pytest.raises(ConfigError, match=r'--cfg-options do not fit config .*a\.py'):
            read_config(path, {'model.3.type': 'B'})

    @pytest.mark.parametrize('host', ['mmpretrain', 'mmseg'])
    def test_absent_host(self, monkeypatch, host):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name: None if name == host else found(name)
        )
        extra = host.removeprefix('mm')
        with pytest.raises(ConfigError, match=rf"needs {host}.*'mmrep\[{extra}\]'"):
            enter_scope(Config(dict(default_scope=host)))


def test_model_nodes():
    inner, outer = dict(type='B'), dict(type='A')
    cfg = dict(outer, parts=[dict(type='C'), (dict(a=inner),)], type_='D')
    assert [node['type'] for node in model_nodes(cfg)] == ['A', 'C', 'B']


class Unswitched:
    """Has a deploy form, but no way to it."""

    def __init__(self, deploy: bool = False) -> None: ...


class Unbuildable:
    """Has a way to its deploy form, but cannot be built in it."""

    def __init__(self, width: int) -> None: ...

    def switch_to_deploy(self) -> None: ...


class Closed(RepVGG):
    """Does not pass on the argument of its base."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)


@pytest.mark.parametrize(
    ('kind', 'argument'),
    [
        ('mmrep.RepVGG', 'deploy'),
        ('mmrep.RepVGGBlock', 'deploy'),
        ('mmrep.DiverseBranchBlock', 'deploy'),
        ('mmrep.DBBResNet', 'deploy'),
        ('mmrep.DBBResNetV1c', 'deploy'),  # by **kwargs
        ('mmrep.models.backbones.RepVGG', 'deploy'),
        (RepVGG, 'deploy'),
        (Unswitched, None),
        ('mmpretrain.RepVGG', 'deploy'),
        ('mmpretrain.MobileOne', 'deploy'),
        ('RepVGG', 'deploy'),
        ('LeViT', 'deploy'),
        ('RepLKNet', 'small_kernel_merged'),
        ('ResNet', None),
        ('ImageClassifier', None),
        ('BN', None),
        ('Pretrained', None),
        ('mmrep.NoSuchThing', None),
        ('NoSuchThing', None),
    ],
)
def test_deploy_argument(kind, argument):
    init_default_scope('mmpretrain')
    assert deploy_argument(dict(type=kind)) == argument


@pytest.mark.parametrize('kind', [Unbuildable, Closed])
def test_no_deploy_argument(kind):
    assert deploy_argument(dict(type=kind)) is None
    deployed = deploy_config(Config(dict(model=dict(type=kind))))
    assert deployed.model == dict(type='mmrep.Deployed', of=kind)


@pytest.mark.parametrize(
    ('cfg', 'words'),
    [
        (classifier_model(), ''),
        (dict(type=RepVGG, norm_cfg=dict(type='BN')), ''),
        (
            dict(optimizer=dict(type='SGD'), hooks=[dict(type='mmrep.SwitchToDeployHook')]),
            '',
        ),
        (dict(type='mmengine.model.BaseModel', act_cfg=dict(type='ReLU')), ''),
        (dict(type=5), ''),
        (dict(type='No'), "type='No' is unknown to mmpretrain"),
        (dict(type='no.such.Thing'), "type='no.such.Thing' is unknown to mmpretrain"),
        (
            dict(type='ResNet', parts=[dict(type='BN'), dict(a=dict(type='N\nO'))]),
            r"parts.1.a.type='N\nO' is unknown to mmpretrain",
        ),
    ],
)
def test_unknown_type(cfg, words):
    init_default_scope('mmpretrain')
    MODELS.build(dict(type='ResNet', depth=18))
    assert unknown_type(cfg) == words


def test_without_pretrained():
    init = dict(type='Pretrained', checkpoint='http://nowhere/a.pth')
    scales = dict(type='mmrep.SearchedScales', scales='nowhere.pth')
    model = Config(
        dict(
            model=dict(
                type='A',
                pretrained='torchvision://a',
                init_cfg=init,
                backbone=dict(
                    type='B', init_cfg=[dict(type='Constant', val=1), init, scales]
                ),
                neck=dict(type='C', init_cfg=dict(type='Normal')),
                heads=[dict(type='D', pretrained='b.pth')],
            )
        )
    ).model
    before = copy.deepcopy(model)
    assert without_pretrained(model) == dict(
        type='A',
        pretrained=None,
        init_cfg=None,
        backbone=dict(type='B', init_cfg=[dict(type='Constant', val=1)]),
        neck=dict(type='C', init_cfg=dict(type='Normal')),
        heads=[dict(type='D', pretrained=None)],
    )
    assert model == before


@pytest.mark.parametrize('entry', [3, 'Pretrained', None, [1]])
def test_without_pretrained_leaves_what_is_no_dict(entry):
    """It is for mmengine to refuse."""
    init = [entry, dict(type='Pretrained', checkpoint='a.pth')]
    model = Config(dict(model=dict(type='A', backbone=dict(type='B', init_cfg=init)))).model
    assert without_pretrained(model).backbone.init_cfg == [entry]


class TestDeployConfig:
    def test_backbone_of_a_segmentor(self):
        enter_scope(Config(dict(default_scope='mmseg')))
        cfg = Config(
            dict(
                default_scope='mmseg',
                model=segmentor_model(),
                load_from='epoch_1.pth',
                resume=True,
                train_cfg=dict(max_iters=1),
            )
        )
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='a.pth')
        before = copy.deepcopy(cfg).to_dict()
        deployed = deploy_config(cfg)
        assert cfg.to_dict() == before
        expected = copy.deepcopy(before)
        expected['model']['backbone'].update(deploy=True, init_cfg=None)
        expected.update(load_from=None, resume=False)
        assert deployed.to_dict() == expected

    def test_several_nodes_and_nested_ones(self):
        init_default_scope('mmseg')
        model = segmentor_model(dict(type='mmrep.DBBResNetV1c', depth=18))
        model['auxiliary_head'] = [dict(type='FCNHead', norm=dict(type='BN'))]
        model['neck'] = dict(type='A', parts=[dict(type='mmrep.RepVGGBlock', deploy=False)])
        deployed = deploy_config(Config(dict(model=model))).model
        assert deployed.backbone.deploy is True
        assert deployed.neck.parts[0].deploy is True
        assert 'deploy' not in deployed.auxiliary_head[0]
        assert 'deploy' not in deployed.decode_head

    @pytest.mark.parametrize('backbone', ['mmpretrain.RepVGG', 'RepVGG'])
    def test_backbone_of_the_host(self, backbone):
        init_default_scope('mmpretrain')
        cfg = Config(dict(model=classifier_model(dict(type=backbone, arch='A0'), 1280)))
        deployed = deploy_config(cfg)
        assert deployed.model.backbone == dict(type=backbone, arch='A0', deploy=True)
        assert hasattr(build_model(deployed).backbone.stem, 'branch_reparam')

    def test_no_argument(self):
        """Where only what is built can tell what there is, it is switched then."""
        init_default_scope('mmpretrain')
        model = classifier_model(dict(type='TIMMBackbone', model_name='repvgg_a0'), 1280)
        deployed = deploy_config(Config(dict(model=model)))
        assert deployed.model == dict(model, type='mmrep.Deployed', of='ImageClassifier')
        convs = [m for m in build_model(deployed).modules() if isinstance(m, nn.Conv2d)]
        assert len(convs) == 22

    def test_nothing_to_deploy(self):
        init_default_scope('mmpretrain')
        cfg = Config(dict(model=classifier_model(dict(type='No'))))
        says = r"model\.backbone\.type='No' is unknown to mmpretrain"
        with pytest.raises(ConfigError, match=says):
            deploy_config(cfg)
        cfg = deploy_config(
            Config(dict(model=classifier_model(dict(type='ResNet', depth=18))))
        )
        with pytest.raises(ConfigError, match='ImageClassifier has no block that can be'):
            build_model(cfg)

    def test_imported_types(self, tmp_path):
        """The new style of configs: types are classes that the config imports."""
        path = write(
            tmp_path / 'lazy.py',
            'from mmpretrain.models import ImageClassifier\n'
            'from torch.nn import BatchNorm2d\n'
            'from mmrep.models.backbones import RepVGG\n'
            "default_scope = 'mmpretrain'\n"
            'norm = dict(type=BatchNorm2d)\n'
            "backbone = dict(type=RepVGG, arch='A0', norm_cfg=norm)\n"
            'model = dict(type=ImageClassifier, backbone=backbone)\n',
        )
        text = deploy_config(read_config(path)).pretty_text
        deployed = Config.fromstring(text, '.py')
        assert deployed.model.backbone.deploy is True
        assert hasattr(build_model(deployed).backbone.stem, 'branch_reparam')

    def test_imported_types_of_blocks(self, tmp_path):
        """The host's classes stay, and no word of mmrep."""
        path = write(
            tmp_path / 'lazy.py',
            'from mmpretrain.models import ImageClassifier, ResNet\n'
            'from mmrep.engine import SwitchToDeployHook\n'
            'from mmrep.expansion import build_expanded\n'
            'from mmrep.expansion.conv_layers import build_dbb_conv\n'
            'from mmrep.models.blocks import DiverseBranchBlock\n'
            "default_scope = 'mmpretrain'\n"
            "custom_hooks = [dict(type=SwitchToDeployHook), dict(type='EMAHook')]\n"
            'expand = dict(of=ImageClassifier, block=dict(type=DiverseBranchBlock))\n'
            'conv_cfg = dict(type=build_dbb_conv)\n'
            'stages = (dict(conv_cfg=conv_cfg), dict(conv_cfg=None))\n'
            'backbone = dict(type=ResNet, depth=18, conv_cfg=conv_cfg)\n'
            'model = dict(\n'
            '    type=build_expanded, expand=expand, backbone=backbone, stages=stages)\n'
            'del expand, conv_cfg, stages, backbone\n',
        )
        cfg = read_config(path)
        text = deploy_config(cfg).pretty_text
        assert 'mmrep' not in text
        deployed = Config.fromstring(text, '.py')
        assert deployed.custom_hooks == [dict(type='EMAHook')]
        assert deployed.model.pop('stages') == (dict(conv_cfg=None), dict(conv_cfg=None))
        assert type(build_model(deployed).backbone).__name__ == 'ResNet'
        assert cfg.model.stages[0].conv_cfg, 'the config that was given is as it was'

    def test_custom_imports(self, tmp_path, monkeypatch):
        """They register what the deploy config needs, too."""
        monkeypatch.syspath_prepend(tmp_path)
        write(
            tmp_path / 'project_with_a_body.py',
            'from mmengine.registry import MODELS\n'
            'from mmrep.models.backbones import RepVGG\n'
            '@MODELS.register_module()\n'
            'class ProjectBody(RepVGG):\n'
            "    def __init__(self, **kwargs): super().__init__(arch='A0', **kwargs)\n",
        )
        path = write(
            tmp_path / 'a.py',
            "custom_imports = dict(imports=['project_with_a_body'])\n"
            "model = dict(type='ProjectBody')",
        )
        try:
            text = deploy_config(read_config(path)).pretty_text
            del sys.modules['project_with_a_body']
            MODELS._module_dict.pop('ProjectBody')
            deployed = build_model(Config.fromstring(text, '.py'))
            assert hasattr(deployed.stem, 'branch_reparam')
        finally:
            MODELS._module_dict.pop('ProjectBody', None)


def pipeline(*steps: dict) -> dict:
    return dict(test_dataloader=dict(dataset=dict(type='A', pipeline=list(steps))))


CROP = dict(type='CenterCrop', crop_size=7)


@pytest.mark.parametrize(
    ('entries', 'shape'),
    [
        (dict(), (3, 224, 224)),
        (dict(test_dataloader=None), (3, 224, 224)),
        (pipeline(dict(type='LoadImageFromFile')), (3, 224, 224)),
        (pipeline(dict(type='ResizeEdge', scale=9), CROP, dict(type='B')), (3, 7, 7)),
        (pipeline(CROP, dict(type='Resize', scale=9)), (3, 9, 9)),
        # mmcv's transforms give the width first.
        (pipeline(dict(type='Resize', scale=(9, 5))), (3, 5, 9)),
        (pipeline(dict(type='CenterCrop', crop_size=(9, 5))), (3, 5, 9)),
        (pipeline(dict(type='Pad', size=(9, 5))), (3, 5, 9)),
        (pipeline(dict(type='Resize', img_scale=[9, 5])), (3, 5, 9)),
        (pipeline(CROP, dict(type='Resize', scale=None)), (3, 7, 7)),
        (pipeline(dict(type='Resize', scale=[(9, 5), (7, 3)])), (3, 224, 224)),
        (pipeline(dict(type='Resize', scale=(0.5, 2.0))), (3, 224, 224)),
        (
            dict(
                test_dataloader=dict(dataset=dict(type='A', dataset=dict(pipeline=[CROP])))
            ),
            (3, 7, 7),
        ),
        # A data preprocessor gives the height first.
        (dict(model=segmentor_model()), (3, HEIGHT, WIDTH)),
        (dict(pipeline(CROP), model=segmentor_model()), (3, HEIGHT, WIDTH)),
        (dict(model=dict(data_preprocessor=dict(size=8))), (3, 8, 8)),
        (dict(model=dict(backbone=dict(in_channels=1))), (1, 224, 224)),
        (dict(model=dict(backbone=None, data_preprocessor=None)), (3, 224, 224)),
    ],
    ids=str,
)
def test_input_shape(entries, shape):
    assert input_shape(Config({'model': dict(type='A'), **entries})) == shape
