"""Models are built without the random numbers that the weights would start with."""

import random
import re

import numpy as np
import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModule
from mmengine.registry import LOOPS, MODELS, init_default_scope
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from tiny_projects import DBB_RESNET, REPVGG, classifier_model, segmentor_model
from torch import Tensor, nn

from mmrep.checkpoints import load_strictly
from mmrep.deployment import build_model, building_fault, enter_scope
from mmrep.errors import ConfigError
from mmrep.hosts import forward

SE = dict(REPVGG['arch'], se_cfg=dict(ratio=4, divisor=1))
MODELS_BY_NAME = {
    'RepVGG classifier': ('mmpretrain', classifier_model()),
    'RepVGG with SE': ('mmpretrain', classifier_model(dict(REPVGG, arch=SE))),
    'RepVGG in deploy form': ('mmpretrain', classifier_model(dict(REPVGG, deploy=True))),
    'DBB-ResNet classifier': ('mmpretrain', classifier_model(DBB_RESNET, 32)),
    'RepVGG segmentor': ('mmseg', segmentor_model()),
}
SAME = dict(type='Conv2dAdaptivePadding')

every_model = pytest.mark.parametrize('name', MODELS_BY_NAME)


def config_of(name: str) -> Config:
    scope, model = MODELS_BY_NAME[name]
    config = Config(dict(default_scope=scope, model=model))
    enter_scope(config)
    return config


def generators() -> list:
    """The states of all generators that a constructor may draw from."""
    kind, *numpy_state = np.random.get_state()
    return [
        torch.get_rng_state().tolist(),
        kind,
        numpy_state[0].tolist(),
        random.getstate(),
    ]


@every_model
class TestUnset:
    def test_no_random_number_is_drawn(self, name):
        config, before = config_of(name), generators()
        build_model(config, unset=True)
        assert generators() == before
        build_model(config)
        assert generators() != before, 'else the test could not fail'

    def test_is_the_model_once_it_is_loaded(self, name):
        config = config_of(name)
        usual = randomise(build_model(config)).eval()
        loaded = build_model(config, unset=True)
        load_strictly(loaded, usual.state_dict(), 'a.pth', assign=True)
        assert not any(module.training for module in loaded.modules())
        assert repr(loaded) == repr(usual)
        flags = [
            {key: p.requires_grad for key, p in model.named_parameters()}
            for model in (usual, loaded)
        ]
        assert flags[0] == flags[1]
        x = image(2, 3, 24, 16, dtype=torch.float32)
        with torch.no_grad():
            assert_same(forward(usual, x), forward(loaded, x), tolerance=0)

    def test_what_no_checkpoint_holds_is_right(self, name):
        """Buffers, persistent or not, and the constants of layers."""
        config = config_of(name)
        usual, unset = build_model(config), build_model(config, unset=True)
        buffers = dict(unset.named_buffers())
        expected = dict(usual.named_buffers())
        assert buffers.keys() == expected.keys()
        for key, buffer in buffers.items():
            assert torch.equal(buffer, expected[key]), key
        assert set(buffers) - set(unset.state_dict()), 'the preprocessor has such'


