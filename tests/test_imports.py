"""The imports between the parts of mmrep go in one direction."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmrep

PACKAGE = Path(mmrep.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))


def name_of(file: Path) -> str:
    """The name of a file's module, such as ``mmrep.reparam.fold``."""
    parts = file.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(file: Path, inside: bool = False) -> set[str]:
    """The absolute names that a file imports; ``inside`` functions as well."""
    package = name_of(file).split('.')
    if file.name != '__init__.py':
        package = package[:-1]
    nodes = set(ast.walk(ast.parse(file.read_text())))
    if not inside:
        for function in [n for n in nodes if isinstance(n, ast.FunctionDef)]:
            nodes -= set(ast.walk(function))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names |= {f'{module}.{alias.name}' for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    """Whether a name is one of the packages, or in one."""
    return any(name == package or name.startswith(f'{package}.') for package in packages)


#: What each room, a module or package, may import of mmrep besides itself. A module
#: belongs to the innermost room that it is in. Every room is listed.
ROOMS = {
    'mmrep.version': (),
    'mmrep.errors': (),
    'mmrep.hosts': (),
    'mmrep.registry': (),
    'mmrep.reparam.transforms': (),
    'mmrep.reparam.geometry': (),
    'mmrep.reparam.fold': ('mmrep.reparam.geometry', 'mmrep.reparam.transforms'),
    'mmrep.reparam.foreign': (),
    'mmrep.reparam.modules': (),
    'mmrep.reparam.deploy': (
        'mmrep.reparam.geometry',
        'mmrep.reparam.fold',
        'mmrep.reparam.foreign',
        'mmrep.reparam.modules',
    ),
    'mmrep.reparam.pairs': ('mmrep.reparam.geometry', 'mmrep.reparam.fold'),
    'mmrep.reparam.equivalence': ('mmrep.reparam.deploy',),
    'mmrep.reparam': (),
    'mmrep.models.layers': ('mmrep.registry', 'mmrep.reparam'),
    'mmrep.models.blocks': ('mmrep.registry', 'mmrep.reparam', 'mmrep.models.layers'),
    # A body does not import blocks: it builds those that its config names.
    'mmrep.models.backbones': ('mmrep.registry', 'mmrep.reparam', 'mmrep.models.layers'),
    'mmrep.models.heads': ('mmrep.registry', 'mmrep.reparam', 'mmrep.models.layers'),
    'mmrep.models.deployed': ('mmrep.registry', 'mmrep.reparam'),
    'mmrep.models': (),
    'mmrep.expansion': (
        'mmrep.hosts',
        'mmrep.registry',
        'mmrep.reparam',
        'mmrep.models.blocks',
    ),
    'mmrep.checkpoints': ('mmrep.errors',),
    'mmrep.importers': (
        'mmrep.checkpoints',
        'mmrep.errors',
        'mmrep.models',
        'mmrep.registry',
        'mmrep.version',
    ),
    'mmrep.engine': (
        'mmrep.errors',
        'mmrep.hosts',
        'mmrep.registry',
        'mmrep.reparam',
        'mmrep.models.blocks',
        'mmrep.checkpoints',
        'mmrep.deployment',
    ),
    'mmrep.deployment': (
        'mmrep.errors',
        'mmrep.hosts',
        'mmrep.registry',
        'mmrep.expansion',
        'mmrep.models',
        'mmrep.reparam',
        'mmrep.checkpoints',
        'mmrep.version',
    ),
    'mmrep.analysis': ('mmrep.reparam', 'mmrep.models.blocks', 'mmrep.models.layers'),
    'mmrep.benchmark': (
        'mmrep.errors',
        'mmrep.checkpoints',
        'mmrep.deployment',
        'mmrep.hosts',
        'mmrep.reparam',
    ),
    'mmrep.quantization': (
        'mmrep.errors',
        'mmrep.benchmark',
        'mmrep.checkpoints',
        'mmrep.deployment',
        'mmrep.hosts',
    ),
    'mmrep.cli': ('mmrep.errors', 'mmrep.deployment'),
    'mmrep': ('mmrep',),
}


def room_of(name: str) -> str:
    """The innermost room that a module or name is in."""
    return max((room for room in ROOMS if within(name, room)), key=len)


@pytest.mark.parametrize('file', FILES, ids=name_of)
def test_dependencies_point_one_way(file):
    room = room_of(name_of(file))
    assert room != 'mmrep' or file.parent == PACKAGE, 'a new room: say what it may use'
    for name in imports(file, inside=True):
        if within(name, 'mmrep'):
            assert within(name, room, *ROOMS[room]), f'{room} uses {name}'


def test_reparam_imports_torch_only():
    """The mathematics import no package of OpenMMLab."""
    allowed = {'torch', 'mmrep', *sys.stdlib_module_names}
    for file in (PACKAGE / 'reparam').glob('*.py'):
        for name in imports(file, inside=True):
            assert name.split('.')[0] in allowed, f'{file.name} imports {name}'


@pytest.mark.parametrize('file', FILES, ids=name_of)
def test_no_host_at_import_time(file):
    """Hosts are imported through the registry, and mmcv-lite has no ``mmcv.ops``."""
    for name in imports(file):
        assert not within(name, 'mmpretrain', 'mmseg', 'tools', 'mmcv.ops'), name


def test_registry_imports_mmengine_only():
    """mmengine would hide an ImportError of this file."""
    names = imports(PACKAGE / 'registry.py', inside=True)
    assert names
    assert all(within(name, 'mmengine') for name in names)


def test_imports_are_found():
    """The function ``imports`` of this file finds imports that exist."""
    assert 'mmrep.reparam.transforms.fuse_bn' in imports(PACKAGE / 'reparam' / 'fold.py')
    assert 'mmcv' in imports(PACKAGE / '__init__.py')
    assert 'mmrep.models.layers.MTSPPF' in imports(PACKAGE / 'models/backbones/repvgg.py')


WITHOUT_HOSTS = """
import sys
for name in ('mmpretrain', 'mmseg', 'mmcv.ops', 'mmdet'):
    sys.modules[name] = None
import torch
import mmrep
from mmengine.registry import MODELS
model = MODELS.build(dict(type='mmrep.RepVGG', arch='A0', base_channels=8)).eval()
x = torch.randn(1, 3, 64, 64)
expected = model(x)[0]
model.switch_to_deploy()
assert (model(x)[0] - expected).norm() < 1e-4 * expected.norm()
assert MODELS.build(dict(type='mmrep.DBBResNet', depth=18, base_channels=4)).train()(x)
loaded = {name for name in sys.modules if sys.modules[name] is not None}
assert not loaded & {'mmpretrain', 'mmseg', 'mmcv.ops'}
"""


def test_works_without_hosts_and_with_mmcv_lite():
    process = subprocess.run(
        [sys.executable, '-c', WITHOUT_HOSTS], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('name', ['mmcv', 'mmengine'])
def test_what_both_lines_call_mmcv_is_asked_for(name):
    code = f'import sys; sys.modules["{name}"] = None; import mmrep'
    process = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith('ImportError: mmrep needs mmcv and mmengine (')
    assert "mim install 'mmcv>=" in last and 'pip install onedl-mmcv' in last


def test_what_is_imported_is_declared():
    """But for mmcv and mmengine, and for the extras that only functions import."""
    texts = [
        (PACKAGE.parent / f'requirements/{name}.txt').read_text()
        for name in ('runtime', 'onnx')
    ]
    declared = set(re.findall(r'^[\w-]+', '\n'.join(texts), re.MULTILINE))
    used = {name.split('.')[0] for file in FILES for name in imports(file)}
    used -= {*sys.stdlib_module_names, 'mmrep', 'mmcv', 'mmengine'}
    assert used and {'pyyaml' if name == 'yaml' else name for name in used} <= declared


def test_import_loads_no_deployment():
    code = 'import sys, mmrep; print(*sys.modules)'
    loaded = subprocess.check_output([sys.executable, '-c', code], text=True).split()
    assert 'mmrep.engine' in loaded
    tools = ('mmrep.deployment', 'mmrep.importers', 'mmrep.benchmark', 'mmrep.checkpoints')
    assert not [name for name in loaded if within(name, *tools)]
