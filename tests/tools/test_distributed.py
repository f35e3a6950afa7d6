import os
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch
from tool_runs import TOOLS, run, scores, succeed, variant

#: mmengine starts processes on GPUs alone: this lets them be on the CPU.
ON_CPU = """
import torch.nn.parallel
torch.cuda.set_device = lambda device: None
_init = torch.nn.parallel.DistributedDataParallel.__init__
def _init_on_cpu(self, module, device_ids=None, **options):
    _init(self, module, **options)
torch.nn.parallel.DistributedDataParallel.__init__ = _init_on_cpu
"""

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


@pytest.fixture
def launch(tmp_path):
    """Run one of the scripts, on CPUs."""
    (tmp_path / 'sitecustomize.py').write_text(ON_CPU)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    python = Path(sys.executable).parent

    def launch(script: str, *arguments) -> str:
        modules = f'{tmp_path}:{os.environ.get("PYTHONPATH", tmp_path)}'
        env = dict(PATH=f'{python}:/usr/bin:/bin', PYTHONPATH=modules, PORT=port)
        return succeed(run('bash', TOOLS / script, *arguments, **env))

    return launch


@no_gpu
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
def test_test(classifier, tmp_path, launch, predict):
    """The same predictions, though the model is wrapped, and wrapped again."""
    out = tmp_path / 'distributed.pkl'
    launch(
        *('dist_test.sh', classifier.config, classifier.checkpoint, 1),
        *('--deploy', '--tta', '--work-dir', tmp_path, '--out', out, '--out-item', 'pred'),
    )
    torch.testing.assert_close(scores(out), predict(classifier), rtol=1e-4, atol=1e-5)


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

    def test_slurm(self, commands):
        env = dict(GPUS='4', GPUS_PER_NODE='2', SRUN_ARGS='--qos high')
        command = commands('slurm_train.sh', 'part', 'job', 'a b.py', 'x y', '--amp', **env)
        assert command == [
            *('srun', '--partition=part', '--job-name=job', '--gres=gpu:2', '--ntasks=4'),
            *('--ntasks-per-node=2', '--cpus-per-task=5', '--kill-on-bad-exit=1'),
            *('--qos', 'high', 'python', '-u', str(TOOLS / 'train.py'), 'a b.py'),
            *('--work-dir', 'x y', '--launcher', 'slurm', '--amp'),
        ]
