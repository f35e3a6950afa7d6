import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_from_local
from mmpretrain import ImageClassificationInferencer
from mmseg.apis import inference_model, init_model
from tool_runs import assert_one_sentence, load, succeed, tool, variant


def saved(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def log_of(work_dir: Path) -> str:
    """What the runs of a work dir have logged."""
    return ''.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))


class TestTrain:
    def test_classifier(self, classifier):
        assert saved(classifier.checkpoint)['meta']['iter'] == 2
        assert 'Epoch(val)' in classifier.log
        assert 'accuracy/top1' in classifier.log

    @pytest.mark.parametrize('level', ['INFO', 'DEBUG'])
    def test_options_of_parameters_are_for_debugging(self, classifier, tmp_path, level):
        """mmengine logs a line for each option of each parameter.

        In a process of its own: in one, two runs of one second have one logger.
        """
        config = Config.fromfile(classifier.config)
        config.optim_wrapper.optimizer.weight_decay = 1e-4
        config.optim_wrapper.paramwise_cfg = dict(norm_decay_mult=0.0)
        config.dump(tmp_path / 'net.py')
        options = ('--cfg-options', f'log_level={level}')
        work = ('--work-dir', tmp_path / 'work')
        succeed(tool('train', tmp_path / 'net.py', *work, *options, cwd=classifier.root))
        assert ('paramwise_options -- ' in log_of(tmp_path / 'work')) == (level == 'DEBUG')
        assert 'Epoch(train)' in log_of(tmp_path / 'work')

    def test_segmentor(self, segmentor):
        assert saved(segmentor.checkpoint)['meta']['iter'] == 2
        assert 'mIoU' in segmentor.log

    def test_options(self, classifier, tmp_path, call):
        config = variant(classifier.config, tmp_path)
        call(
            *('train', config, '--work-dir', tmp_path / 'here', '--no-validate'),
            *(
                '--cfg-options',
                'optim_wrapper.optimizer.lr=0.125',
                'train_cfg.max_epochs=2',
            ),
        )
        end = saved(tmp_path / 'here' / 'epoch_2.pth')
        assert end['optimizer']['param_groups'][0]['lr'] == 0.125
        log = log_of(tmp_path / 'here')
        assert 'Epoch(train) [2][2/2]' in log
        assert 'Epoch(val)' not in log

    def test_work_dir_of_the_config(self, classifier, tmp_path, call):
        config = variant(classifier.config, tmp_path, work_dir=str(tmp_path / 'mine'))
        call('train', config, '--no-validate')
        assert (tmp_path / 'mine' / 'epoch_1.pth').exists()

    @pytest.mark.parametrize('scaled', [False, True])
    def test_auto_scale_lr(self, classifier, tmp_path, call, scaled):
        config = variant(classifier.config, tmp_path)
        options = ['--auto-scale-lr'] if scaled else []
        call('train', config, '--work-dir', tmp_path, '--no-validate', *options)
        group = saved(tmp_path / 'epoch_1.pth')['optimizer']['param_groups'][0]
        # Batches of 4, and a learning rate of 0.05 for batches of 8.
        assert group['lr'] == (0.025 if scaled else 0.05)

    def test_deploy_form(self, classifier, tmp_path, call):
        config = variant(
            classifier.config, tmp_path, model=dict(backbone=dict(deploy=True))
        )
        with pytest.warns(
            UserWarning, match=r'mmrep\.RepVGG has deploy=True: .* deploy=False'
        ):
            call('train', config, '--work-dir', tmp_path, '--no-validate')
        assert any(
            'reparam' in key for key in saved(tmp_path / 'epoch_1.pth')['state_dict']
        )

    @pytest.mark.filterwarnings('error:.*deploy=True')
    def test_train_form_does_not_warn(self, classifier, tmp_path, call):
        config = variant(classifier.config, tmp_path)
        call('train', config, '--work-dir', tmp_path, '--no-validate')

    @pytest.mark.parametrize('scale', [None, 128.0])
    def test_amp_is_mmengines(self, classifier, monkeypatch, scale):
        """It runs on GPUs alone, so that here is told what would run there."""
        module = load('train')
        monkeypatch.setattr(module, 'get_device', lambda: 'cuda')
        monkeypatch.setattr('sys.argv', ['train.py', str(classifier.config), '--amp'])
        args = module.parse_args()
        cfg = module.read_config(args.config)
        if scale:
            cfg.optim_wrapper.loss_scale = scale
        module.merge_args(cfg, args)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == (scale or 'dynamic')

    def test_hooks(self, classifier, monkeypatch):
        """A config has its own say in those that the tool adds."""
        module = load('train')
        monkeypatch.setattr('sys.argv', ['train.py', str(classifier.config)])
        args = module.parse_args()
        cfg = module.read_config(args.config)
        cfg.default_hooks.update(random_state=None, resume=dict(type='Own'))
        module.merge_args(cfg, args)
        assert 'random_state' not in cfg.default_hooks
        assert cfg.default_hooks.resume.type == 'Own'
        assert cfg.default_hooks.plain_checkpoint.type == 'mmrep.PlainCheckpointHook'
        assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'


