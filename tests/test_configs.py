"""Every config builds, trains for a step, predicts, and is fused to the same function.

A training step of every model at its full width takes minutes and some gigabytes, and is
run with ``MMREP_ALL_CONFIGS=1`` only. Otherwise one config of each kind is run, with narrow
stages.
"""

import copy
import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config, ConfigDict
from mmengine.dataset import COLLATE_FUNCTIONS, BaseDataset, Compose
from mmengine.evaluator import Evaluator
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    MODELS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISUALIZERS,
)
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings
from modelindex.load_model_index import load as load_model_index
from modelindex.models.ModelIndex import ModelIndex
from PIL import Image
from torch import nn

from mmrep.checkpoints import load_strictly
from mmrep.deployment import (
    build_model,
    deploy_config,
    enter_scope,
    read_config,
    without_pretrained,
)
from mmrep.hosts import forward
from mmrep.models import backbones
from mmrep.reparam import branch_by_branch, reparam_blocks, switch_to_deploy

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'configs').rglob('*.py'))
#: All but those with networks of the hosts, which are in test_expanded_configs.py.
CONFIGS = {
    path.stem: path.relative_to(ROOT)
    for path in FILES
    if not {'_base_', 'expanded'} & set(path.parts)
}
#: The configs of published networks and tasks.
PUBLISHED = [name for name in CONFIGS if not re.search('digits|fashion', name)]


#: Millions of parameters, deploy and train form, and GFLOPs, as published.
SIZES = {
    'repvgg-a0': (8.30, 9.11, 1.4),
    'repvgg-a1': (12.78, 14.09, 2.4),
    'repvgg-a2': (25.49, 28.21, 5.1),
    'repvgg-b0': (14.33, 15.82, 3.1),
    'repvgg-b1': (51.82, 57.42, 11.8),
    'repvgg-b1g2': (41.36, 45.78, 8.8),
    'repvgg-b1g4': (36.12, 39.97, 7.3),
    'repvgg-b2': (80.31, 89.02, 18.4),
    'repvgg-b2g2': (63.96, None, None),
    'repvgg-b2g4': (55.77, 61.76, 11.3),
    'repvgg-b3': (110.96, 123.09, 26.2),
    'repvgg-b3g2': (87.40, None, None),
    'repvgg-b3g4': (75.62, 83.83, 16.1),
    'repvgg-d2se': (120.39, 133.33, 32.8),
    'dbb-resnet18': (11.68, 26.29, None),
    'mobileone-s0': (2.08, None, 0.275),
    'mobileone-s1': (4.76, None, 0.825),
    'mobileone-s2': (7.81, None, 1.299),
    'mobileone-s3': (10.08, None, 1.896),
    'mobileone-s4': (14.84, None, 2.978),
}

# Other blocks of the same body deploy to the same network.
for _arch, (_deploy, _, _gflops) in list(SIZES.items()):
    if re.fullmatch(r'repvgg-[ab]\d.*', _arch):
        for _block in ('qa', 'mo-', 'orepa-'):
            SIZES[f'{_block}{_arch}'] = _deploy, None, _gflops
SIZES['acb-resnet18'] = SIZES['orepa-resnet18'] = SIZES['dbb-resnet18'][0], None, None

#: The networks of RepVGG's longer recipe.
HEAVY = r'repvgg-(b2g4|b3|b3g2|b3g4|d2se)_'

