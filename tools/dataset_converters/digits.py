"""Write scikit-learn's handwritten digits as two small data sets.

``OUT/cls`` holds the 1,797 scanned digits in a folder for each class, for mmpretrain's
``CustomDataset``. ``OUT/seg`` holds scenes of two to four of them with per-pixel masks,
for mmseg's ``BaseSegDataset``. ``val`` shows no digit that ``train`` shows.
``OUT/digits.json`` records which digits are in which split and in which scene.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmrep.cli import ToolParser, path_argument, run_tool, whole_number
from mmrep.errors import UserError

VAL_SHARE = 0.2
SCENE_SIZE = 64
DIGIT_SIZES = (18, 28)  # in a scene; a scan has 8x8 pixels
INK = 0.35  # share of full ink from which on a pixel belongs to the digit
RECORD = 'digits.json'

Box = tuple[int, int, int]


def split_digits(
    labels: np.ndarray, per_class: int | None, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Indices of ``train`` and ``val``: disjoint, each class in the same shares."""
    splits = dict(train=[], val=[])
    for label in range(10):
        indices = rng.permutation(np.flatnonzero(labels == label))[:per_class]
        num_val = max(1, round(len(indices) * VAL_SHARE))
        splits['val'] += indices[:num_val].tolist()
        splits['train'] += indices[num_val:].tolist()
    return {split: sorted(indices) for split, indices in splits.items()}


def apart(a: Box, b: Box) -> bool:
    """Whether two boxes (top, left, side) are at least one pixel apart."""
    return any(
        max(a[axis], b[axis]) > min(a[axis] + a[2], b[axis] + b[2]) for axis in (0, 1)
    )


def place_boxes(num_boxes: int, rng: np.random.Generator) -> list[Box]:
    """Boxes of random sizes and places in a scene, apart from each other."""
    boxes = []
    while len(boxes) < num_boxes:
        side = int(rng.integers(*DIGIT_SIZES, endpoint=True))
        top, left = rng.integers(SCENE_SIZE - side, size=2, endpoint=True).tolist()
        box = (top, left, side)
        if all(apart(box, other) for other in boxes):
            boxes.append(box)
        else:
            # A large box in the middle may leave no room: drop the oldest one.
            boxes = boxes[1:]
    return boxes


def compose_scene(
    images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw digits on a noisy background.

    Args:
        images: The digits, shape (N, 8, 8), uint8.
        labels: Their classes, shape (N,).
        rng: Source of places, sizes and brightness.

    Returns:
        The scene and its mask, uint8, shape (64, 64). The mask is 0 on the background
        and a digit's class plus 1 on the digit.
    """
    scene = rng.normal(rng.uniform(0, 80), 8, (SCENE_SIZE, SCENE_SIZE))
    mask = np.zeros(scene.shape, np.uint8)
    boxes = place_boxes(len(images), rng)
    for image, label, (top, left, side) in zip(images, labels, boxes, strict=True):
        digit = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(digit) / 255
        window = np.s_[top : top + side, left : left + side]
        scene[window] += ink * (rng.uniform(150, 255) - scene[window])
        mask[window] = np.where(ink > INK, label + 1, 0)
    return scene.clip(0, 255).round().astype(np.uint8), mask


def save_png(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_digits(out: Path, args: argparse.Namespace) -> dict:
    """Write both data sets and their record; return the record."""
    digits = load_digits()
    # The scans have the values 0 to 16.
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    rng = np.random.default_rng(args.seed)
    splits = split_digits(digits.target, args.per_class, rng)
    record = dict(seed=args.seed, digits=splits, scenes={})
    for split, indices in splits.items():
        for i in indices:
            save_png(images[i], out / f'cls/{split}/{digits.target[i]}/{i:04d}.png')
        scenes = record['scenes'][split] = []
        for n in range(args.scenes[split == 'val']):
            chosen = rng.choice(indices, size=rng.integers(2, 5), replace=False)
            scene, mask = compose_scene(images[chosen], digits.target[chosen], rng)
            save_png(scene, out / f'seg/images/{split}/{n:05d}.png')
            save_png(mask, out / f'seg/annotations/{split}/{n:05d}.png')
            scenes.append(chosen.tolist())
    (out / RECORD).write_text(json.dumps(record))
    return record


def parse_args() -> argparse.Namespace:
    parser = ToolParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=path_argument, help='folder to write')
    parser.add_argument(
        '--seed', type=whole_number(0), default=0, help='random seed (default: 0)'
    )
    parser.add_argument(
        '--scenes',
        type=whole_number(1),
        nargs=2,
        metavar=('TRAIN', 'VAL'),
        default=(2000, 400),
        help='number of scenes to train and to validate (default: 2000 400)',
    )
    parser.add_argument(
        '--per-class',
        # One to train, one to validate.
        type=whole_number(2),
        help='use only this many digits of each class (default: all)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise UserError(f'{args.out} exists: give another folder, or --overwrite')
    if args.out.exists() and not (args.out / RECORD).is_file():
        raise UserError(
            f'{args.out} has no {RECORD}, so this tool did not write it: give another '
            'folder'
        )


def main() -> None:
    args = parse_args()
    check(args)
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # OUT appears by one rename: an interrupted run leaves no part of it.
    with tempfile.TemporaryDirectory(prefix='.digits-', dir=out.parent) as folder:
        record = write_digits(Path(folder, 'new'), args)
        if out.exists():
            out.rename(Path(folder, 'old'))
        Path(folder, 'new').rename(out)
    for split, indices in record['digits'].items():
        num_scenes = len(record['scenes'][split])
        print(f'{split}: {len(indices)} digits, {num_scenes} scenes in {args.out}')


if __name__ == '__main__':
    run_tool(main)
