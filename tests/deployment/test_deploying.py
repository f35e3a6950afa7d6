import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from tiny_projects import (
    DBB_RESNET,
    HEIGHT,
    ONE_SWITCH,
    REPVGG,
    WIDTH,
    classifier_model,
    segmentor_model,
)
from torch import nn

import mmrep
from mmrep.checkpoints import sha256_of
from mmrep.deployment import (
    VerificationError,
    build_model,
    deploy_checkpoint,
    enter_scope,
    export_onnx,
)
from mmrep.errors import CheckpointError, ConfigError, UserError
from mmrep.expansion import collapse
from mmrep.hosts import forward
from mmrep.models.backbones import RepVGG
from mmrep.reparam import branch_by_branch, fuse_conv_norm

HOST_REPVGG = dict(REPVGG, type='mmpretrain.RepVGG')
SE = dict(REPVGG['arch'], se_cfg=dict(ratio=4, divisor=1))

MODELS_BY_NAME = {
    'RepVGG classifier': ('mmpretrain', classifier_model()),
    'RepVGG segmentor': ('mmseg', segmentor_model()),
    'RepVGG with SE': ('mmpretrain', classifier_model(dict(REPVGG, arch=SE))),
    'DBB-ResNet classifier': ('mmpretrain', classifier_model(DBB_RESNET, 32)),
    'DBB-ResNet segmentor': (
        'mmseg',
        segmentor_model(
            dict(DBB_RESNET, type='mmrep.DBBResNetV1c', out_indices=(3,)), in_channels=32
        ),
    ),
    "mmpretrain's RepVGG": ('mmpretrain', classifier_model(HOST_REPVGG)),
    'MMSyncBN': (
        'mmseg',
        segmentor_model(dict(REPVGG, norm_cfg=dict(type='MMSyncBN', stats_mode='N'))),
    ),
    'one channel': ('mmpretrain', classifier_model(dict(REPVGG, in_channels=1))),
    'bare backbone': ('mmengine', dict(REPVGG, out_indices=(1, 3))),
}


DBB = dict(type='mmrep.DiverseBranchBlock')
RESNET = dict(type='ResNet', depth=18, base_channels=4, stem_channels=4)
SEGMENTOR = segmentor_model(dict(RESNET, type='ResNetV1c', out_indices=(3,)), 32)


def with_conv_cfg(conv_cfg: dict | None) -> dict:
    head = dict(SEGMENTOR['decode_head'], conv_cfg=conv_cfg)
    backbone = dict(SEGMENTOR['backbone'], conv_cfg=conv_cfg)
    return dict(SEGMENTOR, backbone=backbone, decode_head=head)


#: Blocks in models of hosts: the scope, the config, and that of the plain model.
EXPANDED = {
    'classifier': (
        'mmpretrain',
        dict(
            classifier_model(RESNET, 32),
            type='mmrep.Expanded',
            expand=dict(of='ImageClassifier', block=DBB),
        ),
        classifier_model(RESNET, 32),
    ),
    'backbone': (
        'mmpretrain',
        classifier_model(
            dict(RESNET, type='Expanded', expand=dict(of='ResNet', block=DBB)), 32
        ),
        classifier_model(RESNET, 32),
    ),
    'conv layers': (
        'mmseg',
        with_conv_cfg(dict(type='mmrep.DBBConv2d')),
        with_conv_cfg(None),
    ),
    'conv layers of a type': (
        'mmseg',
        with_conv_cfg(dict(type='DBBConv2d', conv_cfg=dict(type='Conv'))),
        with_conv_cfg(dict(type='Conv')),
    ),
}


class Project:
    """A config, a checkpoint with random weights, and where the deploy files go."""

    def __init__(self, folder: Path, name: str = 'RepVGG classifier', **model: Any) -> None:
        scope, config = MODELS_BY_NAME[name]
        config = config if 'type' not in model else {}
        self.config = Config(dict(default_scope=scope, model={**config, **model}))
        enter_scope(self.config)
        self.folder = folder
        self.checkpoint, self.out = folder / 'epoch_3.pth', folder / 'deploy.pth'
        self.meta = dict(
            epoch=3, cfg='text', dataset_meta=dict(classes=('a', 'b'), palette=np.eye(2))
        )
        self.model = randomise(build_model(self.config))
        # mmpretrain's return nothing.
        self.model.eval()
        self.save(self.model.state_dict())

    def save(self, state_dict: dict) -> None:
        torch.save(
            dict(state_dict=state_dict, meta=self.meta, optimizer=dict(a=1)),
            self.checkpoint,
        )

    def deploy(self, **options: Any):
        return deploy_checkpoint(self.config, self.checkpoint, self.out, **options)

    def written(self) -> list[str]:
        return sorted(set(os.listdir(self.folder)) - {Path(self.checkpoint).name})


