import argparse
import json
import os
import shutil

import mmengine
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tool_runs import (
    Project,
    arguments,
    assert_one_sentence,
    load,
    succeed,
    tool,
    variant,
)

from mmrep.deployment import build_model, read_config


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def odd_size(project: Project) -> dict:
    """Entries of a config by which a classifier is tested on images of 25x17 pixels."""
    cfg = Config.fromfile(project.config)
    resize = dict(type='Resize', scale=(17, 25))
    load, _, pack = cfg.test_dataloader.dataset.pipeline
    first, *others = cfg.tta_pipeline
    return {
        'test_dataloader.dataset.pipeline': [load, resize, pack],
        'tta_pipeline': [first, resize, *others],
    }


class TestForms:
    def test_same_metrics(self, pair, tmp_path, call):
        """The deploy files are tested as the trained ones are."""
        train, deployed = pair
        outs = tmp_path / 'train.json', tmp_path / 'deploy.json'
        call('test', *arguments(train, tmp_path, '--out', outs[0]))
        options = ['--out', outs[1], '--work-dir', tmp_path / 'work']
        log = succeed(tool('test', deployed.config, deployed.checkpoint, *options))
        assert f'Load checkpoint from {deployed.checkpoint}' in log
        metrics, found = (json.loads(out.read_text()) for out in outs)
        assert metrics == found
        assert {'accuracy/top1', 'mIoU'} & metrics.keys()

    def test_same_predictions(self, pair, predict):
        train, deployed = pair
        expected = predict(train)
        assert expected.std() > 1e-3, 'predictions that could not differ'
        assert_same(predict(deployed), expected)
        assert_same(predict(train, '--deploy'), expected)
        assert_same(predict(deployed, '--deploy'), expected)

    @pytest.mark.parametrize(
        'entry',
        [
            {'conv_cfg': dict(type='Conv2dAdaptivePadding')},
            {'norm_cfg': dict(type='MMSyncBN')},
        ],
        ids=lambda entry: next(iter(entry.values()))['type'],
    )
    @pytest.mark.parametrize(
        'options',
        [(), pytest.param(('--tta',), marks=pytest.mark.long)],
        ids=['', 'augmented'],
    )
    def test_of_other_layers(self, classifier, predict, entry, options):
        """Kernels that depend on the input's size; norms that want other processes.

        The images are of an odd size, which is not what is taken where none is known.
        """
        entries = {f'model.backbone.{key}': value for key, value in entry.items()}
        entries |= odd_size(classifier)
        expected = predict(classifier, *options, **entries)
        assert expected.std() > 1e-3, 'predictions that could not differ'
        assert_same(predict(classifier, '--deploy', *options, **entries), expected)

    def test_averaged_weights(self, classifier, tmp_path, predict):
        """The config's EMAHook tests those of the checkpoint, in both forms."""
        assert_same(predict(classifier), predict(classifier, custom_hooks=[]))
        whole = torch.load(classifier.checkpoint, weights_only=False)
        for key, value in whole.pop('ema_state_dict').items():
            if key != 'steps':
                whole['state_dict'][key.removeprefix('module.')] = value
        path = tmp_path / 'last.pth'
        torch.save(whole, path)
        last = Project(tmp_path, classifier.config, tmp_path, path, '')
        assert (predict(last) - predict(classifier)).abs().max() > 1e-3