def test_values_that_are_not_drawn_are_set():
    """A constructor may compute parameters, and buffers from numbers that it draws."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 2.0))
            self.register_buffer('noise', torch.empty(3), persistent=False)
            nn.init.constant_(self.noise, 5.0)
            self.weight = nn.Parameter(torch.zeros(2, 2))
            self.results = [
                nn.init.normal_(self.weight),
                nn.init.uniform_(tensor=self.weight),
                self.weight.data.fill_(3.0),
            ]

    MODELS.register_module(name='Values', module=Values, force=True)
    try:
        model = build_model(Config(dict(model=dict(type='Values'))), unset=True)
    finally:
        MODELS.module_dict.pop('Values')
    assert model.scale.tolist() == [2, 2, 2]
    assert model.noise.tolist() == [5, 5, 5]
    assert model.weight.tolist() == [[3, 3], [3, 3]]
    # As the functions of nn.init do, for code that uses what they return.
    assert all(isinstance(result, Tensor) for result in model.results)


def test_a_model_built_afterwards_starts_at_random():
    config = config_of('RepVGG classifier')
    build_model(config, unset=True)
    weights = [build_model(config).head.fc.weight for _ in range(2)]
    assert weights[0].std() > 0
    assert not torch.equal(*weights)


def test_also_after_a_model_that_cannot_be_built():
    config = config_of('RepVGG classifier')
    config.model.head.type = 'NoHead'
    with pytest.raises(ConfigError, match=r'cannot be built .*NoHead'):
        build_model(config, unset=True)
    before = torch.get_rng_state()
    nn.Conv2d(2, 2, 1)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('deploy', [False, True])
def test_blocks_that_compute_when_they_are_made(deploy):
    """``Conv2dAdaptivePadding`` has a buffer in deploy form; the identity is a constant."""
    backbone = dict(DBB_RESNET, conv_cfg=SAME, deploy=deploy)
    config = Config(dict(default_scope='mmengine', model=backbone))
    enter_scope(config)
    usual = randomise(build_model(config)).eval()
    loaded = build_model(config, unset=True)
    load_strictly(loaded, usual.state_dict(), 'a.pth', assign=True)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_same(usual(x), loaded(x), tolerance=0)


class RunLoop(BaseLoop):
    """Builds what there is not, when it runs."""

    def __init__(self, runner: Runner, dataloader: dict, evaluator: dict) -> None:
        super().__init__(runner, dataloader)

    def run(self) -> None:
        """Ask mmengine for it."""
        MODELS.build(dict(type='No'))


class TestBuildingFault:
    """What is built is the config's; what runs is the developer's."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
        LOOPS.register_module(name='RunLoop', module=RunLoop, force=True)
        MODELS.register_module(name='Empty', module=BaseModule, force=True)
        init_default_scope('mmengine')
        yield
        LOOPS.module_dict.pop('RunLoop')
        MODELS.module_dict.pop('Empty')
        for kind in (MMLogger, MessageHub, Visualizer):
            kind._instance_dict.clear()

    @pytest.mark.parametrize(
        ('cfg', 'words'),
        [
            (dict(type='No'), "^No of this config .*type='No' is unknown to mmengine"),
            (dict(type='mmrep.RepVGG', arch='Z'), "^mmrep.RepVGG of this .*arch 'Z' is"),
            (5, '^5 of this config cannot be built .TypeError: cfg should be'),
        ],
    )
    def test_a_part(self, cfg, words):
        with pytest.raises(Exception) as info:
            MODELS.build(cfg)
        assert re.search(words, building_fault(info.value))

    @pytest.mark.parametrize(
        ('entries', 'words'),
        [
            (dict(env_cfg=5), '^a run of this config .*AttributeError'),
            (dict(log_level='LOUD'), '^logger of this config .*LOUD'),
            (dict(custom_hooks=[dict(type='No')]), "^No of this config .*type='No' is"),
            (dict(test_evaluator=dict(type='No')), '^test_loop > evaluator > No of this'),
            (
                dict(test_dataloader=dict(dataset=dict(type='No'))),
                '^test_loop > dataloader > No of this config',
            ),
            # What a loop builds when it runs is not of the config.
            (dict(test_cfg=dict(type='RunLoop')), None),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_a_run(self, entries, words):
        config = dict(
            model=dict(type='Empty'),
            work_dir='work',
            test_cfg=dict(),
            test_dataloader=dict(
                dataset=[0], batch_size=1, sampler=dict(type='DefaultSampler')
            ),
            test_evaluator=dict(type='DumpResults', out_file_path='a.pkl'),
        )
        with pytest.raises(Exception) as info:
            Runner.from_cfg(Config(config | entries)).test()
        fault = building_fault(info.value)
        assert fault is None if words is None else re.search(words, fault)

    def test_nothing_is_built(self):
        with pytest.raises(ZeroDivisionError) as info:
            forward(nn.Module(), 1 / 0)
        assert building_fault(info.value) is None


def test_levit():
    """mmpretrain's computes with what it made of its biases when it entered eval mode."""
    init_default_scope('mmpretrain')
    backbone = dict(type='LeViT', arch='128s', img_size=32)
    config = Config(dict(model=backbone))
    trained = randomise(build_model(config))
    for name, parameter in trained.named_parameters():
        if 'attention_biases' in name:
            nn.init.normal_(parameter)
    trained.eval()
    loaded = build_model(config)
    load_strictly(loaded, trained.state_dict(), 'a.pth')
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert_same(trained(x)[-1], loaded(x)[-1], tolerance=1e-6)