class OtherBlock(nn.Conv2d):
    """A block that names its weights otherwise."""

    def __init__(self, deploy: bool = False) -> None:
        super().__init__(3, 4, 1)
        self.deploy = deploy

    def switch_to_deploy(self) -> None:
        self.deploy = True


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


class TestDeployFiles:
    @pytest.mark.parametrize('name', MODELS_BY_NAME)
    def test_they_are_the_same_function(self, tmp_path, name):
        project = Project(tmp_path, name)
        done = project.deploy()
        assert project.written() == ['deploy.pth', 'deploy.py']
        assert 0 < max(d.rel_l2 for d in done.verification.outputs.values()) < 1e-5

        config = Config.fromfile(done.out_config)
        deployed = build_model(config)
        read = torch.load(done.out, weights_only=True)
        deployed.load_state_dict(read['state_dict'], strict=True)
        assert done.report.params_after < done.report.params_before
        count = sum(p.numel() for p in deployed.parameters())
        assert done.report.params_after == count
        assert any('branch_reparam' in key for key in read['state_dict'])

        x = image(*done.shape[:2], 20, 28, dtype=torch.float32, seed=5)
        with branch_by_branch(project.model):
            expected = forward(project.model, x)
        assert_same(expected, forward(deployed, x))

    @pytest.mark.parametrize('name', ONE_SWITCH)
    def test_of_a_network_of_one_switch(self, tmp_path, name):
        project = Project(tmp_path, 'bare backbone', **ONE_SWITCH[name])
        done = project.deploy(shape=(3, 64, 64))
        assert len(done.verification.blocks) > 2
        read = torch.load(done.out, weights_only=True)['state_dict']
        deployed = build_model(Config.fromfile(done.out_config))
        deployed.load_state_dict(read, strict=True)
        deployed.eval()
        x = image(1, 3, 64, 64, dtype=torch.float32)
        assert_same(forward(project.model, x), forward(deployed, x))

        fused = Config.fromfile(done.out_config), done.out
        # mmrep's own RepLKNet has the same keys.
        again = (CheckpointError, 'in deploy form already')
        known = {'RepLKNet': again}.get(name, (ConfigError, 'has no train form'))
        with pytest.raises(known[0], match=known[1]):
            deploy_checkpoint(*fused, tmp_path / 'again.pth')
        with pytest.raises(CheckpointError, match='is in deploy form'):
            export_onnx(*fused, tmp_path / 'a.onnx', form='train', shape=(3, 64, 64))

    @pytest.mark.parametrize('name', EXPANDED)
    def test_of_blocks_in_a_model_of_a_host(self, tmp_path, name):
        scope, expanded, plain = EXPANDED[name]
        project = Project(tmp_path, 'RepVGG classifier')
        project.config = Config(
            dict(
                default_scope=scope,
                model=expanded,
                custom_hooks=[
                    dict(type='mmrep.SwitchToDeployHook'),
                    dict(type='RandomStateHook'),
                    dict(type='EMAHook'),
                ],
                default_hooks=dict(
                    timer=dict(type='IterTimerHook'),
                    checkpoint=dict(type='mmrep.PlainCheckpointHook', interval=1),
                ),
                custom_imports=dict(imports=['mmrep', 'json'], allow_failed_imports=False),
                optim_wrapper=dict(type='OptimWrapper', constructor='mmrep.Any'),
                visualizer=dict(
                    vis_backends=[
                        dict(type='LocalVisBackend'),
                        dict(type='PictureFolder', save_dir='pictures'),
                    ]
                ),
            )
        )
        enter_scope(project.config)
        project.model = randomise(build_model(project.config)).eval()
        project.save(project.model.state_dict())
        done = project.deploy(shape=(3, 32, 32))
        # Each was compared by itself.
        assert done.verification.blocks.keys() == set(done.report.switched)
        assert len(done.report.switched) > 15
        assert 0 < max(d.worst for d in done.verification.blocks.values()) < 1e-6
        assert done.report.params_before > 2 * done.report.params_after

        config = Config.fromfile(done.out_config)
        assert config.model == plain
        assert config.custom_hooks == [dict(type='EMAHook')]
        assert config.default_hooks == dict(timer=dict(type='IterTimerHook'))
        assert config.custom_imports.imports == ['json']
        assert config.optim_wrapper == dict(type='OptimWrapper')
        assert config.visualizer.vis_backends == [dict(type='LocalVisBackend')]
        assert 'mmrep' not in done.out_config.read_text()
        read = torch.load(done.out, weights_only=True)['state_dict']
        with MODELS.switch_scope_and_registry(scope) as models:
            deployed = models.build(config.model)
        deployed.load_state_dict(read, strict=True)
        deployed.eval()
        x = image(1, 3, 32, 32, dtype=torch.float32)
        with branch_by_branch(project.model):
            expected = forward(project.model, x)
        assert_same(expected, forward(deployed, x), 1e-5)

    @pytest.mark.parametrize('name', EXPANDED)
    @pytest.mark.parametrize('key', ['weight', 'bias'])
    def test_a_wrong_one_is_named(self, tmp_path, monkeypatch, name, key):
        scope, expanded, _ = EXPANDED[name]
        project = Project(tmp_path, 'RepVGG classifier')
        project.config = Config(dict(default_scope=scope, model=expanded))
        enter_scope(project.config)
        project.save(randomise(build_model(project.config)).state_dict())

        @torch.no_grad()
        def wrong(model, *args):
            norms = collapse(model, *args)
            conv = 'backbone.layer2.0.conv1'
            part = norms[conv] if key == 'bias' else conv
            model.get_submodule(part).get_parameter(key).mul_(1.01)
            return norms

        monkeypatch.setattr('mmrep.deployment.running.collapse', wrong)
        with pytest.raises(VerificationError, match=r'^backbone\.layer2\.0\.conv1 differs'):
            project.deploy(shape=(3, 32, 32))
        assert not project.written()

    def test_blocks_in_a_host_around_a_backbone_of_ours(self, tmp_path):
        """What is ours has a deploy form, and the rest is the host's."""
        conv_cfg = dict(type='mmrep.DBBConv2d')
        model = segmentor_model()
        model['decode_head']['conv_cfg'] = conv_cfg
        project = Project(tmp_path, 'RepVGG classifier')
        project.config = Config(dict(default_scope='mmseg', model=model))
        enter_scope(project.config)
        project.save(randomise(build_model(project.config)).state_dict())
        done = project.deploy(shape=(3, 32, 32))
        assert 'decode_head.convs.0.conv' in done.report.switched
        config = Config.fromfile(done.out_config).model
        assert config.backbone.deploy and config.decode_head.conv_cfg is None

    def test_of_a_plain_network(self, tmp_path):
        """It has no blocks, but norms that become parts of convs."""
        project = Project(tmp_path, 'DBB-ResNet classifier')
        project.config.model.backbone.update(type='mmrep.ReparamResNet', block_cfg=None)
        project.model = randomise(build_model(project.config)).eval()
        project.save(project.model.state_dict())
        done = project.deploy()
        assert not done.report.switched
        read = torch.load(done.out, weights_only=True)['state_dict']
        assert not any('running_mean' in key for key in read)
        deployed = build_model(Config.fromfile(done.out_config))
        deployed.load_state_dict(read, strict=True)
        x = image(1, 3, 20, 28, dtype=torch.float32)
        with branch_by_branch(project.model):
            assert_same(forward(project.model, x), forward(deployed, x))

    def test_contents(self, project):
        done = project.deploy(source_config='configs/net.py', seed=4)
        read = torch.load(done.out, weights_only=True)
        assert read.keys() == {'state_dict', 'meta'}
        assert all(type(w) is torch.Tensor for w in read['state_dict'].values())
        meta = read['meta']
        assert meta['epoch'] == 3
        assert meta['dataset_meta'] == dict(classes=('a', 'b'), palette=[[1, 0], [0, 1]])
        assert meta.keys() == {'epoch', 'dataset_meta', 'mmrep'}
        verification = done.verification
        assert verification.outputs.keys() == {'output', 'backbone[0]'}
        assert meta['mmrep'] == dict(
            version=mmrep.__version__,
            source='epoch_3.pth',
            source_sha256=hashlib.sha256(project.checkpoint.read_bytes()).hexdigest(),
            source_config='net.py',
            input_shape=[1, 3, 224, 224],
            seed=4,
            rel_l2=max(d.rel_l2 for d in verification.outputs.values()),
            max_abs=max(d.max_abs for d in verification.outputs.values()),
            outputs={name: asdict(d) for name, d in verification.outputs.items()},
            dependence=verification.dependence,
            ill_conditioned={},
            worst_block=dict(
                name=verification.worst_block,
                **asdict(verification.blocks[verification.worst_block]),
            ),
            blocks=len(done.report.switched),
            params_before=done.report.params_before,
            params_after=done.report.params_after,
        )
        assert done.bytes_before == project.checkpoint.stat().st_size
        assert done.bytes_after == done.out.stat().st_size
        assert done.out_config.read_text().startswith('# The deploy form of net.py.\n')

    def test_config_is_whole(self, project):
        project.config.merge_from_dict(
            dict(load_from='a.pth', resume=True, custom_hooks=[dict(type='EMAHook')])
        )
        project.config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='no')
        expected = project.config.to_dict()
        project.deploy()
        config = Config.fromfile(project.out.with_suffix('.py'))
        expected['model']['backbone'].update(deploy=True, init_cfg=None)
        pair = dict(file='deploy.pth', sha256=sha256_of(project.out))
        expected |= dict(load_from=None, resume=False, fused_checkpoint=pair)
        assert config.to_dict() == expected

    @pytest.mark.parametrize(
        'change',
        [
            lambda state: {f'module.{key}': w for key, w in state.items()},
            lambda state: {key: w.double() for key, w in state.items()},
        ],
        ids=['distributed', 'float64'],
    )
    def test_weights_written_otherwise(self, project, change):
        project.save(change(project.model.state_dict()))
        assert project.deploy().report.switched

    def test_home(self, project, monkeypatch):
        monkeypatch.setenv('HOME', str(project.folder))
        digest = hashlib.sha256(project.checkpoint.read_bytes()).hexdigest()
        project.checkpoint, project.out = '~/epoch_3.pth', '~/deploy.pth'
        done = project.deploy()
        assert done.out == project.folder / 'deploy.pth'
        assert sorted(os.listdir(project.folder)) == [
            'deploy.pth',
            'deploy.py',
            'epoch_3.pth',
        ]
        meta = torch.load(done.out, weights_only=True)['meta']
        assert meta['mmrep']['source_sha256'] == digest

    @pytest.mark.parametrize('meta', [None, 'text', dict()])
    def test_no_meta(self, project, meta):
        project.meta = meta
        project.save(project.model.state_dict())
        project.deploy()
        assert torch.load(project.out, weights_only=True)['meta'].keys() == {'mmrep'}