class TestOptions:
    @pytest.mark.long
    def test_augmentation(self, pair, predict):
        """Of images that it leaves as they are, and so of the same weights."""
        train, deployed = pair
        expected = predict(train).argmax(1)
        for project, *options in ((train,), (deployed,), (train, '--deploy')):
            found = predict(project, '--tta', *options).argmax(1)
            assert torch.equal(found, expected)

    def test_deploy_is_told(self, classifier, tmp_path, call, capfd):
        call('test', *arguments(classifier, tmp_path, '--deploy'))
        assert (
            'Switched 6 blocks to deploy form: 6,354 -> 5,498 param'
            in capfd.readouterr().out
        )

    def test_augmentation_of_classifier_scores(self, classifier, predict):
        assert_same(predict(classifier, '--tta'), predict(classifier))

    def test_amp(self, pair, predict):
        train, _ = pair
        exact, rough = predict(train), predict(train, '--amp')
        assert 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()

    def test_pictures(self, pair, tmp_path, call):
        train, _ = pair
        show = tmp_path / 'show'
        out = tmp_path / 'predictions.pkl'
        options = ['--show-dir', show, '--out', out, '--out-item', 'pred']
        call('test', *arguments(train, tmp_path, *options))
        pictures = [Image.open(path) for path in show.glob('*.png')]
        assert len(pictures) == len(mmengine.load(out))
        # Labels are drawn into those of a classifier.
        if Config.fromfile(train.config).default_scope == 'mmpretrain':
            assert all(min(picture.size) >= 256 for picture in pictures)

    @pytest.mark.parametrize('suffix', ['json', 'yaml', 'pkl'])
    def test_out(self, classifier, tmp_path, call, suffix):
        out = tmp_path / 'new' / f'metrics.{suffix}'
        call('test', *arguments(classifier, tmp_path, '--out', out))
        assert mmengine.load(out).keys() == {'accuracy/top1'}

    def test_home(self, classifier, tmp_path, call, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        shutil.copy(classifier.checkpoint, tmp_path / 'net.pth')
        config = variant(classifier.config, tmp_path)
        options = ['--work-dir=~/work', '--out=~/a.json', '--show-dir=~/show']
        call('test', f'~/{config.name}', '~/net.pth', *options)
        assert (tmp_path / 'work').is_dir() and (tmp_path / 'a.json').is_file()
        assert list((tmp_path / 'show').rglob('*.png'))

    def test_config_options(self, classifier, tmp_path, call):
        """And no work dir: it is where training puts it."""
        out = tmp_path / 'metrics.json'
        config = variant(classifier.config, tmp_path, work_dir=str(tmp_path / 'mine'))
        options = ['--out', out, '--cfg-options', 'test_evaluator.topk=(1, 2)']
        call('test', config, classifier.checkpoint, *options)
        assert mmengine.load(out)['accuracy/top2'] == 100
        assert (tmp_path / 'mine').is_dir()


class TestWrongInput:
    def test_process(self, classifier, tmp_path):
        """As a user sees it."""
        done = tool('test', classifier.config, tmp_path / 'no.pth')
        assert done.returncode == 1
        assert_one_sentence(done.stderr, 'no.pth does not exist: check the path')

    def test_config(self, classifier, refused):
        refused('test', 'no.py', classifier.checkpoint, says='no.py does not exist')

    def test_forms(self, classifier, deployed_classifier, tmp_path, refused):
        options = ['--work-dir', tmp_path]
        says = 'it is in deploy form and the config is not, so give the config that tools/'
        refused(
            'test', classifier.config, deployed_classifier.checkpoint, *options, says=says
        )
        says = 'it is in train form and the config is not'
        refused(
            'test', deployed_classifier.config, classifier.checkpoint, *options, says=says
        )

    def test_model_that_cannot_be_fused(self, classifier, tmp_path, refused):
        norm = {'model.backbone.norm_cfg': dict(type='GN', num_groups=1)}
        config = variant(classifier.config, tmp_path, custom_hooks=[], **norm)
        cfg = read_config(config)
        torch.save(build_model(cfg).state_dict(), tmp_path / 'gn.pth')
        options = ['--work-dir', tmp_path, '--deploy']
        says = ('backbone.stem.branch_3x3: GroupNorm without', 'leave --deploy out')
        refused('test', config, tmp_path / 'gn.pth', *options, says=says)

    def test_other_model(self, classifier, segmentor, tmp_path, refused):
        options = ['--work-dir', tmp_path]
        refused(
            *('test', classifier.config, segmentor.checkpoint, *options),
            says=('does not fit the config', '2 missing: head.fc'),
        )
        refused(
            *('test', classifier.config, segmentor.checkpoint, *options, '--tta'),
            says=('does not fit the config', '2 missing: head.fc'),
        )

    def test_cut_short(self, classifier, tmp_path, refused):
        path = tmp_path / 'short.pth'
        path.write_bytes(classifier.checkpoint.read_bytes()[:-100])
        refused('test', classifier.config, path, says='cut short')

    def test_data(self, classifier, tmp_path, refused):
        options = ['--cfg-options', 'test_dataloader.dataset.data_root=/no/data']
        command = arguments(classifier, tmp_path, *options)
        refused('test', *command, says='/no/data')

    @pytest.mark.parametrize(
        ('options', 'says'),
        [
            (['--out', 'a.txt'], 'a.txt must end in .json or .yaml or .pkl'),
            (['--out', 'a.json', '--out-item', 'pred'], 'must end in .pkl'),
            (['--out-item', 'pred'], '--out-item pred needs --out'),
        ],
    )
    def test_out(self, classifier, refused, options, says):
        refused('test', classifier.config, classifier.checkpoint, *options, says=says)

    @pytest.mark.parametrize(
        ('options', 'entries', 'says'),
        [
            (['--tta'], dict(tta_pipeline=None), '--tta needs tta_model and tta_pipeline'),
            (['--tta'], dict(tta_model=None), '--tta needs tta_model and tta_pipeline'),
            (
                ['--show-dir', 'a'],
                dict(default_hooks=dict(visualization=None)),
                'need default_hooks.visualization: add it',
            ),
            (['--show-dir', 'a'], dict(visualizer=None), 'needs a visualizer: add one'),
        ],
        ids=str,
    )
    def test_config_without(self, classifier, tmp_path, refused, options, entries, says):
        command = arguments(classifier, tmp_path, *options, **entries)
        refused('test', *command, says=says)


def test_pictures_of_a_detector(tmp_path):
    """mmdet's hook writes them: it tells a backend no names."""
    hook = dict(type='DetVisualizationHook')
    cfg = Config(dict(default_scope='mmdet', default_hooks=dict(visualization=hook)))
    args = argparse.Namespace(
        show_dir='show', show=False, interval=1, wait_time=2, config='net.py'
    )
    load('test').show_predictions(cfg, args)
    hook = cfg.default_hooks.visualization
    assert hook.draw and hook.test_out_dir == os.path.abspath('show')
