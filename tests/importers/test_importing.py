"""What is found, accounted for and refused, whatever the layout."""

import re

import pytest
import torch
from import_laws import import_weights
from laws import randomise
from mmengine.utils import digit_version
from official_dbb_networks import ResNet
from official_repvgg import RepVGG, RepVGGplus

from mmrep.errors import CheckpointError, UserError
from mmrep.importers import LAYOUTS, import_checkpoint

TINY = dict(num_blocks=(1, 2, 1, 1), widths=(8, 8, 8, 16))


@pytest.fixture
def weights():
    """Of a tiny official RepVGG."""
    return randomise(RepVGG(**TINY)).state_dict()


def refusal(weights, folder, **options):
    """The sentence with which weights are refused, less the file's name."""
    with pytest.raises(CheckpointError) as error:
        import_weights(weights, folder, **options)
    assert not (folder / 'imported.pth').exists()
    sentence = str(error.value)
    assert '\n' not in sentence and str(folder / 'source.pth') in sentence
    return sentence.replace(str(folder / 'source.pth'), 'SOURCE')


def test_the_checkpoint_written(weights, tmp_path):
    done = import_weights(weights, tmp_path)
    written = torch.load(done.out, weights_only=True)
    assert written.keys() == {'state_dict', 'meta'}
    assert {key.split('.')[0] for key in written['state_dict']} == {'backbone', 'head'}
    meta = written['meta']
    assert meta['backbone'] == done.backbone and meta['head'] == done.head
    assert done.head == dict(type='LinearClsHead', num_classes=10, in_channels=16)
    assert meta['mmrep']['source'] == 'source.pth'
    assert meta['mmrep']['source_layout'] == 'repvgg'
    assert len(meta['mmrep']['source_sha256']) == 64


def test_every_weight_arrives(weights, tmp_path):
    done = import_weights(weights, tmp_path)
    written = torch.load(done.out, weights_only=True)['state_dict']
    assert len(written) == len(weights) == done.used

    def sums(state):
        return sorted(value.double().sum().item() for value in state.values())

    assert sums(written) == sums(weights)


def test_half_precision_is_kept(weights, tmp_path):
    weights = {key: value.half() for key, value in weights.items()}
    done = import_weights(weights, tmp_path)
    written = torch.load(done.out, weights_only=True)['state_dict']
    assert {value.dtype for value in written.values()} == {torch.float16}


def test_a_backbone_alone(weights, tmp_path):
    weights = {k: v for k, v in weights.items() if not k.startswith('linear')}
    done = import_weights(weights, tmp_path)
    assert done.head is None and done.used == len(weights)


def test_thousands_of_blocks(weights, tmp_path):
    """Each would take some milliseconds to build."""
    block = {k: v for k, v in weights.items() if k.startswith('stage2.1.')}
    for i in range(2, 400):
        copies = {k.replace('stage2.1.', f'stage2.{i}.'): v for k, v in block.items()}
        weights |= copies
    assert 'SOURCE, read as repvgg, holds' in (said := refusal(weights, tmp_path))
    assert f'{len(weights)} weights, and no network of that layout has more' in said


@pytest.mark.parametrize(
    'key', ['stage1.0.rbr_dense.bn.bias', 'stage2.1.rbr_identity.weight']
)
def test_a_missing_key_is_named(key, weights, tmp_path):
    del weights[key]
    number, leaf = re.search(r'stage(\d\.\d).*\.(\w+)$', key).groups()
    assert re.search(
        rf'give a whole .* \(1 missing: backbone\.stage_{number}\.'
        rf'branch_\w+(\.norm)?\.{leaf}\)',
        refusal(weights, tmp_path),
    )


def test_a_missing_conv_is_named(weights, tmp_path):
    del weights['stage2.1.rbr_dense.conv.weight']
    assert "mmrep's block stage_2.1 is missing" in refusal(weights, tmp_path)


def test_a_stem_is_no_network(weights, tmp_path):
    weights = {k: v for k, v in weights.items() if k.startswith('stage0')}
    assert 'it has no stages' in refusal(weights, tmp_path, layout='repvgg')


@pytest.mark.parametrize('key', ['linear.bias', 'linear.weight'])
def test_half_a_head_is_refused(key, weights, tmp_path):
    del weights[key]
    expected = {
        'linear.bias': '1 missing: head.fc.bias',
        'linear.weight': '1 unexpected: linear.bias',
    }
    assert expected[key] in refusal(weights, tmp_path)


@pytest.mark.parametrize(
    'key', ['rbr_scale.weight', 'stage2.0.rbr_avg.bn.bias', 'stage5.0.rbr_identity.bias']
)
def test_a_key_without_a_rule_is_named(key, weights, tmp_path):
    weights[key] = torch.zeros(1)
    sentence = refusal(weights, tmp_path)
    assert f'read as repvgg, holds keys that this layout does not have ({key})' in sentence
    assert '--from' in sentence


def test_a_key_that_the_network_lacks_is_named(weights, tmp_path):
    weights['stage1.0.rbr_identity.weight'] = torch.zeros(8)
    weights['linear.scale'] = torch.zeros(8)
    assert '2 unexpected: stage1.0.rbr_identity.weight, linear.scale' in refusal(
        weights, tmp_path
    )


@pytest.mark.parametrize(
    ('key', 'shape', 'right'),
    [
        ('stage1.0.rbr_1x1.conv.weight', (9, 8, 1, 1), (8, 8, 1, 1)),
        ('linear.weight', (10, 17), (10, 16)),
    ],
)
def test_another_shape_is_named(key, shape, right, weights, tmp_path):
    weights[key] = torch.zeros(shape)
    sentence = refusal(weights, tmp_path)
    assert (
        f'1 of another shape: {key} ({shape} in the file, {right} in the model)' in sentence
    )