class TestConfig:
    """What a config holds besides the model."""

    def test_numbers_that_are_not_finite(self, project):
        hook = dict(type='EarlyStoppingHook', greater_keys=float('inf'), monitor='a')
        project.config.custom_hooks = [hook]
        project.config.bounds = dict(a=[float('-inf'), (float('nan'),)])
        config = Config.fromfile(project.deploy().out_config)
        assert config.custom_hooks == [hook]
        assert str(config.bounds) == "{'a': [-inf, (nan,)]}"

    def test_thousands_of_entries(self, project, format_by):
        project.config.names = {f'n{i}': i for i in range(3000)}
        # yapf would take a minute.
        format_by(None)
        config = Config.fromfile(project.deploy().out_config)
        assert config.names == project.config.names
        assert config.fused_checkpoint.file == project.out.name


class TestInput:
    def test_shape(self, project):
        assert project.deploy(shape=(3, 9, 14)).shape == (1, 3, 9, 14)

    def test_shape_of_the_config(self, tmp_path):
        project = Project(tmp_path, 'RepVGG segmentor')
        assert project.deploy().shape == (1, 3, HEIGHT, WIDTH)

    def test_channels_of_the_config(self, tmp_path):
        project = Project(tmp_path, 'one channel')
        assert project.deploy().shape == (1, 1, 224, 224)

    def test_seed(self, project):
        errors = [
            project.deploy(shape=(3, 9, 9), seed=seed, overwrite=True).verification
            for seed in (1, 1, 2)
        ]
        assert errors[0] == errors[1] != errors[2]

    def test_reference_is_branch_by_branch(self, project, monkeypatch):
        """Else the train form would compute with the kernel that it is compared to."""
        block = type(project.model.backbone.stem)
        branches = []
        forward = block.forward
        monkeypatch.setattr(
            block,
            'forward',
            lambda self, x: (
                branches.append((self.one_conv, self.deploy)) or forward(self, x)
            ),
        )
        project.deploy()
        assert set(branches) == {(False, False), ('auto', True)}


