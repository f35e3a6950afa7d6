import copy
from collections.abc import Callable

import pytest
import torch
from laws import assert_same, image, randomise
from mmengine.runner import load_state_dict as load_by_mmengine
from torch import Tensor, nn

from mmrep.expansion import expand
from mmrep.expansion.place import MovedNorm, places
from mmrep.models.blocks import DiverseBranchBlock, RepVGGBlock
from mmrep.reparam import branch_by_branch, switch_to_deploy

DBB = dict(type='mmrep.DiverseBranchBlock')
REPVGG = dict(type='mmrep.RepVGGBlock')


class Residual(nn.Module):
    """Two convs with norms, and one with a bias and none; the last norm comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        )
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 4, 5, stride=2, padding=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.body(x).relu()))
        return self.conv3((x + y).relu())


class Net(nn.Module):
    """A stem of another kernel, two blocks, and a conv that has no place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.stages = nn.ModuleList([Residual()])
        self.last = nn.Conv2d(4, 5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.last(x).relu()


X = image(2, 3, 16, 16, dtype=torch.float32)


@pytest.fixture
def plain() -> Net:
    return randomise(Net())


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad(), branch_by_branch(model):
        output = model(x)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return output


def step(model: nn.Module, x: Tensor = X) -> None:
    """One step of training that changes every branch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        optimizer.step()
    model.eval()


class TestExpand:
    @pytest.mark.parametrize('block', [DBB, dict(REPVGG), dict(type=DiverseBranchBlock)])
    def test_same_function(self, plain, block):
        before, y = copy.deepcopy(plain.state_dict()), outputs(plain)
        done = expand(plain, block, X)
        assert torch.equal(outputs(plain), y)
        own = {
            'stages.0.body.0': 'stages.0.body.1',
            'stages.0.conv2': 'stages.0.norm2',
            'stages.0.conv3': None,
        }
        if block['type'] == REPVGG['type']:
            del own['stages.0.conv3']
            assert (
                done.left.pop('stages.0.conv3')
                == 'RepVGGBlock takes only kernel_size=3, not (5, 5)'
            )
        assert done.replaced == own
        assert list(done.left) == ['stem', 'last']
        assert done.left['stem'] == '1x1'
        assert done.left['last'].startswith('it has neither a bias nor a norm of its')
        after = plain.state_dict()
        kept = [key for key in before if key.startswith(('stem', 'last'))]
        assert all(torch.equal(after[key], before[key]) for key in kept)

    def test_conv_and_norm_are_the_main_branch(self, plain):
        conv, norm = plain.stages[0].body
        conv.weight.requires_grad = False
        norm.eval()
        expand(plain, DBB, X)
        block = plain.stages[0].body[0]
        assert isinstance(block, DiverseBranchBlock)
        assert block.branch_kxk.conv is conv and block.branch_kxk.norm is norm
        assert type(plain.stages[0].body[1]) is MovedNorm
        trained = [p for p in block.parameters() if p.requires_grad]
        assert len(trained) == 2 and {*trained} == {norm.weight, norm.bias}
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 6 and not any(m.training or m.eps != 1e-3 for m in norms)
        assert all(p.requires_grad for p in plain.stages[0].conv3.parameters())
        assert plain.stages[0].conv2.branch_1x1.norm.training

    def test_dry_run(self, plain):
        before = str(plain), copy.deepcopy(plain.state_dict())
        report = expand(plain, DBB, X, dry_run=True)
        assert str(plain) == before[0] and not list(places(plain))
        assert_same(before[1], plain.state_dict(), 0)
        assert expand(plain, DBB, X) == report

    @pytest.mark.parametrize(
        ('options', 'names'),
        [
            (dict(include='stages.*.conv?'), ['conv2', 'conv3']),
            (dict(include=['*.conv2', 're:.*body.*']), ['body.0', 'conv2']),
            (dict(exclude='*.conv2'), ['body.0', 'conv3']),
            (dict(include='*.conv?', exclude=[r're:.*\.conv[12]']), ['conv3']),
            (dict(kernel_sizes=[5]), ['conv3']),
            (dict(kernel_sizes=[(3, 3)]), ['body.0', 'conv2']),
        ],
    )
    def test_what_is_chosen(self, plain, options, names):
        done = expand(plain, DBB, lambda model: model(X), **options)
        assert list(done.replaced) == [f'stages.0.{name}' for name in names]
        if 'kernel_sizes' not in options:
            assert 'excluded' in done.left.values()

    def test_double_precision(self, plain):
        plain.double()
        expand(plain, DBB, X.double())
        assert {p.dtype for p in plain.parameters()} == {torch.float64}
        step(plain, X.double())

    def test_of_one_conv_in_two_places(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        model.append(model[0])
        model.append(nn.Conv2d(3, 3, 3))
        done = expand(model, DBB, X)
        assert done.replaced == {'4': None}
        assert done.left == {'0': 'one module with several names: 0 and 3'}

    @pytest.mark.parametrize('own', [True, False])
    def test_in_a_block(self, own):
        model = nn.Sequential(RepVGGBlock(3, 4) if own else nn.ReLU(), nn.Conv2d(4, 4, 3))
        done = expand(model, DBB, X if own else image(1, 4, 8, 8, dtype=torch.float32))
        left = {'0.branch_3x3.conv': 'it is in a block already', '0.branch_1x1.conv': '1x1'}
        assert done.left == (left if own else {})


class Sampling(nn.Module):
    """Where there is no conv, it is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if isinstance(self.conv, nn.Conv2d) else self.conv(x) + 1


class TestRefusals:
    @pytest.mark.parametrize(
        ('error', 'says', 'options'),
        [
            (
                ValueError,
                r"'no\*' matches no conv: their names are as stem, stages",
                dict(include='no*'),
            ),
            (ValueError, "'re:no' matches no conv", dict(exclude=['re:no'])),
            (ValueError, r'no conv can be replaced: 5 [57]x[57]', dict(kernel_sizes=[9])),
            (ValueError, 'no conv can be replaced: 5 excluded', dict(exclude='*')),
            (TypeError, "'BN' is not a re-param", dict(block_cfg=dict(type='BN'))),
            (TypeError, 'None is not a re-param', dict(block_cfg=dict())),
            (
                TypeError,
                'leave act_cfg',
                dict(block_cfg=dict(DBB, act_cfg=dict(type='ReLU'))),
            ),
            (TypeError, 'leave act_cfg', dict(block_cfg=dict(DBB, se_cfg=dict(ratio=2)))),
            (TypeError, "unexpected .* 'wide'", dict(block_cfg=dict(DBB, wide=2))),
            (RuntimeError, 'channels', dict(example=X[:, :2])),
        ],
    )
    def test_nothing_is_changed(self, plain, error, says, options):
        before = str(plain), copy.deepcopy(plain.state_dict())
        if 'kernel_sizes' in options:
            says = 'no conv can be replaced: .*1 1x1'
        with pytest.raises(error, match=says):
            expand(plain, **{**dict(block_cfg=DBB, example=X), **options})
        assert str(plain) == before[0] and not list(places(plain))
        assert_same(before[1], plain.state_dict(), 0)

    def test_another_function(self):
        model = Sampling()
        conv = model.conv
        with pytest.raises(ValueError, match=r'^output of the expanded .* differs by \d'):
            expand(model, DBB, X)
        assert model.conv is conv and not list(places(model))


LOADERS: dict[str, Callable[[nn.Module, dict], object]] = {
    'torch': lambda model, state: model.load_state_dict(state, strict=True),
    'torch, assigned': lambda model, state: model.load_state_dict(state, assign=True),
    'mmengine': lambda model, state: load_by_mmengine(model, state, strict=True),
}


class TestLoading:
    @pytest.mark.parametrize('load', LOADERS.values(), ids=LOADERS)
    @pytest.mark.parametrize('part', ['', 'stages', 'stages.0'])
    def test_plain_weights(self, load, part):
        """Whether before or after expanding, of the whole or of a part."""
        plain, trained = Net(), randomise(Net(), seed=1)
        expand(plain, DBB, X)
        expected = copy.deepcopy(plain)
        step(plain)
        state = trained.get_submodule(part).state_dict()
        load(plain.get_submodule(part), copy.copy(state))
        for name, module in trained.named_children():
            if not part or name == part.partition('.')[0]:
                continue
            plain.get_submodule(name).load_state_dict(module.state_dict())
        assert_same(outputs(trained), outputs(plain), 1e-6)
        assert plain.state_dict().keys() == expected.state_dict().keys()
        assert state.keys() == trained.get_submodule(part).state_dict().keys()

    @pytest.mark.parametrize('load', LOADERS.values(), ids=LOADERS)
    def test_own_weights(self, plain, load):
        expand(plain, DBB, X)
        step(plain)
        other = randomise(Net(), seed=1)
        expand(other, DBB, X)
        load(other, plain.state_dict())
        assert torch.equal(outputs(other), outputs(plain))

    @pytest.mark.parametrize(
        ('key', 'says'),
        [
            (
                'stages.0.body.1.weight',
                'Missing key.*stages.0.body.0.branch_kxk.norm.weight',
            ),
            ('stages.0.conv3.bias', 'Missing key.*stages.0.conv3.branch_kxk.conv.bias'),
        ],
    )
    def test_what_is_missing(self, plain, key, says):
        state = plain.state_dict()
        del state[key]
        expand(plain, DBB, X)
        with pytest.raises(RuntimeError, match=f'(?s){says}'):
            plain.load_state_dict(state)

    def test_what_is_too_much(self, plain):
        state = plain.state_dict() | {'stages.0.conv3.scale': torch.ones(1)}
        expand(plain, DBB, X)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*stages\.0\.conv3\.scale'):
            plain.load_state_dict(state)

    def test_the_deploy_form_has_no_place_for_it(self, plain):
        state = plain.state_dict()
        expand(plain, DBB, X)
        switch_to_deploy(plain)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*stages\.0\.conv3\.weight'):
            plain.load_state_dict(state)

    def test_a_copy_loads_as_well(self, plain):
        state, y = plain.state_dict(), outputs(plain)
        expand(plain, DBB, X)
        copied = copy.deepcopy(plain)
        step(copied)
        copied.load_state_dict(state)
        assert torch.equal(outputs(copied), y)
        assert copied.stages[0].body[1].block is copied.stages[0].body[0]