class TestCheckpointsOpenAnywhere:
    """As mmengine reads them itself, by what torch.load does unasked."""

    @pytest.fixture(autouse=True)
    def stock(self, monkeypatch):
        monkeypatch.setitem(CheckpointLoader._schemes, '', load_from_local)

    def test_torch(self, classifier):
        checkpoint = torch.load(classifier.checkpoint, weights_only=True)
        assert {'optimizer', 'ema_state_dict', 'random_state'} <= checkpoint.keys()

    def test_mmpretrain(self, classifier):
        inferencer = ImageClassificationInferencer(
            str(classifier.config), pretrained=str(classifier.checkpoint), device='cpu'
        )
        weight = saved(classifier.checkpoint)['state_dict']['head.fc.weight']
        assert torch.equal(inferencer.model.head.fc.weight, weight)
        (result,) = inferencer(str(classifier.root / 'data/val/dark/0.png'))
        assert result['pred_class'] in ('dark', 'light')

    def test_mmseg(self, segmentor, tmp_path):
        pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
        config = variant(segmentor.config, tmp_path, test_pipeline=pipeline)
        model = init_model(str(config), str(segmentor.checkpoint), device='cpu')
        assert model.dataset_meta['classes'] == ['dark', 'light']
        image = str(segmentor.root / 'data/images/val/0.png')
        assert inference_model(model, image).pred_sem_seg.data.shape == (1, 24, 16)

    def test_mmengine_resumes(self, classifier, tmp_path):
        """Without the hooks, as a host's tool does."""
        config = variant(classifier.config, tmp_path, work_dir=str(tmp_path))
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(
            dict(resume=True, load_from=str(classifier.checkpoint))
            | {'train_cfg.max_epochs': 2}
        )
        Runner.from_cfg(cfg).train()
        assert saved(tmp_path / 'epoch_2.pth')['meta']['iter'] == 4