@pytest.mark.parametrize('number', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float8_e5m2])
def test_numbers_that_are_none(number, dtype, weights, tmp_path):
    if dtype is torch.float8_e5m2 and digit_version(torch.__version__) < digit_version(
        '2.2'
    ):
        pytest.skip('this torch cannot save it')
    key = 'stage1.0.rbr_1x1.conv.weight'
    weights[key] = weights[key].float()
    weights[key][3, 2] = number
    weights[key] = weights[key].to(dtype)
    sentence = refusal(weights, tmp_path)
    assert f'holds weights that are nan or inf ({key}): give a' in sentence


def test_a_list_of_keys_ends(weights, tmp_path):
    weights |= {f'stage2.0.other{i}.weight': torch.zeros(1) for i in range(20)}
    sentence = refusal(weights, tmp_path)
    assert 'other7.weight, and 12 more)' in sentence


def test_half_fused_weights_are_refused(weights, tmp_path):
    fused = RepVGG(**TINY, deploy=True).state_dict()
    start = 'stage2.0.rbr_'
    mixed = {k: v for k, v in weights.items() if not k.startswith(start)}
    mixed |= {k: v for k, v in fused.items() if k.startswith(start)}
    sentence = refusal(mixed, tmp_path)
    assert 'unexpected: stage0.rbr_dense.conv.weight' in sentence


def test_two_names_of_one_weight(tmp_path):
    weights = ResNet((2, 2, 2, 2), False, 8).state_dict()
    key = 'stage1.0.conv1.dbb_avg.bn.bn.bias'
    weights[key.replace('bn.bn', 'bn')] = weights[key]
    assert f'{key} and {key.replace("bn.bn", "bn")}, which are the same' in refusal(
        weights, tmp_path
    )


def test_an_se_layer_of_any_width(weights, tmp_path):
    weights = randomise(RepVGG(**TINY, se=4)).state_dict()
    for name, shape in (('down.weight', (3, 8, 1, 1)), ('down.bias', (3,))):
        weights[f'stage1.0.se.{name}'] = torch.zeros(shape)
    assert 'no common squeeze ratio' in refusal(weights, tmp_path)


def test_no_such_network(weights, tmp_path):
    # 9 channels in 2 groups.
    weights['stage1.0.rbr_dense.conv.weight'] = torch.zeros(9, 4, 3, 3)
    assert 'cannot be built: ' in refusal(weights, tmp_path)


def test_unknown_and_ambiguous_layouts(weights, tmp_path):
    other = torch.nn.Linear(2, 2).state_dict()
    sentence = refusal(other, tmp_path)
    assert 'none of the layouts repvgg, repvggplus, dbb' in sentence
    assert 'weight, bias' in sentence
    plus = RepVGGplus((1, 1, 2, 1), (8, 8, 8, 16)).state_dict()
    sentence = refusal({**weights, **plus}, tmp_path)
    assert 'several layouts: name one of repvgg, repvggplus with --from' in sentence


def test_the_layout_given(weights, tmp_path):
    assert import_weights(weights, tmp_path, layout='repvgg').layout == 'repvgg'
    (tmp_path / 'imported.pth').unlink()
    for layout in set(LAYOUTS) - {'repvgg'}:
        sentence = refusal(weights, tmp_path, layout=layout)
        assert 'stage0.rbr_dense.conv.weight' in sentence or 'stage1.0' in sentence


def test_the_architecture_given(tmp_path):
    weights = RepVGG((2, 4, 14, 1), (48, 96, 192, 1280), deploy=True).state_dict()
    assert import_weights(weights, tmp_path, arch='A0').backbone['arch'] == 'A0'
    (tmp_path / 'imported.pth').unlink()
    sentence = refusal(weights, tmp_path, arch='A1')
    assert 'leave --arch A1 out' in sentence and 'of another shape' in sentence
    assert "'A9' is unknown; choose from A0, A1" in refusal(weights, tmp_path, arch='A9')


class Evil:
    def __reduce__(self):
        return print, ('run',)


def test_pickles_that_run_code_are_refused(weights, tmp_path, capsys):
    sentence = refusal({'state_dict': weights, 'config': Evil()}, tmp_path)
    assert 'could run code' in sentence
    assert 'run' not in capsys.readouterr().out


def test_what_is_no_file(tmp_path):
    out = tmp_path / 'out.pth'
    for source, sentence in (
        (tmp_path / 'none.pth', 'does not exist'),
        (tmp_path, 'is a folder'),
        ('https://host/a.pth', r'https://host/a\.pth is an address'),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            import_checkpoint(source, out)
    assert not out.exists()


def test_files_are_not_replaced(weights, tmp_path):
    source, out = tmp_path / 'source.pth', tmp_path / 'out.pth'
    torch.save(weights, source)
    out.write_text('mine')
    with pytest.raises(UserError, match=r'exists: give another name, or --overwrite'):
        import_checkpoint(source, out)
    assert out.read_text() == 'mine'
    with pytest.raises(UserError, match='would replace its source'):
        import_checkpoint(source, source, overwrite=True)
    import_checkpoint(source, out, overwrite=True)
    assert torch.load(out, weights_only=True)['meta']['backbone']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.pth', 'source.pth']


def test_home(weights, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(weights, tmp_path / 'source.pth')
    assert import_checkpoint('~/source.pth', '~/out.pth').out == tmp_path / 'out.pth'
    assert torch.load(tmp_path / 'out.pth', weights_only=True)
    with pytest.raises(UserError, match='would replace its source'):
        import_checkpoint('~/out.pth', tmp_path / 'out.pth', overwrite=True)
