"""tools/convert_checkpoint.py."""

import os
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from tool_runs import assert_one_sentence, load, succeed, tool

from mmrep.importers import Imported

timm = pytest.importorskip('timm')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A checkpoint of timm's."""
    path = tmp_path_factory.mktemp('source') / 'a0.pth'
    torch.save(timm.create_model('repvgg_a0', num_classes=5).state_dict(), path)
    return path


def test_import_and_refuse_to_replace(source, tmp_path, call):
    out = tmp_path / 'made' / 'a0.pth'
    printed = succeed(tool('convert_checkpoint', source, out))
    assert printed.startswith(f'# {out}: 351 weights of timm\n')
    names = {}
    exec(printed, names)  # ready to paste
    meta = torch.load(out, weights_only=True)['meta']
    assert names['backbone'] == meta['backbone']
    assert names['backbone'] == dict(type='mmrep.RepVGG', arch='A0', out_indices=(3,))
    assert names['head'] == meta['head'] and names['head']['num_classes'] == 5

    before = out.read_bytes()
    done = tool('convert_checkpoint', source, out)
    assert done.returncode == 1 and not done.stdout
    assert_one_sentence(done.stderr, f'{out} exists: give another name, or --overwrite')
    assert out.read_bytes() == before

    # In another process, with other hashes of strings, and another folder and time.
    again = tmp_path / 'again.pth'
    call('convert_checkpoint', source, again)
    assert again.read_bytes() == before

    again = tmp_path / 'again.safetensors'
    call('convert_checkpoint', source, again)
    weights = torch.load(out, weights_only=True)['state_dict']
    found = safetensors.torch.load_file(again)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)


def test_options(source, tmp_path, call, capsys):
    out = tmp_path / 'out.pth'
    out.write_text('old')
    options = ['--from', 'timm', '--arch', 'A0', '--overwrite']
    call('convert_checkpoint', source, out, *options)
    assert torch.load(out, weights_only=True)['meta']['backbone']['arch'] == 'A0'
    assert '351 weights of timm' in capsys.readouterr().out


def test_safetensors(source, tmp_path, call, capsys):
    path, out = tmp_path / 'a0.safetensors', tmp_path / 'out.pth'
    weights = torch.load(source, weights_only=True)
    save_file(weights, path, metadata={'format': 'pt'})
    call('convert_checkpoint', path, out)
    assert '351 weights of timm' in capsys.readouterr().out
    call('convert_checkpoint', source, tmp_path / 'same.pth')
    written, same = (
        torch.load(tmp_path / name, weights_only=True) for name in ('out.pth', 'same.pth')
    )
    assert written['meta']['mmrep']['source'] == 'a0.safetensors'
    assert written['state_dict'].keys() == same['state_dict'].keys()
    for key, value in same['state_dict'].items():
        assert torch.equal(written['state_dict'][key], value)


@pytest.mark.parametrize('kind', ['pipe', 'compressed', 'complex'])
def test_hostile_sources(kind, source, tmp_path, refused):
    path, out = tmp_path / 'a0.pth', tmp_path / 'out.pth'
    if kind == 'pipe':
        os.mkfifo(path)
        says = 'is a pipe, socket or device'
    elif kind == 'compressed':
        with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, 'w', 8) as packed:
            for name in whole.namelist():
                packed.writestr(name, whole.read(name))
        says = 'that is compressed: give the file that torch wrote'
    else:
        weights = torch.load(source, weights_only=True)
        weights['stem.conv_kxk.conv.weight'] = weights['stem.conv_kxk.conv.weight'] + 0j
        torch.save(weights, path)
        says = '1 of incompatible dtype: stem.conv_kxk.conv.weight (torch.complex64 in the'
    refused('convert_checkpoint', path, out, says=says)
    assert not out.exists()


def test_all_but_the_configs_is_in_comments(capsys):
    backbone = dict(type='mmrep.RepVGG', arch=dict(group_layer_map={2: 4}))
    left_out = {'state of the optimizer': 3}
    done = Imported('keras', backbone, None, 7, left_out, 'take care', Path('a.pth'))
    load('convert_checkpoint').show(done)
    printed = capsys.readouterr().out
    assert '# left out: 3 keys, state of the optimizer\n# note: take care\n' in printed
    exec(printed, names := {})
    assert names['backbone'] == backbone and 'head' not in names


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (('--arch', 'B0'), 'leave --arch B0 out'),
        (('--from', 'dbb'), 'another layout with --from'),
    ],
)
def test_refusals(options, sentence, source, tmp_path, refused):
    out = tmp_path / 'out.pth'
    refused('convert_checkpoint', source, out, *options, says=sentence)
    assert not out.exists()


def test_a_file_that_is_not_there(tmp_path, refused):
    says = 'does not exist: check the path'
    refused('convert_checkpoint', tmp_path / 'none.pth', tmp_path / 'out.pth', says=says)


def test_a_layout_that_is_no_choice(source, tmp_path, call, capsys):
    with pytest.raises(SystemExit, match='2'):
        call('convert_checkpoint', source, tmp_path / 'out.pth', '--from', 'jax')
    assert 'repvggplus' in capsys.readouterr().err