class TestRefusals:
    """One sentence, and nothing is written."""

    def refused(self, project: Project, error: type, match: str, **options: Any) -> str:
        before = project.written()
        with pytest.raises(error, match=match) as info:
            project.deploy(**options)
        assert project.written() == before
        assert '\n' not in str(info.value)
        return str(info.value)

    def test_rtol(self, project):
        for rtol in (0, -1, 1, float('nan'), float('inf')):
            self.refused(project, UserError, 'a number between 0 and 1', rtol=rtol)

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_weight_that_is_not_finite(self, project, value):
        state = project.model.state_dict()
        state['backbone.stage_1.0.branch_3x3.conv.weight'][0, 0, 0, 0] = value
        project.save(state)
        says = 'backbone.stage_1.0: its output is not finite'
        self.refused(project, VerificationError, says)

    def test_wrong_fuse_of_another_package(self, tmp_path):
        """mmpretrain's RepVGG forgets its SE layers."""
        project = Project(tmp_path, backbone=dict(HOST_REPVGG, arch=SE))
        says = r'^backbone\.\w+ differs by .* from its branches'
        self.refused(project, VerificationError, says)

    def test_block_that_cannot_be_fused(self, tmp_path):
        norm = dict(type='GN', num_groups=2)
        project = Project(tmp_path, backbone=dict(REPVGG, norm_cfg=norm))
        message = self.refused(project, UserError, 'this model cannot be fused: ')
        assert 'backbone.stem.branch_3x3' in message
        assert 'GroupNorm' in message

    def test_other_weights(self, project):
        project.save(randomise(build_model(project.config).backbone).state_dict())
        self.refused(project, CheckpointError, 'does not fit the config')

    @pytest.mark.parametrize('config', ['train', 'deploy'])
    def test_deploy_form(self, project, tmp_path, config):
        done = project.deploy()
        project.checkpoint, project.out = done.out, tmp_path / 'again.pth'
        if config == 'deploy':
            project.config = Config.fromfile(done.out_config)
        self.refused(project, CheckpointError, 'in deploy form already')

    def test_config_in_deploy_form(self, project):
        project.config.model.backbone.deploy = True
        self.refused(project, CheckpointError, 'it is in train form and the config is not')

    def test_model_without_a_train_form(self, project, monkeypatch):
        monkeypatch.setitem(MODELS._module_dict, 'OtherBlock', OtherBlock)
        project.config.model = dict(type='OtherBlock', deploy=True)
        project.save(OtherBlock().state_dict())
        self.refused(project, ConfigError, 'has no train form')

    def test_checkpoint(self, project, tmp_path):
        project.checkpoint.write_bytes(project.checkpoint.read_bytes()[:999])
        self.refused(project, CheckpointError, 'it may be cut short')
        project.checkpoint.unlink()
        self.refused(project, CheckpointError, 'does not exist')
        project.checkpoint = 'https://host/a.pth'
        self.refused(project, CheckpointError, 'https://host/a.pth is an address')

    def test_existing_files(self, project):
        for path in (project.out, project.out.with_suffix('.py')):
            path.write_text('precious')
            self.refused(project, UserError, f'{path.name} exists: .* --overwrite')
            assert path.read_text() == 'precious'
            path.unlink()
        project.out.write_text('old')
        project.deploy(overwrite=True)
        assert torch.load(project.out, weights_only=True)

    @pytest.mark.parametrize('name', ['deploy.onnx', 'deploy', 'deploy.py', 'pth'])
    def test_suffix(self, project, name):
        project.out = project.folder / name
        self.refused(project, UserError, r'must end in \.pth')

    def test_sources_are_not_replaced(self, project, monkeypatch):
        project.out = project.folder / '.' / 'epoch_3.pth'
        self.refused(project, UserError, 'would replace', overwrite=True)
        config = project.folder / 'deploy.py'
        config.write_text('precious')
        project.out = project.folder / 'deploy.pth'
        options = dict(overwrite=True, source_config=str(config))
        self.refused(project, UserError, 'would replace', **options)
        monkeypatch.setenv('HOME', str(project.folder))
        options['source_config'] = '~/deploy.py'
        self.refused(project, UserError, 'would replace', **options)
        assert config.read_text() == 'precious'

    def test_shape(self, project):
        self.refused(project, UserError, 'give a fitting --shape', shape=(4, 9, 9))
        self.refused(
            project, UserError, 'does not fit into memory', shape=(3, 10**6, 10**6)
        )

    def test_config(self, project):
        project.config.model.head.type = 'NoHead'
        self.refused(project, ConfigError, 'cannot be built .*NoHead')
        project.config.model.head.type = 'LinearClsHead'
        project.config.model.backbone = dict(type='ResNet', depth=18)
        self.refused(project, ConfigError, 'nothing in this config')

    def test_config_that_is_no_text(self, project):
        project.config.foo = print
        self.refused(project, ConfigError, 'this config cannot be written as text')

    def test_no_output(self, project, monkeypatch):
        monkeypatch.setattr(BaseModel, '__call__', lambda *args, **kwargs: 'text')
        self.refused(project, VerificationError, 'cannot be verified: .*cannot be compared')

    @pytest.mark.parametrize('old', [None, 'old'])
    def test_failure_while_writing(self, project, monkeypatch, old):
        def save_half(value, file):
            file.write(b'half')
            raise OSError('No space left on device')

        if old:
            for path in (project.out, project.out.with_suffix('.py')):
                path.write_text(old)
        monkeypatch.setattr(torch, 'save', save_half)
        self.refused(project, UserError, 'No space left', overwrite=True)
        assert not old or project.out.read_text() == old
        assert not old or project.out.with_suffix('.py').read_text() == old


