"""Models of mmrep, loaded from files, in the inference APIs of mmpretrain and mmseg."""

from pathlib import Path
from types import SimpleNamespace

import mmcv
import pytest
import torch
import yaml
from host_models import soften
from laws import assert_differ, assert_same, image, randomise
from mmpretrain import FeatureExtractor, ImageClassificationInferencer
from mmpretrain import get_model as get_classifier
from mmpretrain import inference_model as classify
from mmpretrain.apis import ModelHub
from mmseg.apis import MMSegInferencer
from mmseg.apis import inference_model as segment
from mmseg.apis import init_model as init_segmentor
from mmseg.structures import SegDataSample
from tiny_projects import CLASSES, HEIGHT, WIDTH, write_classification, write_segmentation
from torch import Tensor, nn

from mmrep.deployment import build_model, deploy_checkpoint, read_config
from mmrep.reparam import branch_by_branch, reparam_blocks, switch_to_deploy

PALETTE = [[0, 0, 0], [200, 0, 0]]
FORMS = ('train', 'deploy')
every_form = pytest.mark.parametrize('form', FORMS)


def written(config: Path, **entries) -> SimpleNamespace:
    """Write a config with changed entries, and a checkpoint, in both forms.

    Returns:
        ``train`` and ``deploy``, the names of a config and a checkpoint each, and
        ``model``, the train form, as the reference.
    """
    cfg = read_config(config)
    cfg.merge_from_dict(entries)
    cfg.dump(config)
    model = randomise(build_model(cfg))
    if hasattr(model, 'head'):
        soften(model, image(8, 3, HEIGHT, WIDTH, dtype=torch.float32))
    checkpoint, out = config.with_suffix('.pth'), config.parent / 'deploy.pth'
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    deploy_checkpoint(cfg, checkpoint, out)
    return SimpleNamespace(
        train=(str(config), str(checkpoint)),
        deploy=(str(out.with_suffix('.py')), str(out)),
        model=model,
    )


def pixels(path: str) -> Tensor:
    """The input that the models get for an image."""
    values = torch.from_numpy(mmcv.imread(path)).permute(2, 0, 1).float()
    assert values.shape == (3, HEIGHT, WIDTH)
    return (values - 127.5) / 60


def assert_form(model: nn.Module, form: str) -> None:
    assert {b.deploy for b in reparam_blocks(model).values()} == {form == 'deploy'}
    assert not model.training


# mmpretrain


