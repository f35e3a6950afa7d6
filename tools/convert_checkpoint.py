"""Convert a checkpoint of another project to one of mmrep's models."""

import argparse

from mmengine.config import Config

from mmrep.checkpoints import out_path
from mmrep.cli import ToolParser, name_argument, run_tool
from mmrep.errors import printable
from mmrep.importers import LAYOUTS, Imported, import_checkpoint


def parse_args() -> argparse.Namespace:
    parser = ToolParser(
        example='RepVGG-A0-train.pth repvgg-a0.pth',
        description='Rename the weights of a RepVGG, RepVGGplus, DBB network, MobileOne or '
        'UniRepLKNet from another project, prove that they fit the backbone that their '
        'shapes tell, write them in the shape of mmpretrain, and print the config of both.',
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
        help="project of the source: the blocks' own, or timm, mmpretrain (or mmcls), "
        'keras (.weights.h5) (default: auto, by the keys)',
    )
    parser.add_argument(
        '--arch',
        help='architecture, as A0, plus-L2pse, resnet50, s0 or 31B, of which the weights '
        'must be (default: the one of the shapes)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace OUT')
    return parser.parse_args()


def show(result: Imported) -> None:
    """Print what was result, and the configs as Python to paste."""
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
    show(
        import_checkpoint(
            args.source, out, args.layout, args.arch, overwrite=args.overwrite
        )
    )


if __name__ == '__main__':
    run_tool(main)