#: One config of each kind: of every backbone, head, block option, loss and hook.
KINDS = [
    'repvgg-tiny_1xb64_digits',
    'repvgg-tiny_fcn_1xb16-1k_digits-64x64',
    'dbb-resnet18-tiny_1xb64_digits',
    'mobileone-s0-tiny_1xb64_digits',
    'repvgg-a0_8xb32_in1k',
    'repvgg-plus-l2pse_custom-l2_8xb32_in1k-256px',
    'repvgg-a0-d8_fcn_8xb2-40e_cityscapes-512x1024',
    'repvgg-b1g2-fast-d8_pspnet_8xb2-40e_cityscapes-512x1024',
    'repvgg-a0-d8_deeplabv3plus_4xb4-80k_ade20k-512x512',
    'repvgg-a0_upernet_4xb4-80k_ade20k-512x512',
    'dbb-resnet50_8xb32_in1k',
    'dbb-mobilenet-v1_8xb32_in1k',
    'dbb-vgg16_8xb16_cifar100',
    'dbb-r18-d8_pspnet_4xb2-80k_cityscapes-512x1024',
    'dbb-r50_upernet_4xb2-80k_cityscapes-512x1024',
    'mobileone-s0_8xb32_in1k',
    'mobileone-s0-d8_deeplabv3_4xb2-80k_cityscapes-512x1024',
    'unireplknet-a_32xb128_in1k',
    'branches-tiny_1xb64_digits',
    'unireplknet-tiny_1xb64_digits',
    'replknet-tiny_1xb64_digits',
    'repvgg-tiny_1xb64_fashion-mnist',
    'repvgg-tiny_custom-l2_1xb64_fashion-mnist',
    'unireplknet-tiny_1xb64_fashion-mnist',
    'acb-resnet18_8xb32_in1k',
    'orepa-repvgg-a0_8xb32_in1k',
    'qarepvgg-a0_8xb32_in1k',
    'qarepvgg-b1g4_8xb32_in1k',
    'repopt-vgg-tiny-search_1xb64_digits',
    'repopt-vgg-tiny_1xb64_digits',
    'repopt-vgg-b1_8xb32_in1k',
    'repopt-vgg-b1-search_8xb16_cifar100',
]


def quick(names: Iterable[str]) -> list:
    """Configs as parameters: `make check` alone tries those that are not in ``KINDS``."""
    return [n if n in KINDS else pytest.param(n, marks=pytest.mark.long) for n in names]


every_config = pytest.mark.parametrize('name', quick(CONFIGS))
every_published = pytest.mark.parametrize('name', quick(PUBLISHED))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    # mmengine reports the initialization and the options of every parameter.
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def load(name: str) -> Config:
    """A copy of a config, in its host's scope, with scales for RepOptimizer if needed."""
    cfg = copy.deepcopy(from_file(name))
    enter_scope(cfg)
    write_scales(cfg)
    return cfg


#: Where :func:`write_scales` writes them.
SEARCHES = tempfile.TemporaryDirectory()


def write_scales(cfg: Config) -> None:
    """Give RepOptimizer the scales of a search, all of them 0.5."""
    if 'scales' not in cfg.optim_wrapper:
        return
    backbone = dict(cfg.model.backbone, block_cfg=dict(type='mmrep.ScaleSumBlock'))
    with torch.device('meta'):
        state = MODELS.build(without_pretrained(ConfigDict(backbone))).state_dict()
    scales = {
        f'backbone.{key}': torch.full(value.shape, 0.5)
        for key, value in state.items()
        if key.endswith('scale.weight')
    }
    path = str(Path(SEARCHES.name, f'{len(os.listdir(SEARCHES.name))}.pth'))
    torch.save(scales, path)
    cfg.optim_wrapper.scales = cfg.model.backbone.init_cfg[-1].scales = path


@functools.cache
def from_file(name: str) -> Config:
    cfg = read_config(ROOT / CONFIGS[name])
    # What the Runner does.
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


@functools.cache
def skeleton(name: str, deploy: bool = False) -> nn.Module:
    """The model of a config without memory for its parameters."""
    cfg = load(name)
    if deploy:
        # From text, as tools/reparam.py writes it.
        deployed = deploy_config(cfg).to_dict()
        text = Config(deployed, format_python_code=False).pretty_text
        cfg = Config.fromstring(text, '.py')
    with torch.device('meta'):
        return MODELS.build(without_pretrained(cfg.model))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def nodes(value: object) -> Iterator[dict]:
    """Every dict with a type in nested dicts and lists."""
    if isinstance(value, dict):
        if 'type' in value:
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from nodes(item)


# Building


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_bases_are_this_project_s(path):
    bases = Config._get_base_files(str(path))
    for base in [bases] if isinstance(bases, str) else bases:
        # Only configs/expanded inherits from configs of the hosts.
        assert (path.parent / base).resolve() in FILES or (
            path.parent.name == 'expanded' and '::' in base
        )


