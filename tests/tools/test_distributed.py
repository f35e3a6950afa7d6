import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.utils import digit_version
from tiny_projects import DBB_RESNET, REPVGG, classifier_model
from tool_runs import TOOLS, scores, succeed, variant

#: mmengine starts processes on GPUs alone: this lets them be on the CPU.
ON_CPU = """
import torch.nn.parallel
torch.cuda.set_device = lambda device: None
_init = torch.nn.parallel.DistributedDataParallel.__init__
def _init_on_cpu(self, module, device_ids=None, **options):
    _init(self, module, **options)
torch.nn.parallel.DistributedDataParallel.__init__ = _init_on_cpu
# It refuses SyncBN there, which in eval mode works.
torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = (
    lambda self, module: None
)
"""

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


def run(*command: Any, **env: str) -> subprocess.CompletedProcess:
    """Run a command; its output is text."""
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def launch(tmp_path):
    """Run one of the scripts, on CPUs."""
    (tmp_path / 'sitecustomize.py').write_text(ON_CPU)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    python = Path(sys.executable).parent

    def launch(script: str, *arguments) -> str:
        modules = os.pathsep.join(
            [
                str(tmp_path),
                str(HERE),
                str(HERE.parent),
                os.environ.get('PYTHONPATH', str(tmp_path)),
            ]
        )
        env = dict(PATH=f'{python}:/usr/bin:/bin', PYTHONPATH=modules, PORT=port)
        if script.endswith('.sh'):
            command = ['bash', TOOLS / script]
        else:
            command = [*TORCHRUN, f'--master_port={port}', HERE / script]
        return succeed(run(*command, *arguments, **env))

    return launch


@no_gpu
@pytest.mark.long
def test_train(classifier, tmp_path, launch):
    config = variant(classifier.config, tmp_path, train_dataloader=dict(batch_size=2))
    log = launch('dist_train.sh', config, 2, '--work-dir', tmp_path / 'work')
    assert 'Distributed training: True' in log
    assert 'GPU number: 2' in log
    end = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)
    # Eight images in batches of two times two.
    assert end['meta']['iter'] == 2
    assert not any(key.startswith('module.') for key in end['state_dict'])


@no_gpu
@pytest.mark.long
def test_test(classifier, tmp_path, launch, predict):
    """The same predictions, though the model is wrapped, and wrapped again."""
    out = tmp_path / 'distributed.pkl'
    launch(
        *('dist_test.sh', classifier.config, classifier.checkpoint, 1),
        *('--deploy', '--tta', '--work-dir', tmp_path, '--out', out, '--out-item', 'pred'),
    )
    torch.testing.assert_close(scores(out), predict(classifier), rtol=1e-4, atol=1e-5)


EMA = dict(type='EMAHook', momentum=0.5)
DECAY = dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=0.1)
STEPS = dict(accumulative_counts=2, clip_grad=dict(max_norm=0.1))
DRAWING = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
#: Images, or how they are flipped, differ between the ranks.
COMMON = {
    'custom_imports': dict(imports=['rank_hook', 'stop_hook']),
    'train_cfg.max_epochs': 2,
    'train_dataloader.batch_size': 2,
    'train_dataloader.dataset.pipeline': DRAWING,
    'randomness': dict(seed=0, diff_rank_seed=True),
}


def network(backbone: dict, in_channels: int, **options: Any) -> dict:
    return dict(_delete_=True, **classifier_model(dict(backbone, **options), in_channels))


def repvgg(**options: Any) -> dict:
    return network(REPVGG, 16, **options)


def dbb(**options: Any) -> dict:
    return network(DBB_RESNET, 32, **options)


POLICY = 'torch.distributed.fsdp.wrap.size_based_auto_wrap_policy'
NETWORKS = dict(repvgg=repvgg, dbb=dbb)


