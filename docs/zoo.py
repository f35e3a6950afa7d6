"""Write docs/model_zoo.md from the metafiles of the configs."""

from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'docs' / 'model_zoo.md'

HEAD = """# Recipes and model zoo

Every config of a published network or task, written by `python docs/zoo.py` from the
metafiles in `configs/`. **The accuracies are the authors', in per cent; none of these
networks was trained here.** Results of the networks that were trained here, on the digits
and on Fashion-MNIST, are in [Choose a block](blocks.md) and in the READMEs of the configs.
Parameters are those of the train form and of the deploy form, FLOPs (multiply-adds) those
of the deploy form.

There are no weights of mmrep's own to download. Where the authors or mmpretrain publish
weights, `python tools/convert_checkpoint.py DOWNLOADED.pth OUT.pth` imports them and checks
that every weight fits: [Migrating](migrating.md) has the list of projects. The checkpoints
of mmpretrain's RepVGG and MobileOne load without that step.
"""
TABLE = (
    '\n| config | parameters, M, train → deploy | GFLOPs | data | published |\n'
    '|---|---|---|---|---|\n'
)


def models(folder: Path) -> Iterator[str]:
    """The rows of a folder's metafile."""
    for model in yaml.safe_load((folder / 'metafile.yml').read_text())['Models']:
        said, config = model['Metadata'], model['Config']
        trained, deployed = (
            f'{said[key] / 1e6:.2f}' for key in ('Training Parameters', 'Parameters')
        )
        results = model.get('Results') or []
        metrics = [
            f'{value} {name.removeprefix("Published ").replace(" Accuracy", "")}'
            for result in results
            for name, value in result['Metrics'].items()
        ]
        data = said['Training Data']
        yield (
            f'| [{model["Name"]}](../{config}) | {trained} → {deployed} '
            f'| {said["FLOPs"] / 1e9:.2f} | {data} | {", ".join(metrics)} |\n'
        )


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for folder in sorted(path.parent for path in ROOT.glob('configs/*/metafile.yml')):
        title = (folder / 'README.md').read_text().splitlines()[0].removeprefix('# ')
        link = f'../{folder.relative_to(ROOT)}/README.md'
        parts += [f'\n## {title}\n\nThe recipes: [{folder.name}]({link}).\n', TABLE]
        parts += models(folder)
    return ''.join(parts)


if __name__ == '__main__':
    OUT.write_text(page())