@every_config
def test_both_forms_build(name):
    assert count(skeleton(name, deploy=True)) < count(skeleton(name))
    blocks = reparam_blocks(skeleton(name, deploy=True)).values()
    assert all(block.deploy for block in blocks)


@pytest.mark.parametrize(
    'arch',
    [
        pytest.param(a, marks=pytest.mark.long) if re.match('qa|mo-|orepa', a) else a
        for a in SIZES
    ],
)
def test_published_size(arch):
    name = f'{arch}_8xb32_in1k'
    deploy, train, gflops = SIZES[arch]
    # Some of the published figures are truncated, others rounded.
    assert count(skeleton(name, deploy=True)) / 1e6 == pytest.approx(deploy, abs=0.01)
    if train is not None:
        assert count(skeleton(name)) / 1e6 == pytest.approx(train, abs=0.01)
    if gflops is not None:
        (listed,) = [model for model in model_index().models if model.name == name]
        assert listed.metadata.data['FLOPs'] / 1e9 == pytest.approx(gflops, abs=0.05)


@functools.cache
def model_index() -> ModelIndex:
    return load_model_index(str(ROOT / 'model-index.yml'))


def test_model_index():
    """MIM's parser takes the index, which lists every config once."""
    index = model_index()
    assert index.check(silent=True) == []
    assert sorted(model.name for model in index.models) == sorted(PUBLISHED)
    collections = {collection.name for collection in index.collections}
    for model in index.models:
        assert model.config == str(CONFIGS[model.name])
        assert model.in_collection in collections
        assert model.weights is None
        numbers = model.metadata.data
        cfg = load(model.name)
        gpus = int(re.search(r'_(\d+)xb\d', model.name).group(1))
        assert numbers['Batch Size'] == gpus * cfg.train_dataloader.batch_size
        assert numbers['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        for result in model.results or []:
            assert all('Published' in metric for metric in result.metrics)


@every_published
def test_sizes_in_the_model_index(name):
    (listed,) = (model for model in model_index().models if model.name == name)
    numbers = listed.metadata.data
    assert numbers['Parameters'] == count(skeleton(name, deploy=True))
    assert numbers['Training Parameters'] == count(skeleton(name))


# Recipes


def is_decayed(recipe: str, name: str, parameter: torch.Tensor) -> bool:
    """Whether the authors' code decays a parameter."""
    if re.match(r'mobileone-.*_in1k', recipe):
        return not re.search(r'norm\.\w+$', name)
    if 'custom-l2' in recipe and re.search(r'branch_(3x3|1x1)\.conv\.', name):
        return False
    if 'replknet' in recipe:
        return parameter.dim() > 1
    if 'repvgg-plus' in recipe:
        return parameter.dim() > 1 or name.endswith('branch_norm.weight')
    if re.match(r'repvgg-.*_in1k', recipe):
        return not (name.endswith('.bias') or re.search(r'branch_(3x3|1x1)\.norm\.', name))
    return True


def weight_decay(recipe: str) -> float:
    if 'replknet' in recipe:
        return 0.05
    if re.search('custom-l2.*in1k|repvgg-plus', recipe):
        return 4e-5
    return 5e-4 if re.match(r'dbb-r(18|50)|mobileone-.*city', recipe) else 1e-4


@every_config
def test_which_parameters_are_decayed(name):
    cfg, model = load(name), skeleton(name)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = {
        parameter: group['weight_decay']
        for group in optimizer.param_groups
        for parameter in group['params']
    }
    assert decays.keys() == set(model.parameters())
    assert {key: decays[parameter] for key, parameter in model.named_parameters()} == {
        key: weight_decay(name) if is_decayed(name, key, parameter) else 0
        for key, parameter in model.named_parameters()
    }
    assert len({group['lr'] for group in optimizer.param_groups}) == 1
    assert cfg.optim_wrapper.optimizer.get('nesterov', False) == ('-plus-' in name)


@every_published
def test_custom_l2_decays_what_the_optimizer_does_not(name):
    hooks = load(name).get('custom_hooks', [])
    assert [hook for hook in hooks if 'Decay' in hook['type']] == (
        [dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=4e-5)]
        if 'custom-l2' in name
        else []
    )


