"""The documentation: its code runs, and its links lead to existing targets."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from pages import fences, run_page
from processes import run_python
from torch import nn

from mmrep import get_model
from mmrep.analysis import branch_boxes, draw_block
from mmrep.checkpoints import read_checkpoint
from mmrep.deployment import BLOCKS, build_model, read_config
from mmrep.models import blocks
from mmrep.registry import MODELS
from mmrep.reparam import reparam_blocks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(
    [
        *ROOT.glob('*.md'),
        *ROOT.glob('configs/*/README.md'),
        *ROOT.glob('benchmarks/results/*.md'),
        *(page for page in DOCS.rglob('*.md') if '_build' not in page.parts),
    ]
)
#: Where Debian's package ``dataset-fashion-mnist`` puts its files.
FASHION = Path('/usr/share/datasets/fashion-mnist')
OWN_BLOCK = ROOT / 'docs' / 'your_own_block.md'
INT8 = ROOT / 'docs' / 'int8.md'
version = tuple(map(int, torch.__version__.split('.')[:2]))


NOTEBOOKS = sorted(DOCS.glob('tutorials/*.ipynb'))

#: Pages whose code runs in seconds, and those that train.
QUICK = ('faq', 'how_fusing_works', 'index', 'migrating')
TRAINING = ('deployment', 'get_started', 'speed', 'training', 'your_data', 'your_model')

#: A command in README.md: a tool and its arguments.
COMMAND = re.compile(r'^python (tools/\S+\.py)(.*)$', re.M)


def code(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for name, text in fences(page) if name == language]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r'^#+ (.+)$', page.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', t.lower()).replace(' ', '-') for t in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        path, _, anchor = link.partition('#')
        if re.match(r'\w+://', path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    'name', [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in TRAINING)]
)
def test_what_is_on_a_page_runs(name, tmp_path):
    run_page(DOCS / f'{name}.md', tmp_path)


@pytest.mark.long
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs(notebook, tmp_path):
    """And prints the lines that are stored in it, except for the numbers."""
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    kept = nbformat.read(notebook, 4)
    ran = nbformat.read(notebook, 4)
    resources = dict(metadata=dict(path=str(tmp_path)))
    nbclient.NotebookClient(ran, timeout=900, resources=resources).execute()
    assert printed(ran) == printed(kept) != []


def printed(notebook) -> list[str]:
    """The text that a notebook prints, without numbers, and the types of its pictures."""
    outputs = [o for cell in notebook.cells for o in cell.get('outputs', [])]
    found = [
        output.text if output.output_type == 'stream' else min(output.data)
        for output in outputs
        if output.get('name') != 'stderr'
    ]
    return [re.sub(r'[\d.,e+-]+', '0', text) for text in found]


def test_every_page_with_code_is_run():
    """Pages in ``own`` have tests of their own."""
    own = {'your_own_block', 'int8', 'blocks'}
    found = {page.stem for page in DOCS.glob('*.md') if [*fences(page)]}
    assert found == {*QUICK, *TRAINING, *own}


def test_python_in_the_readme_runs(tmp_path):
    script = '\n'.join(code(ROOT / 'README.md', 'python'))
    ran = run_python('-c', script, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.long
def test_commands_in_the_readme_run(tmp_path):
    """In order, on a digits config of few epochs, with files for the capitals."""
    for file, name in (
        ('net.py', 'repvgg/repvgg-tiny_1xb64_digits.py'),
        ('PLAIN.py', 'expanded/resnet18-tiny_1xb64_digits.py'),
    ):
        (tmp_path / file).write_text(
            f"_base_ = '{ROOT / 'configs' / name}'\n"
            'train_cfg = dict(max_epochs=6)\n'
            'param_scheduler = dict(T_max=6)\n'
        )
    for file, name in (
        ('published.pth', 'repvgg-a0_8xb32_in1k'),
        ('PLAIN.pth', 'resnet18-tiny_1xb64_digits'),
    ):
        torch.save(get_model(name).state_dict(), tmp_path / file)
    converter = ROOT / 'tools/dataset_converters/digits.py'
    assert run_python(converter, tmp_path / 'data/digits').returncode == 0
    names = {
        'CONFIG': 'net.py',
        'CKPT': 'work_dirs/net/epoch_6.pth',
        'SRC': 'published.pth',
        'work_dirs/NEW/epoch_N.pth': 'work_dirs/NEW/epoch_6.pth',
    }
    run_page(ROOT / 'README.md', tmp_path, **names)
    written = ('OUT.pth', 'HOST.pth', 'DST.pth', 'FP32.onnx', 'INT8.onnx', 'NEW-OUT.py')
    assert all((tmp_path / name).exists() for name in (*written, 'DIR', 'figures.json'))


def test_tools_in_the_readme_take_what_it_says():
    commands = [
        match
        for text in code(ROOT / 'README.md', 'bash')
        for match in COMMAND.findall(text.replace('\\\n', ' '))
    ]
    helps = {tool: run_python(ROOT / tool, '--help').stdout for tool, _ in commands}
    assert len(helps) > 8
    for tool, arguments in commands:
        for option in re.findall(r'--[a-z-]+', arguments.partition('#')[0]):
            assert option in helps[tool], f'{tool} {option}'


def test_the_site_is_built_without_a_warning(tmp_path):
    """As `make docs` builds it: no reference, link or picture is missing."""
    pytest.importorskip('sphinx')
    options = ('--nitpicky', '--fail-on-warning', '--keep-going', '--quiet')
    ran = subprocess.run(
        [sys.executable, '-m', 'sphinx', *options, str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / 'how_fusing_works.html').read_text()
    # Formulas and scripts need no other server.
    assert '<math' in page and 'src="http' not in page


def test_the_model_zoo_is_that_of_the_metafiles(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import zoo

    assert zoo.OUT.read_text() == zoo.page()
    assert zoo.page().count('_in1k.py)') > 60


@pytest.fixture
def own_block(tmp_path: Path) -> Path:
    """A folder with the files that the page tells its reader to write."""
    for text in code(OWN_BLOCK, 'python'):
        if name := re.match(r'# (\S+\.py)\n', text):
            (tmp_path / name[1]).write_text(text)
    return tmp_path


def test_a_block_of_one_s_own(own_block):
    script = ''.join(t for t in code(OWN_BLOCK, 'python') if not re.match(r'# \S+\.py', t))
    ran = run_python('-c', script, cwd=own_block, PYTHONPATH=str(own_block))
    assert ran.returncode == 0, ran.stderr
    assert 'CrossBlock(' in ran.stdout
    assert (own_block / 'cross.svg').read_text().startswith('<?xml')


def test_a_network_of_one_s_own_block(own_block, monkeypatch):
    monkeypatch.chdir(own_block)
    monkeypatch.syspath_prepend(own_block)
    try:
        model = build_model(read_config('cross-repvgg.py'))
        kinds = {type(block).__name__ for block in reparam_blocks(model).values()}
        assert kinds == {'CrossBlock'}
    finally:
        MODELS.module_dict.pop('CrossBlock', None)


@pytest.mark.long
def test_it_trains_and_deploys(own_block):
    shutil.copytree(ROOT / 'tools', own_block / 'tools')

    def run(*arguments: str) -> CompletedProcess:
        ran = run_python(*arguments, cwd=own_block, PYTHONPATH='.')
        assert ran.returncode == 0, ran.stderr
        return ran

    small = ('--per-class', '5', '--scenes', '1', '1')
    run('tools/dataset_converters/digits.py', 'data/digits', *small)
    (text,) = code(OWN_BLOCK, 'bash')
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines] == 2 * [['PYTHONPATH=.', 'python']]
    for line in lines:
        run(*line.split()[2:])
    assert (own_block / 'deploy.pth').exists() and (own_block / 'deploy.py').exists()


@pytest.mark.long
@pytest.mark.skipif(version < (2, 11), reason='torchao needs torch 2.11')
def test_quantization_in_the_loop(tmp_path):
    """The page's script for the digits: its result loses next to nothing in int8."""
    pytest.importorskip('torchao')
    pytest.importorskip('onnxruntime')
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(*arguments: str) -> None:
        ran = run_python(*arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr

    (script,) = code(INT8, 'python')
    config = re.search(r"^CONFIG = '(.+)'$", script, re.M)[1]
    run('tools/dataset_converters/digits.py', 'data/digits')
    run('tools/train.py', config)
    run('-c', script)
    lines = code(INT8, 'bash')[-1].splitlines()
    assert [line.split()[0] for line in lines] == ['python']
    run(*lines[0].split()[1:])
    said = json.loads((tmp_path / 'qat.json').read_text())['int8']
    top1 = {form: metrics['accuracy/top1'] for form, metrics in said['metrics'].items()}
    assert top1['fp32'] > 97 and top1['fp32'] - top1['int8'] <= 0.5
    assert all(layer['form'] == 'int8' for layer in said['layers'])
    # The weights were trained: they differ from those before.
    checkpoint = re.search(r"^CHECKPOINT = '(.+)'$", script, re.M)[1]
    before = read_checkpoint(tmp_path / checkpoint)
    after = torch.load(tmp_path / 'qat.pth')['state_dict']['head.fc.weight']
    assert not torch.equal(before['state_dict']['head.fc.weight'], after)


@pytest.mark.long
@pytest.mark.parametrize('page', ['blocks', 'int8'])
def test_comparisons_run(page, tmp_path):
    """The commands that take hours, here with one seed and one epoch."""
    if not FASHION.exists():
        pytest.skip('needs the package dataset-fashion-mnist')
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [
        shlex.split(line, comments=True)
        for text in code(DOCS / f'{page}.md', 'bash')
        for line in text.replace('\\\n', ' ').splitlines()
        if re.match(r'python tools/(dataset_converters|compare_blocks)', line)
    ]
    assert {command[1] for command in commands} > {'tools/compare_blocks.py'}
    for _, tool, *arguments in commands:
        if tool == 'tools/compare_blocks.py':
            options = [] if '--cfg-options' in arguments else ['--cfg-options']
            options += ['train_cfg.max_epochs=1', 'param_scheduler.T_max=1']
            arguments += [*options, '--seeds', '1', '--rounds', '1']
        ran = run_python(tool, *arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert 'RepVGG' in ran.stdout or 'LargeKernel' in ran.stdout


def test_costs_and_gains_are_of_every_compared_block():
    """A block that is added has to be measured."""
    page = (ROOT / 'docs' / 'blocks.md').read_text()
    found = set(re.findall(r'^\| (\w+) \| \d+\.\d+ ± \d+\.\d+ \|', page, re.M))
    assert found == {'plain', 'branches', *BLOCKS}


def test_int8_is_of_every_compared_block():
    found = set(
        re.findall(r'^\| ([\w-]+) \| \d+\.\d+ ± \d+\.\d+ \|', INT8.read_text(), re.M)
    )
    usual = {*BLOCKS} - {'DilatedReparam', 'LargeKernel'}
    assert found == {'plain', 'branches', 'RepVGG-L2', *usual}


class TestPictures:
    def test_there_is_one_of_every_block(self):
        page = (ROOT / 'docs' / 'blocks.md').read_text()
        names = {n for n in blocks.__all__ if n.endswith('Block')}
        # The base class, the plain block, and one that only UniRepLKNet has.
        names -= {'ReparamBlock', 'ConvNormBlock', 'PointwiseBlock'}
        assert names == set(re.findall(r'^`(\w+Block)`', page, re.M))

    def test_they_are_of_these_blocks(self, tmp_path):
        """As `python docs/figures.py` draws them."""
        ran = run_python('-c', FIGURES, str(ROOT / 'docs'), str(tmp_path))
        assert ran.returncode == 0, ran.stderr
        there = ROOT / 'docs' / 'images' / 'blocks'
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == sorted(path.name for path in there.iterdir()) and names
        for name in names:
            assert labels(tmp_path / name) == labels(there / name)

    def test_they_show_all_branches(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / 'docs')
        import figures

        drawn = {name: build() for name, build in figures.DRAWN.items()}
        assert all(block.stride == (1, 1) for block in drawn.values())
        numbers = {name: len(block.branches()) for name, block in drawn.items()}
        assert numbers == {
            **dict.fromkeys(['repvgg', 'acb', 'qarepvgg', 'orepa-repvgg', 'scale-sum'], 3),
            **dict.fromkeys(['mobileone', 'orepa', 'dilated-reparam', 'branches'], 6),
            'dbb': 4,
            'large-kernel': 2,
        }

    def test_what_is_after_the_sum(self, tmp_path):
        for position, order in (
            ('before_act', ['SE', 'ReLU']),
            ('after_act', ['ReLU', 'SE']),
        ):
            block = blocks.QARepVGGBlock(4, 4, se_cfg=dict(ratio=2), se_position=position)
            draw_block(block, tmp_path / 'block.svg')
            found = labels(tmp_path / 'block.svg')
            # In the train form, and in the deploy form.
            tails = [name for name in found if name in ('SE', 'ReLU')]
            assert tails[::2] == tails[1::2] == order

    def test_boxes(self):
        dbb = blocks.DiverseBranchBlock(4, 4, 3).branches()
        assert branch_boxes(dbb['branch_kxk']) == [('3x3', 'conv'), ('norm', 'norm')]
        kinds = [label for label, _ in branch_boxes(dbb['branch_1x1_kxk'])]
        assert kinds == ['1x1 + identity', 'norm', '3x3', 'norm']
        dilated = blocks.DilatedReparamBlock(4, 4, 7, groups=4).branches()
        assert branch_boxes(dilated['branch_k3_d3'])[0] == (
            '3x3 depthwise\ndilation 3',
            'conv',
        )
        assert branch_boxes(nn.Dropout(0.1)) == [('Dropout', 'other')]
        assert branch_boxes(nn.MaxPool2d(3)) == [('MaxPool2d', 'other')]

    def test_a_block_without_branches_is_refused(self, tmp_path):
        block = blocks.RepVGGBlock(4, 4, deploy=True)
        with pytest.raises(ValueError, match='RepVGGBlock is in deploy form'):
            draw_block(block, tmp_path / 'block.svg')
        assert not list(tmp_path.iterdir())


#: Draws the pictures into another folder.
FIGURES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import figures
figures.OUT = Path(sys.argv[2])
figures.main()
"""


def labels(picture: Path) -> list[str]:
    return re.findall(r'<text [^>]*>([^<]*)</text>', picture.read_text())
