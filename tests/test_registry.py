"""How a config of an OpenMMLab package finds what is registered here."""

import json

import pytest
from mmengine.registry import MODELS as ROOT
from processes import run_python
from torch import nn

from mmrep.models.backbones import DBBResNet, RepVGG
from mmrep.models.blocks import DiverseBranchBlock
from mmrep.registry import HOOKS, MODELS, VISBACKENDS, share_names

#: Looks names up in a new interpreter: as a config that does not mention mmrep does, and
#: as one with ``custom_imports`` does.
SCRIPT = """
import json, sys
host = sys.argv[1]
from importlib import import_module
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
registry = import_module(f'{host}.registry').MODELS
import_module(f'{host}.models')
init_default_scope(host)
TINY = dict(arch='A0', base_channels=8)
BUILDS = {
    'mmrep.RepVGG': TINY,
    'mmrep.DBBResNet': dict(depth=18, base_channels=4),
    'mmrep.DiverseBranchBlock': dict(in_channels=2, out_channels=2),
    'RepVGG': TINY,
    'DBBResNet': dict(depth=18, base_channels=4),
    'DiverseBranchBlock': dict(in_channels=2, out_channels=2),
}

def built(registry):
    found = {}
    for name, options in BUILDS.items():
        try:
            found[name] = type(registry.build(dict(type=name, **options))).__module__
        except KeyError:
            found[name] = None
    return found

order = json.loads(sys.argv[2])
results = {}
for step in order:
    if step == 'import':
        import_modules_from_strings(**Config(dict(custom_imports=dict(
            imports=['mmrep'], allow_failed_imports=False))).custom_imports)
    else:
        results[step] = built(registry)
print('RESULT', json.dumps(results))
"""

OURS = {
    'RepVGG': 'mmrep.models.backbones.repvgg',
    'DBBResNet': 'mmrep.models.backbones.resnet',
    'DiverseBranchBlock': 'mmrep.models.blocks.diverse_branch_block',
}


def look_up(host: str, *order: str) -> dict[str, dict[str, str | None]]:
    """Modules that names resolve to from a host's scope, after the steps in order."""
    process = run_python('-c', SCRIPT, host, json.dumps(order))
    assert process.returncode == 0, process.stderr
    (line,) = (s for s in process.stdout.splitlines() if s.startswith('RESULT '))
    return json.loads(line.removeprefix('RESULT '))


@pytest.mark.parametrize('host', ['mmpretrain', 'mmseg'])
def test_names_in_a_hosts_scope(host):
    results = look_up(host, 'silent', 'import', 'with custom_imports')
    for names in results.values():
        assert {name: names[f'mmrep.{name}'] for name in OURS} == OURS
    # In mmpretrain's scope the bare name RepVGG stays mmpretrain's; mmseg has no RepVGG.
    theirs = {'mmpretrain': {'RepVGG': 'mmpretrain.models.backbones.repvgg'}}
    bare = results['with custom_imports']
    assert {name: bare[name] for name in OURS} == OURS | theirs.get(host, {})


def test_names_without_a_host():
    for name, cls in (('RepVGG', RepVGG), ('DBBResNet', DBBResNet)):
        assert ROOT.get(f'mmrep.{name}') is ROOT.get(name) is MODELS.get(name) is cls


def test_every_public_class_is_registered():
    from mmrep.models import backbones, blocks, heads

    for room in (backbones, blocks, heads):
        for name in room.__all__:
            cls = getattr(room, name)
            base = name in ('ReparamBackbone', 'ChainBackbone', 'ReparamBlock')
            if isinstance(cls, type) and issubclass(cls, nn.Module) and not base:
                assert MODELS.module_dict[name] is cls


def test_registries_belong_to_mmrep():
    for registry in (MODELS, HOOKS, VISBACKENDS):
        assert registry.scope == 'mmrep'
        assert registry.parent.scope == 'mmengine'
        assert all(c.__module__.startswith('mmrep.') for c in registry.module_dict.values())
        assert registry.module_dict.items() <= registry.parent.module_dict.items()


def test_sharing_again_changes_nothing():
    before = dict(ROOT.module_dict)
    share_names()
    assert ROOT.module_dict == before


def test_sharing_leaves_the_roots_names_alone(monkeypatch):
    class Conv2d(nn.Module):
        pass

    theirs = ROOT.module_dict['Conv2d']
    monkeypatch.setitem(MODELS.module_dict, 'Conv2d', Conv2d)
    share_names()
    assert ROOT.module_dict['Conv2d'] is theirs


def test_a_block_of_a_users_own():
    """Wherever it is registered, a body of mmrep can build it."""

    @ROOT.register_module()
    class UsersBlock(DiverseBranchBlock):
        pass

    try:
        model = DBBResNet(18, base_channels=4, block_cfg=dict(type='UsersBlock'))
        assert isinstance(model.layer1[0].conv1, UsersBlock)
    finally:
        del ROOT.module_dict['UsersBlock']