def epochs_and_warm_up(name: str) -> tuple[int, int]:
    """Length of the training and of its beginning, from the authors' recipes."""
    if re.match('repvgg-plus|mobileone', name):
        return 300, 5
    if 'replknet' in name:
        return 300, 20 if name.startswith('uni') else 10
    if re.match(HEAVY, name):
        return 200, 5
    if 'search' in name:
        return 240, 0
    return (400 if 'cifar' in name else 120), 0


@pytest.mark.parametrize(
    'name', quick(n for n in PUBLISHED if '_in1k' in n or 'cifar' in n)
)
def test_classifier_learning_rate(name):
    cfg = load(name)
    epochs, warm_up = epochs_and_warm_up(name)
    assert cfg.train_cfg.max_epochs == epochs
    rates = learning_rates(cfg, steps=2 * epochs, epoch_length=2)
    peak, last = (4e-3, 1e-6) if 'replknet' in name else (0.1, 0)
    assert rates[-1] == pytest.approx(last, abs=1e-9)
    assert max(rates) == rates[2 * warm_up] == pytest.approx(peak)
    # The warm-up is followed by half a cosine, with half of the rate in its middle.
    assert rates[epochs + warm_up] == pytest.approx((peak + last) / 2)
    first = 1e-3 if re.search('mobileone|replknet', name) else 1e-4
    assert rates[0] == pytest.approx(first * peak if warm_up else peak)


