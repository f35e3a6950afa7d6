"""tools/dataset_converters/fashion_mnist.py."""

import gzip
import sys

import numpy as np
import pytest
from tool_runs import assert_one_sentence, load, tool

from mmrep.errors import UserError

TOOL = 'dataset_converters/fashion_mnist'
SIZES = {'train': 6, 't10k': 4}


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Run the tool in this process, on files of a few images."""
    converter = load(TOOL)
    folder = tmp_path / 'source'
    folder.mkdir()
    for name, (header, size) in list(converter.FILES.items()):
        number = SIZES[name.partition('-')[0]]
        header = header[:4] + number.to_bytes(4, 'big') + header[8:]
        size = size // (60000 if 'train' in name else 10000) * number
        monkeypatch.setitem(converter.FILES, name, (header, size))
        values = np.random.default_rng(size).integers(0, 10, size, dtype=np.uint8)
        with gzip.open(folder / f'{name}.gz', 'wb') as file:
            file.write(header + values.tobytes())

    def run(*options):
        argv = ['fashion_mnist.py', str(tmp_path / 'out'), '--source', str(folder)]
        monkeypatch.setattr(sys, 'argv', [*argv, *options])
        converter.main()
        return tmp_path / 'out'

    return run


def unpacked(path):
    return gzip.decompress(path.read_bytes())


def test_the_host_reads_it(write, tmp_path):
    datasets = pytest.importorskip('mmpretrain.datasets')
    out = write()
    assert len(list(out.iterdir())) == 4
    for split, number in (('train', 6), ('test', 4)):
        dataset = datasets.FashionMNIST(
            str(out), split, download=False, test_mode=split == 'test'
        )
        assert len(dataset) == number
        name = 'train' if split == 'train' else 't10k'
        pixels = unpacked(tmp_path / f'source/{name}-images-idx3-ubyte.gz')[16:]
        expected = np.frombuffer(pixels, np.uint8).reshape(number, 28, 28)
        labels = unpacked(tmp_path / f'source/{name}-labels-idx1-ubyte.gz')[8:]
        for i in range(number):
            assert (dataset[i]['img'] == expected[i]).all()
            assert dataset[i]['gt_label'] == labels[i]


def test_uncompressed_and_overwritten(write, tmp_path):
    expected = {path.name: path.read_bytes() for path in write().iterdir()}
    for packed in list((tmp_path / 'source').iterdir()):
        (tmp_path / 'source' / packed.stem).write_bytes(unpacked(packed))
        packed.unlink()
    with pytest.raises(UserError, match='exists: give another folder, or --overwrite'):
        write()
    (tmp_path / 'out' / 'train-labels-idx1-ubyte').write_bytes(b'')
    (tmp_path / 'out' / 'train-images-idx3-ubyte').unlink()
    out = write('--overwrite')
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert {path.name for path in tmp_path.iterdir()} == {'source', 'out'}


def test_what_is_not_its_own_stays(write, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').write_text('')
    with pytest.raises(UserError, match='holds other files than those of this tool'):
        write('--overwrite')
    assert (tmp_path / 'out' / 'thesis.tex').exists()


@pytest.mark.parametrize(
    'fault, says',
    [
        (lambda data: data[:-40], 'is broken|is not the published'),
        (lambda data: b'PK' + data[2:], 'is broken'),
        (lambda data: gzip.compress(gzip.decompress(data) + b'\0'), 'is not the published'),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), 'is not the published'),
        (lambda data: gzip.compress(b'\1' + gzip.decompress(data)[1:]), 'is not the'),
    ],
    ids=['cut', 'no gzip', 'longer', 'shorter', 'other header'],
)
def test_broken(write, tmp_path, fault, says):
    path = tmp_path / 'source/t10k-images-idx3-ubyte.gz'
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises(UserError, match=f'{path} .*({says}).*download it again'):
        write()
    assert not (tmp_path / 'out').exists()


def test_no_source(tmp_path):
    ran = tool(TOOL, 'out', '--source', 'nowhere', cwd=tmp_path)
    assert ran.returncode == 1
    assert_one_sentence(ran.stderr, 'apt install dataset-fashion-mnist')
    assert list(tmp_path.iterdir()) == []