class OwnFuse(nn.Module):
    """A network of timm's style, which takes no ``deploy``: its layers ``fuse``."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(ConvNorm(3, 3, 3), nn.ReLU(), ConvNorm(3, 4, 1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.body(x),)


class ConvNorm(nn.Sequential):
    def __init__(self, *args: int) -> None:
        super().__init__(nn.Conv2d(*args), nn.BatchNorm2d(args[1]))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        fused = fuse_conv_norm(*self)
        fused.weight *= OwnFuse.scale if fused.kernel_size == (1, 1) else 1
        return fused


class TestBlocksOfOthers:
    @pytest.fixture
    def project(self, tmp_path, monkeypatch):
        monkeypatch.setitem(MODELS._module_dict, 'OwnFuse', OwnFuse)
        return Project(tmp_path, **classifier_model(dict(type='OwnFuse'), 4))

    def test_by_their_own_method(self, project):
        done = project.deploy()
        assert done.report.switched == ['backbone.body.0', 'backbone.body.2']
        config = Config.fromfile(done.out_config)
        assert (config.model.type, config.model.of) == ('mmrep.Deployed', 'ImageClassifier')
        model = build_model(config)
        assert isinstance(model.backbone.body[0], nn.Conv2d)
        state_dict = torch.load(done.out, weights_only=True)['state_dict']
        model.load_state_dict(state_dict, strict=True)
        x = image(2, 3, 16, 16, dtype=torch.float32)
        with torch.no_grad():
            assert_same(forward(project.model, x), forward(model, x), 1e-5)

    def test_a_wrong_one(self, project, monkeypatch):
        monkeypatch.setattr(OwnFuse, 'scale', 1.01)
        says = r'backbone\.body\.2 differs by 0\.01.* from its branches'
        with pytest.raises(VerificationError, match=says):
            project.deploy()
        assert project.written() == []

    @pytest.mark.parametrize('name', ['mobileone_s0', 'repvit_m0_9'])
    def test_timm(self, tmp_path, name):
        backbone = dict(type='TIMMBackbone', model_name=name)
        channels = dict(mobileone_s0=1024, repvit_m0_9=384)[name]
        project = Project(tmp_path, **classifier_model(backbone, channels))
        done = project.deploy(shape=(3, 64, 64))
        assert done.report.switched and done.out.exists()


def test_no_weights_are_downloaded(tmp_path, monkeypatch):
    class Downloads(RepVGG):
        """Gets its weights when it is made, as timm's networks do."""

        def __init__(self, pretrained: str | None = None, **options: Any) -> None:
            assert pretrained is None
            super().__init__(**options)

    monkeypatch.setitem(MODELS._module_dict, 'Downloads', Downloads)
    project = Project(tmp_path)
    init = dict(type='Pretrained', checkpoint='http://127.0.0.1:9/no.pth')
    options = dict(type='Downloads', pretrained='http://127.0.0.1:9/no.pth', init_cfg=init)
    project.config.model.backbone.update(options)
    assert project.deploy().report.switched