class TestResume:
    def test_auto(self, classifier, tmp_path):
        """From the latest checkpoint of the work dir, which mmengine alone cannot."""
        work_dir = tmp_path / 'work'
        shutil.copytree(classifier.work_dir, work_dir)
        (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
        options = ['--resume', '--cfg-options', 'train_cfg.max_epochs=2']
        log = succeed(tool('train', classifier.config, '--work-dir', work_dir, *options))
        assert 'resumed epoch: 1, iter: 2' in log
        assert 'Epoch(train) [2][1/2]' in log
        assert 'Epoch(train) [1]' not in log
        assert saved(work_dir / 'epoch_2.pth')['meta']['iter'] == 4

    def test_checkpoint(self, segmentor, tmp_path, call):
        config = variant(segmentor.config, tmp_path, **{'train_cfg.max_iters': 3})
        call('train', config, '--work-dir', tmp_path, '--resume', segmentor.checkpoint)
        log = log_of(tmp_path)
        assert 'resumed epoch: 0, iter: 2' in log
        assert 'Iter(train) [3/3]' in log
        assert 'Iter(train) [1/3]' not in log

    def test_home(self, segmentor, tmp_path, call, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        shutil.copy(segmentor.checkpoint, tmp_path / 'net.pth')
        config = variant(segmentor.config, tmp_path, **{'train_cfg.max_iters': 3})
        files = [f'~/{config.name}', '--work-dir', '~/work', '--resume', '~/net.pth']
        call('train', *files, '--no-validate')
        assert 'Iter(train) [3/3]' in log_of(tmp_path / 'work')

    def test_nothing_yet(self, classifier, tmp_path, call):
        config = variant(classifier.config, tmp_path)
        call('train', config, '--work-dir', tmp_path / 'new', '--resume', '--no-validate')
        assert (tmp_path / 'new' / 'epoch_1.pth').exists()

    def test_missing(self, classifier, refused):
        options = ['--resume', 'no.pth']
        refused('train', classifier.config, *options, says='no.pth does not exist')

    def test_latest_is_missing(self, classifier, tmp_path, refused):
        (tmp_path / 'last_checkpoint').write_text('/moved/epoch_1.pth')
        options = ['--work-dir', tmp_path, '--resume']
        says = '/moved/epoch_1.pth does not exist'
        refused('train', classifier.config, *options, says=says)

    @pytest.mark.parametrize('latest', [False, True])
    def test_cut_short(self, classifier, tmp_path, refused, latest):
        path = tmp_path / 'short.pth'
        shutil.copy(classifier.checkpoint, path)
        os.truncate(path, 20_000)
        (tmp_path / 'last_checkpoint').write_text(str(path))
        options = ['--resume'] if latest else ['--resume', path]
        options += ['--work-dir', tmp_path]
        says = (f'{path} cannot be read', 'cut short')
        refused('train', classifier.config, *options, says=says)
        assert sorted(os.listdir(tmp_path)) == ['last_checkpoint', 'short.pth']

    def test_weights_alone(self, classifier, deployed_classifier, tmp_path, refused):
        deployed = deployed_classifier.checkpoint
        bare = tmp_path / 'bare.pth'
        torch.save([saved(deployed)['state_dict']], bare)
        for path in (deployed, bare):
            says = f'holds no training to resume: .* load_from={path}'.split('.*')
            refused('train', classifier.config, '--resume', path, says=tuple(says))

    def test_other_model(self, classifier, segmentor, tmp_path, refused):
        options = ['--resume', segmentor.checkpoint, '--work-dir', tmp_path]
        says = (f'{segmentor.checkpoint} does not fit the config', '2 missing: head.fc')
        refused('train', classifier.config, *options, says=says)


class TestLoadFrom:
    def test_fine_tuning_takes_what_fits(self, classifier, segmentor, tmp_path, call):
        config = variant(classifier.config, tmp_path, load_from=str(segmentor.checkpoint))
        options = ['--cfg-options', 'optim_wrapper.optimizer.lr=0.0']
        call('train', config, '--work-dir', tmp_path, '--no-validate', *options)
        key = 'backbone.stem.branch_3x3.conv.weight'
        own, given = saved(tmp_path / 'epoch_1.pth'), saved(segmentor.checkpoint)
        assert torch.equal(own['state_dict'][key], given['state_dict'][key])

    def test_missing(self, classifier, refused):
        options = ['--cfg-options', 'load_from=no.pth']
        refused('train', classifier.config, *options, says='no.pth does not exist')


class TestWrongInput:
    def test_process(self, tmp_path):
        """As a user sees it."""
        done = tool('train', tmp_path / 'no.py')
        assert done.returncode == 1
        assert done.stdout == ''
        assert_one_sentence(done.stderr, 'no.py does not exist: check the path')

    def test_config(self, tmp_path, refused):
        path = tmp_path / 'a.py'
        path.write_text('model = dict(')
        refused('train', path, says=('a.py cannot be read', 'SyntaxError'))
        refused('train', tmp_path, says='is a folder')

    @pytest.mark.parametrize('task', ['classifier', 'segmentor'])
    def test_data(self, request, task, tmp_path, refused):
        project = request.getfixturevalue(task)
        options = ['--work-dir', tmp_path]
        options += ['--cfg-options', 'train_dataloader.dataset.data_root=/no/data']
        refused('train', project.config, *options, says='/no/data')

    @pytest.mark.parametrize('entry', [None, dict(enable=False)])
    def test_base_batch_size(self, classifier, tmp_path, refused, entry):
        entry = dict(_delete_=True, **entry) if entry else None
        config = variant(classifier.config, tmp_path, auto_scale_lr=entry)
        refused('train', config, '--auto-scale-lr', says='needs auto_scale_lr=dict(base_')

    @pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
    def test_amp(self, classifier, refused):
        refused('train', classifier.config, '--amp', says='--amp needs a GPU')

    @pytest.mark.parametrize(
        ('launcher', 'says'),
        [
            ('pytorch', 'RANK: start with tools/dist_train.sh'),
            ('slurm', 'SLURM_PROCID: start with tools/slurm_train.sh'),
            ('mpi', 'OMPI_COMM_WORLD_LOCAL_RANK: start with mpirun'),
        ],
    )
    def test_launcher(self, classifier, refused, launcher, says):
        refused('train', classifier.config, '--launcher', launcher, says=says)

    def test_work_dir_is_a_file(self, classifier, tmp_path, refused):
        path = tmp_path / 'file'
        path.touch()
        refused('train', classifier.config, '--work-dir', path, says=str(path))
