import json
import re

import pytest
from mmengine.config import Config
from tiny_projects import write_classification, write_segmentation
from tool_runs import load, succeed, tool

from mmrep.deployment import BLOCKS, build_model
from mmrep.errors import ConfigError
from mmrep.reparam import count_parameters, reparam_blocks


@pytest.fixture
def config(tmp_path):
    path = write_classification(tmp_path)
    cfg = Config.fromfile(path)
    cfg.val_cfg = dict()
    cfg.dump(path)
    return path


def test_figures_and_table(config, tmp_path):
    out = tmp_path / 'new' / 'blocks.json'
    blocks = ['plain', 'DBB', 'QARepVGG']
    options = ['--blocks', *blocks, '--seeds', '2', '--rounds', '1']
    printed = succeed(tool('compare_blocks', config, *options, '--out', out))
    results = json.loads(out.read_text())
    assert [result['block'] for result in results] == blocks
    for result in results:
        assert len(result['accuracy']) == 2 and result['step_ms'] > 0
        assert result['latency_ms'] > 0 and result['memory'] > 0
        train, deploy = result['parameters']
        assert f'{result["block"]} ' in printed
        assert f'{train:,} -> {deploy:,}' in printed
    sizes = {result['block']: result['parameters'] for result in results}
    # All of them are the same network once they are fused.
    assert len({deploy for _, deploy in sizes.values()}) == 1
    assert sizes['DBB'][0] > sizes['QARepVGG'][0] > sizes['plain'][0]
    assert not list(tmp_path.glob('work_dirs*'))


def test_int8(config, tmp_path):
    """Each recipe of each network has its accuracy, and the figures differ."""
    pytest.importorskip('onnxruntime')
    out = tmp_path / 'int8.json'
    options = ['--blocks', 'RepVGG', 'RepVGG-L2', '--seeds', '2', '--rounds', '1']
    decay = ['--cfg-options', 'optim_wrapper.optimizer.weight_decay=1e-4']
    arguments = [config, *options, '--int8', '--out', out, *decay]
    printed = succeed(tool('compare_blocks', *arguments))
    results = json.loads(out.read_text())
    assert [result['block'] for result in results] == ['RepVGG', 'RepVGG-L2']
    for result in results:
        assert list(result['int8']) == list(result['sqnr'])
        assert list(result['int8']) == ['per tensor', 'per channel']
        for name, accuracies in result['int8'].items():
            assert len(accuracies) == 2 and all(0 <= top1 <= 100 for top1 in accuracies)
            assert len(result['sqnr'][name]) == 2 and min(result['sqnr'][name]) > 5
        assert sum(result['sqnr']['per tensor']) < sum(result['sqnr']['per channel'])
    assert re.search(r'block +fp32 +per tensor +dB +per channel +dB *\n', printed)
    # What is not a terminal has a line for each network.
    assert re.search(r'^RepVGG-L2, seed 1: \d+\.\d\d$', printed, re.MULTILINE)


def test_the_l2_of_the_equivalent_kernel(config, monkeypatch):
    compare = load('compare_blocks')
    options = dict(custom_hooks=[dict(type='Mine')])
    with pytest.raises(ConfigError, match=r'has no optim_wrapper\.optimizer\.weight_decay'):
        compare.with_block(str(config), options, 'RepVGG-L2')
    options['optim_wrapper.optimizer.weight_decay'] = 3e-4
    own, other = (
        compare.with_block(str(config), options, name) for name in ('RepVGG-L2', 'RepVGG')
    )
    assert own.model == other.model
    assert own.custom_hooks == [
        dict(type='Mine'),
        dict(type='mmrep.EquivalentKernelDecayHook', weight_decay=3e-4),
    ]
    keys = own.optim_wrapper.paramwise_cfg.custom_keys
    assert {key: value.decay_mult for key, value in keys.items()} == {
        'branch_3x3.conv': 0,
        'branch_1x1.conv': 0,
    }
    assert other.custom_hooks == [dict(type='Mine')]


def test_another_seed_is_another_network(config, monkeypatch):
    compare = load('compare_blocks')
    found = []
    monkeypatch.setattr(
        compare.Runner,
        'train',
        lambda runner: found.append(next(runner.model.parameters()).sum().item()),
    )
    for seed in (0, 1, 0):
        cfg = compare.with_block(str(config), None, 'RepVGG')
        compare.train(cfg, seed, str(config.parent / 'work'))
    assert found[0] == found[2] != found[1]


def test_every_block_is_there(config):
    compare = load('compare_blocks')
    assert {'plain', 'branches', *BLOCKS, compare.CUSTOM_L2} == set(compare.COMPARED)
    sizes = {}
    for name in compare.USUAL:
        cfg = compare.with_block(str(config), None, name)
        model = build_model(cfg)
        sizes[name] = count_parameters(model)
        (kind,) = {type(b).__name__ for b in reparam_blocks(model).values()}
        expected = BLOCKS.get(
            name, 'BranchBlock' if name == 'branches' else 'ConvNormBlock'
        )
        assert kind == expected.removeprefix('mmrep.')
    assert len(set(sizes.values())) == len(sizes)


def test_a_deploy_form_of_other_accuracy_is_an_error(config, refused, monkeypatch):
    from mmengine.runner import ValLoop

    real, calls = ValLoop.run, []

    def run(loop):
        metrics = real(loop)
        calls.append(loop)
        return {key: value + 60 * (len(calls) % 2) for key, value in metrics.items()}

    monkeypatch.setattr(ValLoop, 'run', run)
    options = ['--blocks', 'DBB', '--seeds', '1', '--rounds', '1']
    options += ['--cfg-options', 'train_cfg.max_epochs=0']
    refused('compare_blocks', config, *options, says='the deploy form of DBB has a top-1')


def test_wrong_input(config, refused, tmp_path):
    options = ['--blocks', 'plain', '--seeds', '1', '--rounds', '1']
    (tmp_path / 'there.json').write_text('')
    there = ['--out', tmp_path / 'there.json']
    refused('compare_blocks', config, *options, *there, says='--overwrite')
    host = ['--cfg-options', 'model.backbone.type=mmpretrain.RepVGG']
    refused('compare_blocks', config, *options, *host, says='has no backbone of mmrep')
    no_data = ['--cfg-options', 'train_dataloader=None']
    refused('compare_blocks', config, *options, *no_data, says='train_dataloader')
    no_size = ['--cfg-options', 'train_dataloader.batch_size=None']
    refused('compare_blocks', config, *options, *no_size, says='no train_dataloader.batch')
    cfg = Config.fromfile(config)
    cfg.custom_hooks = [dict(type='EMAHook')]
    cfg.dump(tmp_path / 'averaged.py')
    averaged = tmp_path / 'averaged.py'
    refused('compare_blocks', averaged, *options, says='leave its EMAHook out')
    (tmp_path / 'seg').mkdir()
    segmentor = write_segmentation(tmp_path / 'seg')
    refused(
        'compare_blocks',
        segmentor,
        *options,
        says='tiny_segmentor.py has no train_cfg.max_epochs',
    )
    ran = tool('compare_blocks', config, '--blocks', 'Inception')
    assert ran.returncode == 2 and re.search("invalid choice: 'Inception'", ran.stderr)
