"""Unpack Fashion-MNIST for mmpretrain's ``FashionMNIST``.

The four files are those of https://github.com/zalandoresearch/fashion-mnist, which Debian
and Ubuntu have as the package ``dataset-fashion-mnist`` in /usr/share/datasets: 60,000 and
10,000 images of 28x28 pixels in ten classes.
"""

import argparse
import gzip
import tempfile
import zlib
from pathlib import Path

from mmrep.cli import ToolParser, path_argument, run_tool
from mmrep.errors import UserError

DEBIAN = '/usr/share/datasets/fashion-mnist'
#: The header of each file (magic number, count, sizes), and how many bytes follow it.
FILES = {
    f'{split}-{kind}-ubyte': (header + number.to_bytes(4, 'big') + shape, size * number)
    for split, number in (('train', 60000), ('t10k', 10000))
    for kind, header, shape, size in (
        ('images-idx3', b'\0\0\x08\x03', 2 * (28).to_bytes(4, 'big'), 28 * 28),
        ('labels-idx1', b'\0\0\x08\x01', b'', 1),
    )
}


def read(folder: Path, name: str) -> bytes:
    """Read a file, compressed or not, and check its header and size."""
    packed, plain = folder / f'{name}.gz', folder / name
    if not (packed.exists() or plain.exists()):
        raise UserError(
            f'{folder} has no {name}.gz: give the folder of the four files, which '
            f'`apt install dataset-fashion-mnist` puts into {DEBIAN}'
        )
    header, size = FILES[name]
    expected = len(header) + size
    path = packed if packed.exists() else plain
    try:
        # Read no more than one byte beyond the expected size.
        with (gzip.open if path is packed else open)(path, 'rb') as file:
            content = file.read(expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{path} is broken ({error}): download it again') from None
    if not content.startswith(header) or len(content) != expected:
        raise UserError(f'{path} is not the published file: download it again')
    return content


def parse_args() -> argparse.Namespace:
    parser = ToolParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=path_argument, help='folder to write')
    parser.add_argument(
        '--source',
        type=path_argument,
        default=DEBIAN,
        help=f'folder of the four files (default: {DEBIAN})',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out.resolve()
    if out.exists() and not args.overwrite:
        raise UserError(f'{args.out} exists: give another folder, or --overwrite')
    if out.exists() and {path.name for path in out.iterdir()} - set(FILES):
        raise UserError(
            f'{args.out} holds other files than those of this tool and is not '
            'overwritten: give another folder'
        )
    contents = {name: read(args.source, name) for name in FILES}
    out.parent.mkdir(parents=True, exist_ok=True)
    # OUT appears by one rename: an interrupted run leaves no part of it.
    with tempfile.TemporaryDirectory(prefix='.fashion-', dir=out.parent) as folder:
        new = Path(folder, 'new')
        new.mkdir()
        for name, content in contents.items():
            (new / name).write_bytes(content)
        if out.exists():
            out.rename(Path(folder, 'old'))
        new.rename(out)
    print(f'train: 60000 images, test: 10000 images in {args.out}')


if __name__ == '__main__':
    run_tool(main)