@pytest.fixture(scope='module')
def classifier(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp('classifier')
    files = written(write_classification(root))
    files.images = [str(root / f'data/val/{name}/0.png') for name in CLASSES]
    batch = torch.stack([pixels(path) for path in files.images])
    with torch.no_grad(), branch_by_branch(files.model):
        files.features = {
            stage: files.model.extract_feat(batch, stage=stage)
            for stage in ('backbone', 'neck', 'pre_logits')
        }
        files.scores = files.model(batch, mode='tensor').softmax(1)
    assert files.scores.min() > 1e-2
    assert_differ(*files.scores)
    return files


def from_files(config: str, checkpoint: str) -> ImageClassificationInferencer:
    return ImageClassificationInferencer(config, pretrained=checkpoint, device='cpu')


def from_model(config: str, checkpoint: str) -> ImageClassificationInferencer:
    return ImageClassificationInferencer(get_classifier(config, pretrained=checkpoint))


@every_form
@pytest.mark.parametrize('make', [from_files, from_model])
def test_image_classification_inferencer(classifier, make, form):
    inferencer = make(*getattr(classifier, form))
    assert_form(inferencer.model, form)
    results = inferencer(classifier.images, batch_size=2)
    assert_same(list(classifier.scores), [torch.tensor(r['pred_scores']) for r in results])
    best = [CLASSES[index] for index in classifier.scores.argmax(1)]
    assert [r['pred_class'] for r in results] == best


def test_inferencer_that_is_deployed(classifier):
    """The train form is loaded, and fused in memory."""
    inferencer = from_files(*classifier.train)
    switch_to_deploy(inferencer.model)
    (result,) = inferencer(classifier.images[0])
    assert_same(classifier.scores[0], torch.tensor(result['pred_scores']))


@every_form
def test_inference_by_the_name_of_a_model(classifier, form, tmp_path, monkeypatch):
    config, checkpoint = getattr(classifier, form)
    results = [dict(Task='Image Classification', Dataset='tiny', Metrics={})]
    entry = dict(Name='mmrep-tiny', Config=config, Results=results)
    entry['In Collection'] = 'RepVGG'
    index = tmp_path / 'model-index.yml'
    index.write_text(
        yaml.safe_dump(dict(Collections=[dict(Name='RepVGG')], Models=[entry]))
    )
    monkeypatch.setattr(ModelHub, '_models_dict', dict(ModelHub._models_dict))
    ModelHub.register_model_index(index)
    result = classify('mmrep-tiny', classifier.images[0], pretrained=checkpoint)
    assert_same(classifier.scores[0], torch.tensor(result['pred_scores']))


@every_form
@pytest.mark.parametrize('stage', ['backbone', 'neck', 'pre_logits'])
def test_feature_extractor(classifier, form, stage):
    config, checkpoint = getattr(classifier, form)
    extractor = FeatureExtractor(config, pretrained=checkpoint, device='cpu')
    (found,) = extractor(classifier.images[1], stage=stage)
    expected = classifier.features[stage]
    if not isinstance(expected, Tensor):
        expected, found = list(expected), list(found)
        assert_same([feature[1] for feature in expected], found)
    else:
        assert_same(expected[1], found)


# mmseg

TEST_CFGS = {
    'whole': dict(mode='whole'),
    'slide': dict(mode='slide', crop_size=(16, 8), stride=(8, 4)),
}


@pytest.fixture(scope='module')
def segmentors(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """The files of a segmentor for each mode of inference."""
    return {
        mode: segmentor_files(tmp_path_factory.mktemp(mode), mode) for mode in TEST_CFGS
    }


def segmentor_files(root: Path, mode: str) -> SimpleNamespace:
    auxiliary = dict(type='FCNHead', in_channels=16, in_index=0, channels=4, num_convs=1)
    files = written(
        write_segmentation(root),
        model=dict(
            backbone=dict(out_indices=(2, 3)),
            decode_head=dict(in_index=1),
            auxiliary_head=dict(num_classes=2, norm_cfg=dict(type='BN'), **auxiliary),
            test_cfg=TEST_CFGS[mode],
        ),
        test_pipeline=[dict(type='LoadImageFromFile'), dict(type='PackSegInputs')],
    )
    files.images = [str(root / f'data/images/val/{index}.png') for index in range(2)]
    info = dict.fromkeys(('ori_shape', 'img_shape', 'pad_shape'), (HEIGHT, WIDTH))
    samples = [SegDataSample(metainfo=info | dict(padding_size=[0] * 4)) for _ in range(2)]
    with torch.no_grad(), branch_by_branch(files.model):
        batch = torch.stack([pixels(path) for path in files.images])
        files.logits = logits(files.model(batch, samples, mode='predict'))
    assert_differ(*files.logits)
    return files


def logits(samples: list[SegDataSample]) -> list[Tensor]:
    return [sample.seg_logits.data for sample in samples]


def test_sliding_windows_are_not_the_whole(segmentors):
    assert_differ(segmentors['whole'].logits[0], segmentors['slide'].logits[0])


@every_form
@pytest.mark.parametrize('mode', TEST_CFGS)
class TestSegmentor:
    def test_inference_model(self, segmentors, mode, form):
        files = segmentors[mode]
        model = init_segmentor(*getattr(files, form), device='cpu')
        assert_form(model, form)
        assert model.with_auxiliary_head
        assert model.dataset_meta['classes'] == CLASSES
        assert_same(files.logits, logits(segment(model, files.images)))
        loaded = mmcv.imread(files.images[0])
        assert_same(files.logits[0], segment(model, loaded).seg_logits.data)

    def test_inferencer(self, segmentors, mode, form):
        files = segmentors[mode]
        config, checkpoint = getattr(files, form)
        inferencer = MMSegInferencer(config, checkpoint, device='cpu')
        assert_form(inferencer.model, form)
        assert_same(files.logits, logits(inferencer(files.images, return_datasamples=True)))
