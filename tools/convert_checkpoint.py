"""Convert a checkpoint of another project to one of mmrep's models."""

import argparse

from mmengine.config import Config

from mmrep.checkpoints import out_path
from mmrep.cli import ToolParser, busy, name_argument, run_tool
from mmrep.errors import printable
from mmrep.importers import LAYOUTS, Imported, import_checkpoint


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='RepVGG-A0-train.pth repvgg-a0.pth',
        description='Import the weights of a RepVGG, RepVGGplus, DBB network, MobileOne, '
        'UniRepLKNet or other network from another project: rename the keys, load them '
        'strictly into the backbone that fits their shapes, write them as a checkpoint of '
        'mmpretrain, and print the configs of its backbone and head.',
    )
    parser.add_argument(
        'source', type=name_argument, help='checkpoint of the other project, in either form'
    )
    parser.add_argument(
        'out',
        type=name_argument,
        help='checkpoint to write: .pth or .safetensors',
    )
    parser.add_argument(
        '--from',
        dest='layout',
        choices=['auto', *LAYOUTS],
        default='auto',
        help='layout of the source: that of the authors of a block, or of timm, mmpretrain '
        '(also mmcls) or keras (.weights.h5) (default: auto, by the keys)',
    )
    parser.add_argument(
        '--arch',
        help='architecture that the weights must have, as A0, plus-L2pse, resnet50, s0 or '
        '31B (default: found from the shapes)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser.parse_args()


def show(result: Imported) -> None:
    """Print what was imported, and the configs as Python to paste."""
    print(f'# {printable(result.out)}: {result.used} weights of {result.layout}')
    for kind, count in result.left_out.items():
        print(f'# left out: {count} keys, {kind}')
    if result.note:
        print(f'# note: {result.note}')
    configs = dict(backbone=result.backbone, head=result.head)
    configs = {name: config for name, config in configs.items() if config}
    print(Config(configs).pretty_text, end='')


def main() -> None:
    args = parse_args()
    out = out_path(args.out, '.pth', '.safetensors')
    with busy('importing'):
        result = import_checkpoint(
            args.source, out, args.layout, args.arch, overwrite=args.overwrite
        )
    show(result)


if __name__ == '__main__':
    run_tool(main)