@no_gpu
class TestRanks:
    """Two processes with images of their own hold the same parameters, to the bit."""

    @pytest.fixture
    def train(self, classifier, tmp_path, launch):
        """Train variants of a config, one after the other, in the processes of one job."""

        def train(**variants: dict) -> None:
            jobs = []
            for name, entries in variants.items():
                options = entries.pop('options', [])
                entries = {**COMMON, **entries}
                entries['custom_hooks'] = [
                    *entries.get('custom_hooks', []),
                    dict(type='RankHook'),
                ]
                config = variant(classifier.config, tmp_path, **entries)
                jobs.append([str(config), '--work-dir', str(tmp_path / name), *options])
            launch('train_ranks.py', json.dumps(jobs))

        return train

    @pytest.fixture
    def one_model(self, tmp_path):
        """Check that the ranks of a variant ended with the same parameters.

        Returns what each rank tells; ``frozen`` are the stages that must not move.
        """

        def one_model(name: str, frozen: tuple[str, ...] = ()) -> list[dict]:
            files = sorted((tmp_path / name).glob('rank_*.json'))
            first, second = (json.loads(file.read_text()) for file in files)
            assert first['parameters'] == second['parameters']
            assert '0.module.head.fc.weight' not in first['still']
            prefixes = tuple(f'0.module.backbone.{stage}.' for stage in frozen)
            fixed = [key for key in first['parameters'] if key.startswith(prefixes)]
            assert bool(fixed) == bool(frozen)
            assert set(fixed) <= set(first['still'])
            return [first, second]

        return one_model

    @pytest.mark.long
    def test_everything_at_once(self, tmp_path, train, one_model, call):
        everything = dict(optim_wrapper=STEPS, custom_hooks=[EMA])
        frozen = dict(frozen_stages=1, with_cp=True)
        drawing = {'model': repvgg(), 'train_cfg.max_epochs': 3}
        stop = dict(type='StopHook', iteration=5, kill=False)
        train(
            repvgg=dict(everything, model=repvgg(**frozen), custom_hooks=[EMA, DECAY]),
            dbb=dict(everything, model=dbb(**frozen)),
            # In training mode it averages over processes, which it does on GPUs alone.
            sync=dict(model=repvgg(norm_cfg=dict(type='SyncBN'), norm_eval=True)),
            whole=drawing,
            halves=dict(drawing, custom_hooks=[stop]),
            resumed=dict(
                drawing, options=['--resume', str(tmp_path / 'halves/epoch_2.pth')]
            ),
        )
        for name, frozen in dict(repvgg=('stem', 'stage_1'), dbb=('layer1',)).items():
            first, second = one_model(name, frozen)
            assert first['buffers'] != second['buffers']
        # Every rank goes on with its own random numbers.
        whole, resumed = one_model('whole'), one_model('resumed')
        assert resumed[0]['parameters'] == whole[0]['parameters']
        assert resumed[0]['buffers'] == whole[0]['buffers']
        one_model('sync')
        for name in ('repvgg', 'dbb', 'sync'):
            (config,) = (tmp_path / name).glob('variant_*.py')
            checkpoint = tmp_path / name / 'epoch_2.pth'
            call('reparam', config, checkpoint, tmp_path / f'{name}.pth')

    @pytest.mark.long
    def test_each_alone(self, train, one_model):
        """What hides another's fault above does not here."""
        alone = {
            'plain': ({}, {}),
            'frozen': (dict(frozen_stages=0), {}),
            'recomputed': (dict(with_cp=True), {}),
            'accumulated': ({}, dict(optim_wrapper=dict(accumulative_counts=2))),
            'clipped': ({}, dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.1)))),
            'averaged': ({}, dict(custom_hooks=[EMA])),
        }
        variants = {
            f'{network}_{name}': dict(entries, model=make(**options))
            for network, make in NETWORKS.items()
            for name, (options, entries) in alone.items()
        }
        variants['repvgg_decayed'] = dict(model=repvgg(), custom_hooks=[DECAY])
        names = list(variants)
        train(**variants)
        for name in names:
            one_model(name)

    @pytest.mark.long
    @pytest.mark.skipif(
        digit_version(torch.__version__) < digit_version('2.2'),
        reason='gloo of torch 2.1 lacks what FSDP gathers parameters by',
    )
    def test_fsdp(self, tmp_path, train, call):
        """By mmengine's FlexibleRunner; each process holds its part of the parameters."""
        wrapper = dict(
            type='MMFullyShardedDataParallel',
            # A process has no GPU of its number.
            device_id='cpu',
            use_orig_params=True,
            auto_wrap_policy=dict(type=POLICY, min_num_params=500),
        )
        # Offloading to where they are would free them before they are written.
        saving = dict(rank0_only=True, offload_to_cpu=False)
        states = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', **saving),
            optim_state_dict_config=dict(type='FullOptimStateDictConfig', **saving),
        )
        strategy = dict(type='FSDPStrategy', state_dict_cfg=states, model_wrapper=wrapper)
        sharded = dict(runner_type='FlexibleRunner', strategy=strategy)
        train(
            **{name: dict(sharded, model=network()) for name, network in NETWORKS.items()}
        )
        for name in NETWORKS:
            (config,) = (tmp_path / name).glob('variant_*.py')
            checkpoint = tmp_path / name / 'epoch_2.pth'
            assert 'optimizer' in torch.load(checkpoint, weights_only=True)
            call('reparam', config, checkpoint, tmp_path / f'{name}.pth')


