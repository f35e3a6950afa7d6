"""What all tools share: exit statuses, error messages and types of arguments."""

import argparse
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from processes import run_python

from mmrep.cli import (
    ToolParser,
    add_config_options,
    name_argument,
    path_argument,
    rtol_argument,
    seconds_argument,
    shape_argument,
    whole_number,
)

TOOL = """
from torch import distributed
from mmrep.cli import run_tool
from mmrep.errors import UserError

def main():
    if {grouped}:
        store = distributed.HashStore()
        distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    {then}

run_tool(main)
print('ended, in a group:', distributed.is_initialized())
"""


def run(**parts: object) -> CompletedProcess:
    return run_python('-c', TOOL.format(**parts))


@pytest.mark.parametrize('grouped', [True, False])
def test_a_tool_leaves_its_process_group(grouped):
    done = run(grouped=grouped, then=f'assert distributed.is_initialized() is {grouped}')
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'ended, in a group: False\n'


def test_a_tool_that_failed_waits_for_nobody():
    # A barrier would wait for the other processes of the job.
    wait = 'distributed.barrier = None; raise UserError("mend this")'
    done = run(grouped=True, then=wait)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: mend this'
    assert 'Traceback' not in done.stderr
    assert done.stdout == ''


@pytest.mark.parametrize(
    ('then', 'sentence'),
    [
        ('raise OSError(28, "No space left on device")', 'No space left on device'),
        ('raise ConnectionResetError("the peer is gone")', 'the peer is gone'),
        (
            'raise OSError(28, "No space left on device", "a.pth")',
            'No space left on device',
        ),
        # As a data loader raises again the error of a worker.
        ('raise FileNotFoundError("Caught it in worker 0.\\na[i] for i")', 'Caught it in'),
        ('raise OSError', 'OSError'),
    ],
)
def test_an_error_inside_the_work_keeps_its_traceback(then, sentence):
    done = run(grouped=False, then=then)
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert 'Traceback (most recent call last):' in before
    assert any(line.endswith('in main') for line in before)
    assert last.startswith('error: ') and sentence in last


@pytest.mark.parametrize(
    ('then', 'sentence'),
    [
        ('open("no/such.png")', 'no/such.png does not exist: check the path'),
        ('open("/")', "Is a directory: '/'"),
        ('raise PermissionError(13, "Permission denied", "a.pth")', 'Permission denied'),
    ],
)
def test_a_path_is_the_users_to_mend(then, sentence):
    done = run(grouped=False, then=then)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: ')
    assert sentence in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_an_interrupt_has_a_status_of_its_own():
    done = run(grouped=False, then='raise KeyboardInterrupt')
    assert (done.returncode, done.stderr, done.stdout) == (130, 'interrupted\n', '')


@pytest.mark.parametrize(
    ('kind', 'text', 'value'),
    [
        (whole_number(0), '0', 0),
        (whole_number(0), str(2**63 - 1), 2**63 - 1),
        (whole_number(-1, 1), '-1', -1),
        (whole_number(2), '+2', 2),
        (rtol_argument, '1e-4', 1e-4),
        (rtol_argument, '.5', 0.5),
        (seconds_argument, '0', 0),
        (seconds_argument, '1e9', 1e9),
        (name_argument, '~', str(Path.home())),
        (name_argument, 'https://a.b//c', 'https://a.b//c'),
        (path_argument, '~/a', Path.home() / 'a'),
    ],
)
def test_argument(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ('kind', 'texts'),
    [
        (whole_number(0), ['', '-1', '1.5', '1e3', 'a', '0x1', str(2**63), '9' * 5000]),
        (whole_number(1, 5), ['0', '6']),
        (rtol_argument, ['', 'nan', 'inf', '-inf', '-1', '0', '-0', '1', '1e9', 'a']),
        (seconds_argument, ['', 'nan', 'inf', '-1', 'a']),
        (name_argument, ['']),
        (path_argument, ['']),
    ],
)
def test_no_argument(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as info:
            kind(text)
        assert len(str(info.value)) < 200


def test_config_options():
    parser = ToolParser()
    add_config_options(parser)
    options = ['a.b=1', 'c=[1,(2,x)]', 'a.0.d=e=f', "g='h'"]
    found = parser.parse_args(
        ['--cfg-options', *options, '--cfg-options', 'i=']
    ).cfg_options
    assert found == {'a.b': 1, 'c': [1, (2, 'x')], 'a.0.d': 'e=f', 'g': 'h', 'i': ''}


class TestShape:
    """``--shape`` beside positionals and other options."""

    @pytest.fixture
    def parse(self):
        parser = ToolParser()
        parser.add_argument('config')
        parser.add_argument('out')
        parser.add_argument('--shape', type=shape_argument)
        parser.add_argument('--seed')
        return lambda *args: parser.parse_args(list(args))

    @pytest.mark.parametrize(
        ('numbers', 'shape'),
        [
            (['64'], (3, 64, 64)),
            (['64', '48'], (3, 64, 48)),
            (['1', '64', '48'], (1, 64, 48)),
            (['64,48'], (3, 64, 48)),
            (['1,64,48'], (1, 64, 48)),
            (['1x64x48'], (1, 64, 48)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        ('before', 'after'),
        [
            ([], ['net.py', 'out.pth']),
            (['net.py'], ['out.pth']),
            (['net.py', 'out.pth'], []),
            ([], ['--seed', '7', 'net.py', 'out.pth']),
            (['--seed', '7', 'net.py', 'out.pth'], []),
        ],
        ids=str,
    )
    def test_numbers(self, parse, numbers, shape, before, after):
        args = parse(*before, '--shape', *numbers, *after)
        assert args.shape == shape
        assert (args.config, args.out) == ('net.py', 'out.pth')

    def test_equals_sign(self, parse):
        assert parse('--shape=64,48', 'net.py', 'out.pth').shape == (3, 64, 48)

    def test_none(self, parse):
        assert parse('net.py', 'out.pth', '--seed', '7').shape is None

    @pytest.mark.parametrize(
        'numbers',
        [
            *(['0'], ['64', '0'], ['64', '-1'], ['-8', '8'], ['a'], ['64,a'], ['64.5']),
            *(['64', '48.5'], ['1', '3', '64', '64'], ['1,3', '64', '64']),
        ],
        ids=str,
    )
    def test_no_shape(self, parse, numbers, capsys):
        with pytest.raises(SystemExit, match='2'):
            parse('net.py', 'out.pth', '--shape', *numbers)
        last = capsys.readouterr().err.splitlines()[-1]
        assert f'{",".join(numbers)!r} is not a shape: give' in last
