"""tools/export_onnx.py."""

import subprocess
from pathlib import Path

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.config import Config
from tiny_projects import HEIGHT, WIDTH, classifier_model, segmentor_model
from tool_runs import assert_one_sentence, succeed, tool
from torch import nn

from mmrep.deployment import build_model, enter_scope
from mmrep.deployment.onnx_tracing import exporters
from mmrep.hosts import forward
from mmrep.reparam import reparam_blocks

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

#: Blocks of the networks in tiny_projects.
BLOCKS, IDENTITIES = 6, 3


class Case:
    """A config and a checkpoint as files, and the model that they are of."""

    def __init__(self, folder: Path, scope: str, model: dict) -> None:
        self.folder = folder
        config = Config(dict(default_scope=scope, model=model))
        config.dump(folder / 'net.py')
        enter_scope(config)
        self.model = randomise(build_model(config))
        torch.save(dict(state_dict=self.model.state_dict()), folder / 'net.pth')

    def run(self, *options: str) -> subprocess.CompletedProcess:
        files = ['~/net.py', '~/net.pth', '~/net.onnx']
        return tool('export_onnx', *files, *options, HOME=str(self.folder))

    def succeed(self, *options: str) -> list[list[str]]:
        """What was printed: the cells of the tables' lines, and the other lines."""
        printed = succeed(self.run(*options))
        return [line.split() for line in printed.replace('│', ' ').splitlines()]

    def check(self, *shape: int) -> None:
        """The file computes what the checkpoint's model does."""
        x = image(*shape, dtype=torch.float32, seed=7)
        (found,) = onnxruntime.InferenceSession(self.folder / 'net.onnx').run(
            None, {'input': x.numpy()}
        )
        assert_same(forward(self.model, x), torch.from_numpy(found), tolerance=1e-5)


def test_classifier(tmp_path, call):
    pytest.importorskip('mmpretrain')
    case = Case(tmp_path, 'mmpretrain', classifier_model())
    printed = case.succeed('--shape', '24', '16')
    exporter = exporters(None)[0]
    pool = 'ReduceMean' if exporter == 'torch.export' else 'GlobalAveragePool'
    for row in (['Conv', '6'], ['Relu', '6'], [pool, '1'], ['Gemm', '1']):
        assert row in printed
    (compared,) = [row for row in printed if row[:4] == ['3', 'of', '1x3x24x16', 'output']]
    *_, rel_l2, max_abs, agreement = compared
    assert 0 < float(rel_l2) < 1e-5 and 0 < float(max_abs) < 1e-3
    assert agreement == '100.00%'
    size = (tmp_path / 'net.onnx').stat().st_size
    assert printed[-1] == ['written:', str(tmp_path / 'net.onnx'), f'({size:,}', 'bytes)']
    assert f'graph of the deploy form, 6 blocks, written by {exporter}:'.split() in printed
    case.check(1, 3, 24, 16)
    nodes = [node.op_type for node in onnx.load(tmp_path / 'net.onnx').graph.node]
    assert nodes == ['Conv', 'Relu'] * BLOCKS + [pool, 'Reshape', 'Gemm']

    # In another process, with other hashes of strings, and another folder and time.
    files = [tmp_path / 'net.py', tmp_path / 'net.pth', tmp_path / 'again' / 'net.onnx']
    call('export_onnx', *files, '--shape', '24', '16')
    before = (tmp_path / 'net.onnx').read_bytes()
    assert files[-1].read_bytes() == before
    done = case.run()
    assert done.returncode == 1 and not done.stdout
    assert_one_sentence(
        done.stderr, f'{tmp_path}/net.onnx exists: give another name, or --overwrite'
    )
    assert (tmp_path / 'net.onnx').read_bytes() == before


def test_segmentor(tmp_path):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmcv.ops')
    case = Case(tmp_path, 'mmseg', segmentor_model())
    (tmp_path / 'net.onnx').write_text('old')
    options = ['--form', 'train', '--dynamic', '--opset', '13', '--overwrite']
    other_act = 'model.backbone.act_cfg.type=LeakyReLU'
    printed = case.succeed(*options, '--cfg-options', other_act)
    sizes = [row[2] for row in printed if row[:2] == ['1', 'of']]
    assert sizes == [
        f'2x3x{HEIGHT}x{WIDTH}',
        f'1x3x{HEIGHT + 32}x{WIDTH + 64}',
        f'3x3x{HEIGHT + 33}x{WIDTH + 1}',
    ]
    # The head has two more convs, one of them with a norm.
    assert ['Conv', str(2 * BLOCKS + 2)] in printed
    assert ['BatchNormalization', str(2 * BLOCKS + IDENTITIES + 1)] in printed
    assert ['LeakyRelu', str(BLOCKS)] in printed
    for block in reparam_blocks(case.model).values():
        block.act = nn.LeakyReLU()
    case.check(1, 3, 40, 33)
    assert [entry.version for entry in onnx.load(tmp_path / 'net.onnx').opset_import] == [
        13
    ]


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('dynamic', [False, True])
def test_upsampled_logits(tmp_path, dynamic, align_corners):
    """Those that mmseg's prediction takes the argmax of."""
    pytest.importorskip('mmseg')
    pytest.importorskip('mmcv.ops')
    model = segmentor_model()
    model['decode_head']['align_corners'] = align_corners
    case = Case(tmp_path, 'mmseg', model)
    said = case.succeed()
    (note,) = [row for row in said if row[:1] == ['note:']]
    assert note[1:3] == ['output', 'is'] and note[-2:] == ['with', '--upsample']
    said = case.succeed('--upsample', '--overwrite', *(['--dynamic'] if dynamic else []))
    assert not [row for row in said if row[:1] == ['note:']]
    assert ['Resize', '1'] in said
    size = (40, 33) if dynamic else (HEIGHT, WIDTH)
    x = image(1, 3, *size, dtype=torch.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / 'net.onnx').run(
        None, {'input': x.numpy()}
    )
    predicted = case.model(x, mode='predict')[0].seg_logits.data
    assert found.shape[2:] == size
    assert_same(predicted, torch.from_numpy(found[0]), tolerance=1e-5)


def test_what_is_no_segmentor_is_not_upsampled(tmp_path):
    pytest.importorskip('mmpretrain')
    done = Case(tmp_path, 'mmpretrain', classifier_model()).run('--upsample')
    assert done.returncode == 1
    assert_one_sentence(
        done.stderr,
        '--upsample is for segmentors, and ImageClassifier is not one: leave it out',
    )