class TestCommands:
    """What the scripts run."""

    @pytest.fixture
    def commands(self, tmp_path):
        """Run a script with programs that print their arguments, one on a line."""
        for name in ('python', 'srun'):
            path = tmp_path / name
            path.write_text('#!/bin/sh\nfor word in "$0" "$@"; do echo "$word"; done\n')
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

        def commands(script: str, *arguments, **env: str) -> list[str]:
            path = f'{tmp_path}:/usr/bin:/bin'
            done = run('bash', TOOLS / script, *arguments, PATH=path, **env)
            program, *words = succeed(done).splitlines()
            return [Path(program).name, *words]

        return commands

    @pytest.mark.parametrize(
        ('script', 'arguments'),
        [('dist_train', ['a b.py']), ('dist_test', ['a b.py', 'c.pth'])],
    )
    def test_torchrun(self, commands, script, arguments):
        tool = str(TOOLS / script.replace('dist_', '')) + '.py'
        command = commands(f'{script}.sh', *arguments, 4, '--amp', '--work-dir', 'x y')
        assert command == [
            *('python', '-m', 'torch.distributed.run', '--nnodes=1', '--node_rank=0'),
            *('--master_addr=127.0.0.1', '--master_port=29500', '--nproc_per_node=4', tool),
            *(*arguments, '--launcher', 'pytorch', '--amp', '--work-dir', 'x y'),
        ]
        env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='7')
        assert commands(f'{script}.sh', *arguments, 8, **env)[3:8] == [
            *('--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1', '--master_port=7'),
            '--nproc_per_node=8',
        ]

    @pytest.mark.parametrize(
        ('script', 'names'),
        [
            ('dist_train.sh', ('CONFIG', 'GPUS')),
            ('dist_test.sh', ('CONFIG', 'CKPT', 'GPUS')),
        ],
    )
    def test_usage(self, script, names):
        for count in range(len(names)):
            done = run('bash', TOOLS / script, *names[:count])
            assert done.returncode != 0
            usage = f'usage: tools/{script} {" ".join(names)} [ARGUMENTS]'
            assert done.stderr.endswith(f'{usage}\n')
            assert not done.stdout

    def test_slurm(self, commands):
        env = dict(GPUS='4', GPUS_PER_NODE='2', SRUN_ARGS='--qos high')
        command = commands('slurm_train.sh', 'part', 'job', 'a b.py', 'x y', '--amp', **env)
        assert command == [
            *('srun', '--partition=part', '--job-name=job', '--gres=gpu:2', '--ntasks=4'),
            *('--ntasks-per-node=2', '--cpus-per-task=5', '--kill-on-bad-exit=1'),
            *('--qos', 'high', 'python', '-u', str(TOOLS / 'train.py'), 'a b.py'),
            *('--work-dir', 'x y', '--launcher', 'slurm', '--amp'),
        ]