@pytest.mark.long
@pytest.mark.parametrize(
    'name, steps, last',
    [
        ('repvgg-a0-d8_pspnet_8xb2-40e_cityscapes-512x1024', 40 * 186, 0),
        ('repvgg-a0-d8_pspnet_4xb4-80k_ade20k-512x512', 80000, 0),
        ('dbb-r50-d8_pspnet_4xb2-80k_cityscapes-512x1024', 80000, 1e-4),
    ],
)
def test_segmentor_learning_rate(name, steps, last):
    cfg = load(name)
    assert cfg.train_cfg.max_iters == steps
    rates = learning_rates(cfg, steps)
    assert rates[0] == max(rates) == pytest.approx(0.01)
    middle = last + (0.01 - last) * 0.5**0.9
    assert rates[steps // 2] == pytest.approx(middle, rel=1e-3)
    assert rates[-1] == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize('name', [n for n in PUBLISHED if re.match('mobileone.*in1k', n)])
def test_mobileone_decays_less_and_less_and_never_its_norms(name):
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    of_conv, of_norm = [], []
    for wrapper in after_every_step(load(name), model, steps=300):
        conv, *norm = wrapper.optimizer.param_groups
        of_conv.append(conv['weight_decay'])
        of_norm += [group['weight_decay'] for group in norm]
    assert of_conv[0] == 1e-4 and of_conv[-1] == pytest.approx(1e-5)
    assert of_conv[150] == pytest.approx(5.5e-5)
    assert len(of_norm) == 602 and set(of_norm) == {0}


@pytest.mark.parametrize('name', ['mobileone-s1_8xb32_in1k', 'mobileone-s4_8xb32_in1k'])
def test_mobileone_sees_larger_images_with_more_augmentation(name, sample_files):
    cfg = load(name)
    hook = HOOKS.build(cfg.custom_hooks[1])
    dataset = SimpleNamespace(pipeline=Compose(cfg.train_dataloader.dataset.pipeline))
    loader = SimpleNamespace(dataset=dataset)
    runner = SimpleNamespace(
        epoch=0, train_loop=SimpleNamespace(dataloader=loader), logger=logging
    )
    seen = []
    for runner.epoch in range(300):
        hook.before_train_epoch(runner)
        level = dataset.pipeline.transforms[3].magnitude_level
        sample = dict(img_path=sample_files[0], gt_label=1)
        if not seen or level != seen[-1][-1]:
            shape = dataset.pipeline(sample)['inputs'].shape
            seen.append((runner.epoch + 1, *shape[1:], level))
    assert seen == [(1, 160, 160, 2.1), (37, 192, 192, 4.9), (112, 224, 224, 7)]


@pytest.mark.long
def test_unireplknet_learning_rate():
    """Up to 1e-4 within 1500 steps, and down along a line."""
    cfg = load('unireplknet-t_upernet_4xb4-160k_ade20k-512x512')
    rates = learning_rates(cfg, 160000)
    assert rates[0] == pytest.approx(1e-10) and rates[1500] == max(rates)
    assert max(rates) == pytest.approx(1e-4)
    assert rates[80750] == pytest.approx(5e-5, rel=1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def learning_rates(cfg: Config, steps: int, epoch_length: int = 1) -> list[float]:
    """The learning rate before every step, and after the last one."""
    model = nn.Linear(1, 1, bias=False)
    every = after_every_step(cfg, model, steps, epoch_length)
    return [wrapper.get_lr()['lr'][0] for wrapper in every]


def after_every_step(
    cfg: Config, model: nn.Module, steps: int, epoch_length: int = 1
) -> Iterator[OptimWrapper]:
    """The optimizer at the start, and after every step of it and of the schedules."""
    # RepOptimizer's scales may not fit the model.
    own = {k: v for k, v in cfg.optim_wrapper.items() if k not in ('constructor', 'scales')}
    wrapper = build_optim_wrapper(model, own)
    schedulers = [
        PARAM_SCHEDULERS.build(
            scheduler, default_args=dict(optimizer=wrapper, epoch_length=epoch_length)
        )
        for scheduler in cfg.param_scheduler
    ]
    yield wrapper
    for _ in range(steps):
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
        yield wrapper


#: The alphas of mixup and CutMix for the smaller UniRepLKNets.
MIXED = {f'unireplknet-{arch}': (0.3, 0.3) for arch in 'afp'}
MIXED['unireplknet-n'] = (0.5, 0.5)


@pytest.mark.parametrize('name', [n for n in PUBLISHED if '_in1k' in n])
def test_classifier_losses_and_mixup(name):
    cfg = load(name)
    with_mixup = bool(re.match(HEAVY, name)) or 'repvgg-plus' in name
    smooth = with_mixup or re.match('mobileone|(uni)?replknet', name)
    losses = [node for node in nodes(cfg.model) if node['type'].endswith('Loss')]
    for loss in losses:
        assert loss['type'] == ('LabelSmoothLoss' if smooth else 'CrossEntropyLoss')
        assert loss.get('label_smooth_val') == (0.1 if smooth else None)
    weights = [loss.get('loss_weight', 1) for loss in losses]
    assert weights == ([1, 0.1, 0.1, 0.1] if 'repvgg-plus' in name else [1])
    augments = dict(type='Mixup', alpha=0.2) if with_mixup else None
    if 'replknet' in name:
        alphas = MIXED.get(name.partition('_')[0], (0.8, 1.0))
        kinds = zip(('Mixup', 'CutMix'), alphas, strict=True)
        augments = [dict(type=kind, alpha=alpha) for kind, alpha in kinds]
    assert cfg.model.get('train_cfg') == (dict(augments=augments) if augments else None)


def test_what_rep_optimizer_trained_is_tuned_by_a_plain_one():
    cfg = load('repopt-vgg-tiny_1xb64_digits')
    assert cfg.optim_wrapper.constructor == 'mmrep.RepOptimizerConstructor'
    deployed = deploy_config(cfg)
    model = build_model(deployed)
    model.init_weights()
    optimizer = build_optim_wrapper(model, deployed.optim_wrapper).optimizer
    assert not optimizer._optimizer_step_pre_hooks and len(optimizer.param_groups) == 1


@pytest.mark.parametrize('name', [n for n in PUBLISHED if 'repvgg-plus' in n])
def test_auxiliary_classifiers_follow_the_first_stages(name):
    # The third stage is split into two; the first of these has an auxiliary classifier.
    assert skeleton(name).backbone.out_indices == (0, 1, 2, 4)


@pytest.mark.parametrize('name', [n for n in PUBLISHED if n.startswith('dbb-resnet')])
def test_classifiers_do_not_start_as_their_shortcuts(name):
    assert not skeleton(name).backbone.zero_init_residual


@pytest.mark.parametrize(
    'name', quick(n for n in CONFIGS if re.match('(repvgg|mobileone)-', n))
)
def test_dilations(name):
    blocks = reparam_blocks(skeleton(name).backbone)
    blocks = {key: b for key, b in blocks.items() if b.kernel_size == (3, 3)}
    dilations = {key: block.dilation[0] for key, block in blocks.items()}
    expected = dict.fromkeys(dilations, 1)
    if '-d8' in name:
        expected |= {key: 2 for key in dilations if re.match('stage_?3', key)}
        expected |= {key: 4 for key in dilations if re.match('stage_?4', key)}
    if 'fast' in name:
        expected |= dict.fromkeys(list(dilations)[:-5], 1)
    assert dilations == expected


@pytest.mark.parametrize(
    'name',
    [
        name if name in KINDS else pytest.param(name, marks=pytest.mark.long)
        for name in PUBLISHED
        if re.search('city|ade20k', name)
    ],
)
def test_stages_of_segmentors(name):
    """A backbone's strides are 4, 8, 8, 8, or without dilation 4, 8, 16, 32."""
    x = torch.zeros(2, 3, 64, 64, device='meta')
    with torch.no_grad():
        stages = skeleton(name).backbone(x)
        logits = skeleton(name)(x, mode='tensor')
    sizes = [stage.size(-1) for stage in stages]
    assert sizes == ([16, 8, 8, 8] if '-d8' in name else [16, 8, 4, 2])
    # The decode head takes the last stage, or also the first one.
    assert logits.size(-1) == (16 if re.search('deeplabv3plus|upernet', name) else 8)
    model = skeleton(name)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.backbone.modules())
    assert model.auxiliary_head.in_channels == stages[2].size(1)


# Data


@pytest.fixture(scope='module')
def sample_files(tmp_path_factory) -> tuple[str, str]:
    """An image and its annotation."""
    folder = tmp_path_factory.mktemp('sample')
    # As large as the scenes of digits, which no pipeline resizes.
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    Image.fromarray(pixels[..., 0] % 8).save(folder / 'mask.png')
    return str(folder / 'image.png'), str(folder / 'mask.png')


def data_set(cfg: Config, loader: str) -> BaseDataset:
    """A loader's data set, before it looks for its files."""
    return DATASETS.build(dict(cfg[loader].dataset, lazy_init=True))


def run_pipeline(cfg: Config, loader: str, files: tuple[str, str]) -> dict:
    dataset = cfg[loader].dataset
    results = dict(img_path=files[0], gt_label=1, seg_fields=[], label_map=None)
    if cfg.default_scope == 'mmseg':
        zero_label = data_set(cfg, loader).reduce_zero_label
        results.update(seg_map_path=files[1], reduce_zero_label=zero_label)
    elif 'cifar' in dataset.type.lower():
        results['img'] = np.asarray(Image.open(files[0]).resize((32, 32)))
    elif dataset.type == 'FashionMNIST':
        results['img'] = np.asarray(Image.open(files[0]).convert('L').resize((28, 28)))
    for step in map(TRANSFORMS.build, dataset.pipeline):
        results = step(results)
    return results


def train_size(name: str, cfg: Config) -> tuple[int, int]:
    """Height and width of a training sample."""
    for pattern, size in (
        ('256px', (256, 256)),
        # The size at the start of the training.
        ('mobileone-s4_8xb32_in1k', (160, 160)),
        ('in1k', (224, 224)),
        ('cifar', (32, 32)),
        ('512x1024', (512, 1024)),
        ('512x512', (512, 512)),
    ):
        if pattern in name:
            return size
    return (64, 64) if cfg.default_scope == 'mmseg' else (32, 32)


#: A config for every data set and its pipelines.
DATA = [
    'repvgg-a0_8xb32_in1k',
    'repvgg-b3_8xb32_in1k',
    'repvgg-plus-l2pse_8xb32_in1k-256px',
    'dbb-resnet18_8xb32_in1k',
    'mobileone-s4_8xb32_in1k',
    'unireplknet-a_32xb128_in1k',
    'replknet-31b_32xb64_in1k',
    'dbb-vgg16_8xb16_cifar10',
    'dbb-vgg16_8xb16_cifar100',
    'repvgg-a0-d8_pspnet_8xb2-40e_cityscapes-512x1024',
    'repvgg-a0-d8_pspnet_4xb4-80k_ade20k-512x512',
    'repvgg-tiny_1xb64_digits',
    'repvgg-tiny_1xb64_fashion-mnist',
    'repvgg-tiny_fcn_1xb16-1k_digits-64x64',
]


def test_data_holds_all_pipelines():
    listed = [load(name).train_dataloader for name in DATA]
    assert all(load(name).train_dataloader in listed for name in CONFIGS)


@pytest.mark.parametrize('name', DATA)
def test_training_data(name, sample_files):
    """The train pipeline makes a batch of the shape and range that the model takes."""
    cfg = load(name)
    # Enough for every policy of a random augmentation to be drawn.
    number = 60 if re.match('repvgg-(plus|b3)|mobileone-s4|unireplknet', name) else 2
    samples = [run_pipeline(cfg, 'train_dataloader', sample_files) for _ in range(number)]
    collate = cfg.train_dataloader.get('collate_fn', dict(type='pseudo_collate'))
    batch = COLLATE_FUNCTIONS.get(collate['type'])(samples)
    preprocessor = dict(cfg.model.data_preprocessor)
    preprocessor.setdefault('type', 'ClsDataPreprocessor')
    inputs = MODELS.build(preprocessor)(batch, training=True)['inputs']
    channels = 1 if 'fashion' in name else 3
    assert inputs.shape == (number, channels, *train_size(name, cfg))
    assert inputs.isfinite().all() and inputs.abs().max() < 5


@pytest.mark.parametrize('name', DATA)
def test_test_data(name, sample_files):
    cfg = load(name)
    assert cfg.test_dataloader == cfg.val_dataloader
    sample = run_pipeline(cfg, 'test_dataloader', sample_files)
    if cfg.default_scope == 'mmpretrain':
        size = 320 if '256px' in name else 224 if 'in1k' in name else 32
        assert sample['inputs'].shape == (1 if 'fashion' in name else 3, size, size)
    if 'tta_pipeline' in cfg:
        for step in cfg.tta_pipeline:
            TRANSFORMS.build(step)
        assert 'tta_model' in cfg


def test_colour_jitter_does_not_wrap_around(tmp_path):
    """A black image stays dark: its values are not uint8 when brightness is reduced."""
    path = tmp_path / 'black.png'
    Image.new('RGB', (64, 64)).save(path)
    cfg = load('dbb-resnet18_8xb32_in1k')
    for _ in range(20):
        sample = run_pipeline(cfg, 'train_dataloader', (str(path), ''))
        assert sample['inputs'].abs().max() < 40


@pytest.mark.parametrize('name', DATA)
def test_everything_else_builds(name, tmp_path):
    cfg = load(name)
    VISUALIZERS.build(dict(cfg.visualizer, name=name, save_dir=str(tmp_path)))
    for hook in cfg.default_hooks.values():
        HOOKS.build(hook)
    for split in ('train', 'val', 'test'):
        dataset = data_set(cfg, f'{split}_dataloader')
        if cfg.default_scope == 'mmpretrain':
            assert cfg.data_preprocessor.num_classes == len(dataset.CLASSES)
    Evaluator([cfg.val_evaluator])
    Evaluator([cfg.test_evaluator])


# Steps


def narrowed(model: ConfigDict) -> None:
    """Divide the widths of a model by four, as far as its config can set them."""
    backbone = model.backbone
    kind = backbone.type.removeprefix('mmrep.')
    wide = kind != 'DBBAlexNet'
    if kind == 'DBBMobileNetV1':
        backbone.width_factor = 0.25
    elif kind.endswith('RepLKNet'):
        settings = getattr(backbones, kind).arch_settings[backbone.arch]
        widths = [width // 4 for width in settings['channels']]
        backbone.arch = dict(settings, channels=widths)
    elif wide:
        backbone.base_channels = backbone.get('base_channels', 64) // 4
    if 'ResNet' in kind:
        backbone.stem_channels = backbone.get('stem_channels', 64) // 4
    keys = ['channels', 'mid_channels', 'c1_in_channels', 'c1_channels']
    keys += ['in_channels'] if wide else []
    for part in ('head', 'decode_head', 'auxiliary_head'):
        for node in nodes(model.get(part)):
            for key in keys:
                if isinstance(node.get(key), int):
                    node[key] //= 4
                elif node.get(key):
                    node[key] = [width // 4 for width in node[key]]


def batch_of(cfg: Config, size: int) -> dict:
    """Two images with annotations, before the data preprocessor."""
    channels = cfg.model.backbone.get('in_channels', 3)
    images = (127 + 50 * image(2, channels, size, size)).clamp(0, 255).to(torch.uint8)
    if cfg.default_scope == 'mmpretrain':
        (structures,) = import_modules_from_strings(['mmpretrain.structures'])
        samples = [structures.DataSample().set_gt_label(label) for label in (1, 2)]
    else:
        (structures,) = import_modules_from_strings(['mmseg.structures'])
        shape = (size, size)
        samples = [
            structures.SegDataSample(
                metainfo=dict(ori_shape=shape, img_shape=shape, pad_shape=shape),
                gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, *shape))),
            )
            for _ in images
        ]
    return dict(inputs=list(images), data_samples=samples)


