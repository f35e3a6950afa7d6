"""The command ``mmrep``."""

import re
from pathlib import Path

import pytest
from processes import run_python

from mmrep import console
from mmrep.deployment import list_models

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
RUN = 'from mmrep.console import main; main()'


def run(*arguments: str):
    return run_python('-c', RUN, *arguments)


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',)])
def test_help_names_every_command(arguments):
    ran = run(*arguments)
    assert ran.returncode == 0
    shown = re.findall(r'^  (\w+)  ', ran.stdout, re.M)
    assert shown == [*console.COMMANDS, 'list']


def test_every_tool_is_a_command():
    tools = {path.stem for path in TOOLS.glob('*.py')} - {'demo'}
    assert tools == {tool for tool, _ in console.COMMANDS.values()}


@pytest.mark.parametrize('command', console.COMMANDS)
def test_a_command_s_help_ends_with_an_example(command):
    ran = run(command, '--help')
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f'usage: mmrep {command} ')
    assert re.search(rf'^example: mmrep {command}\s\S+', ran.stdout, re.M)


def test_list():
    assert run('list').stdout.split() == list_models()
    assert run('list', 'replknet*').stdout.split() == list_models('replknet*')


def test_no_such_command():
    ran = run('fuse')
    assert ran.returncode == 2 and ran.stdout == ''
    assert ran.stderr.endswith("error: there is no command 'fuse'\n")


def test_a_tool_runs(tmp_path):
    """On a shipped config by its name, with the exit status of the tool."""
    ran = run('expand', 'resnet18-tiny_1xb64_digits', '--dry-run')
    assert ran.returncode == 0, ran.stderr
    assert 'backbone.layer4.1.conv2' in ran.stdout
    ran = run('reparam', 'repvgg-tiny_1xb64_digits', 'none.pth', str(tmp_path / 'o.pth'))
    assert ran.returncode == 1 and 'none.pth' in ran.stderr.splitlines()[-1]


def test_an_unknown_name_of_a_config():
    ran = run('train', 'repvgg-a')
    assert ran.returncode == 2
    assert "there is no network 'repvgg-a': choose from" in ran.stderr
