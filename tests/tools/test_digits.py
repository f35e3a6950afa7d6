"""tools/dataset_converters/digits.py."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tool_runs import assert_one_sentence, load, tool

from mmrep.errors import UserError

pytest.importorskip('sklearn')

TOOL = 'dataset_converters/digits'


@pytest.fixture(scope='module')
def digits():
    return load(TOOL)


@pytest.fixture
def write(digits, monkeypatch):
    """Run the tool in this process, on little data."""

    def run(out, *options):
        small = ['--scenes', '12', '6', '--per-class', '5']
        monkeypatch.setattr(sys, 'argv', ['digits.py', str(out), *small, *options])
        digits.main()
        return out

    return run


def contents(folder):
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(path):
    return np.asarray(Image.open(path))


def test_same_seed_same_bytes(write, tmp_path):
    first, again = (contents(write(tmp_path / name)) for name in ('a', 'b'))
    other = contents(write(tmp_path / 'c', '--seed', '1'))
    assert first == again
    scene = 'seg/images/train/00000.png'
    assert first[scene] != other[scene]


def test_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write('~/digits')
    assert (tmp_path / 'digits/digits.json').is_file()


def test_all_digits_are_used_once(digits):
    labels = digits.load_digits().target
    splits = digits.split_digits(labels, None, np.random.default_rng(0))
    assert sorted(splits['train'] + splits['val']) == list(range(1797))
    for label in range(10):
        share = np.mean(labels[splits['val']] == label)
        assert share == pytest.approx(np.mean(labels == label), abs=0.01)


def test_train_and_val_show_disjoint_digits(write, tmp_path):
    out = write(tmp_path / 'digits')
    shown = {
        split: {int(path.stem) for path in out.glob(f'cls/{split}/*/*.png')}
        for split in ('train', 'val')
    }
    assert len(shown['train']) == 40
    assert len(shown['val']) == 10
    assert not shown['train'] & shown['val']
    scenes = json.loads((out / 'digits.json').read_text())['scenes']
    for split in shown:
        assert {i for scene in scenes[split] for i in scene} <= shown[split]


def test_folders_name_the_classes(digits, write, tmp_path):
    source = digits.load_digits()
    for path in write(tmp_path / 'digits').glob('cls/*/*/*.png'):
        index = int(path.stem)
        assert int(path.parent.name) == source.target[index]
        expected = np.round(source.images[index] * 255 / 16)
        np.testing.assert_array_equal(read(path), expected)


def test_masks_show_the_scenes_digits(digits, write, tmp_path):
    labels = digits.load_digits().target
    out = write(tmp_path / 'digits')
    scenes = json.loads((out / 'digits.json').read_text())['scenes']
    sizes = set()
    for split, shown in scenes.items():
        images, masks = (
            sorted(out.glob(f'seg/{kind}/{split}/*.png'))
            for kind in ('images', 'annotations')
        )
        assert [path.name for path in images] == [path.name for path in masks]
        for image, mask, indices in zip(
            map(read, images), map(read, masks), shown, strict=True
        ):
            assert image.shape == mask.shape == (64, 64)
            assert image.dtype == mask.dtype == np.uint8
            assert set(np.unique(mask)) == {0, *(labels[indices] + 1)}
            # A digit is brighter than what is around it.
            assert image[mask > 0].mean() > image[mask == 0].mean() + 30
            sizes.add(len(indices))
    assert sizes == {2, 3, 4}


def test_all_classes_occur(digits):
    images, rng = np.full((10, 8, 8), 255, np.uint8), np.random.default_rng(0)
    classes = set()
    for label in range(10):
        _, mask = digits.compose_scene(images[:2], np.array([label, 0]), rng)
        classes |= set(np.unique(mask).tolist())
    assert classes == set(range(11))


@pytest.mark.parametrize('num_boxes', [2, 3, 4])
def test_digits_do_not_touch(digits, num_boxes):
    rng = np.random.default_rng(0)
    for _ in range(50):
        covered = np.zeros((64, 64), int)
        for top, left, side in digits.place_boxes(num_boxes, rng):
            # With a margin of one pixel to the right and below.
            covered[top : top + side + 1, left : left + side + 1] += 1
            assert top + side <= 64
            assert left + side <= 64
        assert covered.max() == 1


def test_refuses_an_existing_folder(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    done = tool(TOOL, tmp_path)
    assert done.returncode == 1
    assert_one_sentence(done.stderr, f'{tmp_path} exists: give another folder')
    assert contents(tmp_path) == {'mine.txt': b'mine'}


def test_overwrites_no_folder_of_others(write, tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(UserError, match=r'no digits\.json'):
        write(tmp_path, '--overwrite')
    assert contents(tmp_path) == {'mine.txt': b'mine'}


def test_overwrites_its_own_folder(write, tmp_path):
    out = write(tmp_path / 'digits')
    (out / 'stale.png').touch()
    before = contents(out)
    with pytest.raises(UserError, match='exists'):
        write(out)
    assert contents(out) == before
    write(out, '--overwrite')
    del before['stale.png']
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_cut_run_leaves_nothing(digits, write, monkeypatch, tmp_path, error):
    def save_png(array, path):
        if 'seg' in path.parts:
            raise error
        saved(array, path)

    saved = digits.save_png
    monkeypatch.setattr(digits, 'save_png', save_png)
    with pytest.raises(type(error)):
        write(tmp_path / 'digits')
    assert not list(tmp_path.iterdir())