def assert_trains(cfg: Config, model: nn.Module, batch: dict) -> None:
    """A training step with the config's optimizer and hooks reaches all parameters."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper)
    for hook in cfg.get('custom_hooks') or []:
        if hook['type'].startswith('mmrep.'):
            HOOKS.build(hook).before_train(runner)
    losses = model.train().train_step(batch, wrapper)
    assert losses['loss'].isfinite() and losses['loss'] > 0
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter in wrapper.optimizer.state, key


def assert_predicts(cfg: Config, model: nn.Module, batch: dict) -> None:
    samples = model.eval().test_step(batch)
    assert len(samples) == 2
    for sample, pixels in zip(samples, batch['inputs'], strict=True):
        if cfg.default_scope == 'mmpretrain':
            assert sample.pred_score.shape == (cfg.data_preprocessor.num_classes,)
        else:
            assert sample.pred_sem_seg.data.shape == (1, *pixels.shape[1:])
            classes = data_set(cfg, 'test_dataloader').metainfo['classes']
            assert sample.seg_logits.data.size(0) == len(classes)


def assert_deploys(cfg: Config, model: nn.Module, size: int) -> None:
    """The deploy config's model has the train form's outputs, with the fused weights."""
    # With random statistics deep networks amplify the rounding of float32.
    randomise(model).double().eval()
    x = image(2, cfg.model.backbone.get('in_channels', 3), size, size)
    with branch_by_branch(model):
        reference = forward(model, x)
    switch_to_deploy(model)
    deployed = build_model(deploy_config(cfg)).double()
    load_strictly(deployed, model.state_dict(), 'the fused model')
    assert_same(reference, forward(deployed, x))


def check_config(name: str, narrow: bool) -> None:
    cfg = load(name)
    size = {'DBBAlexNet': 224, 'DBBVGG': 32}.get(cfg.model.backbone.type[6:], 64)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (size, size)
    if narrow:
        narrowed(cfg.model)
        write_scales(cfg)
    model = build_model(cfg)
    model.init_weights()
    batch = batch_of(cfg, size)
    assert_trains(cfg, model, batch)
    assert_predicts(cfg, model, batch)
    assert_deploys(cfg, model, size)


@pytest.mark.parametrize('name', KINDS)
def test_step_prediction_and_deploy_form(name):
    check_config(name, narrow=name in PUBLISHED)


@pytest.mark.skipif(
    'MMREP_ALL_CONFIGS' not in os.environ, reason='takes minutes: MMREP_ALL_CONFIGS=1'
)
@every_config
def test_step_prediction_and_deploy_form_at_full_width(name):
    check_config(name, narrow=False)
