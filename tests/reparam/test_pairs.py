import copy
import random
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from laws import assert_same
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from mmrep.reparam import conv_norm_pairs
from mmrep.reparam.pairs import ConvNormPairs


class Net(nn.Module):
    """A conv, a norm and more, as a case has it."""

    def __init__(self, call: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def observed(model: nn.Module, *shape: int) -> ConvNormPairs:
    x = torch.randn(shape or (2, 3, 8, 8))
    return conv_norm_pairs(model, lambda model: model(x))


def another_norm() -> dict[str, nn.Module]:
    return dict(norm2=nn.BatchNorm2d(4))


def another_conv() -> dict[str, nn.Module]:
    return dict(conv2=nn.Conv2d(3, 4, 3))


class Opaque:
    """Outputs that are no tuple, list or dict."""

    def __init__(self, y: Tensor, z: Tensor) -> None:
        self.y, self.z = y, z


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.relu() * 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x


class Drop(nn.Module):
    """Computes in training alone, without a function that shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


#: What is a pair.
PAIRS: dict[str, Callable[[], Net]] = {
    'one after the other': lambda: Net(lambda m, x: m.norm(m.conv(x))),
    'an operator in place after the norm': lambda: Net(
        lambda m, x: m.norm(m.conv(x)).relu_().add_(1)
    ),
    'read by keyword': lambda: Net(lambda m, x: m.norm(input=m.conv(input=x))),
    'run twice': lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(2 * x))),
    'checkpointed': lambda: Net(
        lambda m, x: checkpoint(lambda x: m.norm(m.conv(x)), x, use_reentrant=False)
    ),
    'checkpointed apart': lambda: Net(
        lambda m, x: m.norm(checkpoint(m.conv, x, use_reentrant=True))
    ),
    'its size is asked for': lambda: Net(
        lambda m, x: (lambda y: m.norm(y) * y.shape[1] * y.numel() * y.dim())(m.conv(x))
    ),
    'identities between': lambda: Net(
        lambda m, x: m.norm(m.rest(m.conv(x))),
        rest=nn.Sequential(nn.Identity(), nn.Sequential()),
    ),
    'cast to its own dtype': lambda: Net(
        lambda m, x: m.norm(m.conv(x).float().contiguous())
    ),
    'in a cycle that is garbage': lambda: Net(lambda m, x: m.norm(in_a_cycle(m.conv(x)))),
    'input is kept': lambda: Net(lambda m, x: (x, m.norm(m.conv(x)))),
    'other norms': lambda: Net(
        lambda m, x: m.norm3(m.norm2(m.norm(m.conv(x)))),
        norm2=nn.BatchNorm2d(4),
        norm3=nn.GroupNorm(2, 4),
    ),
}


def in_a_cycle(y: Tensor) -> Tensor:
    cycle = [y]
    cycle.append(cycle)
    return y


WATCHED = 'has hooks or a parametrization'
KEPT = 'its output is kept after the pass, as outputs of the model are'

#: What is none, and why.
OTHERS: dict[str, tuple[Callable[[], Net], str]] = {
    'no norm': (lambda: Net(lambda m, x: m.conv(x).relu()), 'no norm .*, only relu'),
    'no norm, scripted': (lambda: Net(lambda m, x: scripted(m.conv(x))), ', only relu'),
    'no norm, a function of its own': (
        lambda: Net(lambda m, x: Doubled.apply(m.conv(x))),
        ', only mul',
    ),
    'its last layer': (lambda: Net(lambda m, x: m.conv(x)), KEPT),
    'an output as well': (
        lambda: Net(lambda m, x: (lambda y: Opaque(y, m.norm(y)))(m.conv(x))),
        KEPT,
    ),
    'kept by the model': (
        lambda: Net(lambda m, x: m.norm(m.__dict__.setdefault('kept', m.conv(x)))),
        KEPT,
    ),
    'not called': (
        lambda: Net(lambda m, x: m.norm(F.pad(x, [0] * 5 + [1]))),
        'it is not called',
    ),
    'called as a function': (
        lambda: Net(lambda m, x: m.norm(F.conv2d(x, m.conv.weight))),
        'a parameter of conv is read by convolution',
    ),
    'called as a function as well': (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight)),
        'a parameter of conv is read by convolution',
    ),
    'norm is regularized': (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.norm.weight.abs().sum()),
        'a parameter of norm is read by abs',
    ),
    'norm as a function': (
        lambda: Net(lambda m, x: F.relu(F.batch_norm(m.conv(x), *statistics(m.norm)))),
        ', only .*batch_norm',
    ),
    'nobody reads it': (
        lambda: Net(lambda m, x: (m.conv(x), m.norm(x.new_ones(2, 4, 5, 5)))[1]),
        'nothing reads its output',
    ),
    'an operator in place before': (
        lambda: Net(lambda m, x: m.norm(m.conv(x).relu_())),
        'more than once, by norm and relu_',
    ),
    'an operator in place afterwards': (
        lambda: Net(lambda m, x: (lambda y: m.norm(y) + y.add_(1))(m.conv(x))),
        'more than once, by .*add_ and norm',
    ),
    'a view': (lambda: Net(lambda m, x: m.norm(m.conv(x).view(2, 4, 4, 9))), ', only view'),
    'detached': (lambda: Net(lambda m, x: m.norm(m.conv(x).detach())), ', only detach'),
    'a shortcut': (
        lambda: Net(lambda m, x: (lambda y: y + m.norm(y))(m.conv(x))),
        'more than once, by add and norm',
    ),
    'two norms of one output': (
        lambda: Net(
            lambda m, x: (lambda y: m.norm(y) + m.norm2(y))(m.conv(x)), **another_norm()
        ),
        'more than once, by norm and norm2',
    ),
    'a norm for each output': (
        lambda: Net(
            lambda m, x: m.norm(m.conv(x)) + m.norm2(m.conv(2 * x)), **another_norm()
        ),
        'outputs are read by norm and norm2',
    ),
    'one of two outputs': (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.conv(2 * x).relu()),
        'outputs are read by norm and relu',
    ),
    'one norm twice': (
        lambda: Net(lambda m, x: (lambda y: m.norm(y) + m.norm(y))(m.conv(x))),
        'more than once, by norm',
    ),
    'one norm twice of one of two outputs': (
        lambda: Net(
            lambda m, x: (
                m.norm(m.conv(x)) + (lambda y: m.norm(y) + m.norm(y))(m.conv(2 * x))
            )
        ),
        'more than once, by norm',
    ),
    'a norm of two convs': (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv2(x)), **another_conv()),
        'norm reads other tensors as well',
    ),
    'a norm of another tensor': (
        lambda: Net(lambda m, x: m.norm(m.conv(x)) + m.norm(x.new_ones(2, 4, 6, 6))),
        'norm reads other tensors as well',
    ),
    'a norm before': (
        lambda: Net(lambda m, x: m.conv(m.norm(x.new_ones(2, 4, 8, 8))[:, :3]).relu()),
        ', only relu',
    ),
    'a norm of no running statistics': (
        lambda: Net(lambda m, x: m.norm2(m.conv(x)), norm2=nn.GroupNorm(2, 4)),
        ', only .*group_norm',
    ),
    'dropout': (
        lambda: Net(lambda m, x: m.norm(F.dropout(m.conv(x), 0.5, m.training))),
        'by dropout and norm',
    ),
    'dropout of channels': (
        lambda: Net(lambda m, x: m.norm(m.drop(m.conv(x))), drop=nn.Dropout2d()),
        'by drop .*and norm',
    ),
    'a module that computes in training': (
        lambda: Net(lambda m, x: m.norm(m.drop(m.conv(x))), drop=nn.Sequential(Drop())),
        r'by drop\.0 and norm',
    ),
    'an own hook': (lambda: hooked(), 'conv has hooks or a parametrization'),
    'an own hook of the norm': (
        lambda: hooked('norm'),
        'norm has hooks or a parametrization',
    ),
    'a parametrization': (lambda: parametrized(), 'conv has hooks or a parametrization'),
    'a shared kernel': (lambda: sharing(), 'conv and conv2 share a parameter'),
}


#: Where the conv itself is more than a call of it.
ENTANGLED = {
    'not called',
    'called as a function',
    'called as a function as well',
    'an own hook',
    'a parametrization',
    'a shared kernel',
}


class Pair(nn.Conv2d):
    """Returns two maps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [super().forward(x), x]


class First(nn.Module):
    def forward(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0]


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


def hooked(name: str = 'conv') -> Net:
    model = Net(lambda m, x: m.norm(m.conv(x)))
    getattr(model, name).register_forward_hook(lambda module, args, output: 2 * output)
    return model


def parametrized() -> Net:
    model = Net(lambda m, x: m.norm(m.conv(x)))
    parametrizations.weight_norm(model.conv)
    return model


def sharing() -> Net:
    model = Net(lambda m, x: m.norm(m.conv(x)) + m.conv2(x), **another_conv())
    model.conv2.weight = model.conv.weight
    return model


class TestOneConv:
    @pytest.mark.parametrize('name', PAIRS)
    def test_pair(self, name):
        assert observed(PAIRS[name]()) == ConvNormPairs({'conv': 'norm'}, {})

    @pytest.mark.parametrize('name', OTHERS)
    def test_none(self, name):
        make, reason = OTHERS[name]
        found = observed(make())
        assert 'conv' not in found.norms
        assert re.search(f'(?:{reason})$', found.unpaired['conv']), found.unpaired
        assert ('conv' in found.entangled) is (name in ENTANGLED)

    def test_of_several_outputs(self):
        found = observed(nn.Sequential(Pair(3, 4, 1), First(), nn.BatchNorm2d(4)))
        assert found.unpaired == {'0': 'it returns list, which is not a tensor'}

    def test_compiled(self):
        model = PAIRS['one after the other']()
        model.sub = torch.compile(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        model.call = lambda m, x: m.sub(m.norm(m.conv(x)))
        pairs = {'conv': 'norm', 'sub._orig_mod.0': 'sub._orig_mod.1'}
        assert observed(model).norms == pairs

    def test_across_containers(self):
        first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3))
        model = nn.Sequential(first, nn.Sequential(nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
        found = observed(model)
        assert found.norms == {'0.2': '1.0'}
        assert found.unpaired.keys() == {'0.0', '2'}

    def test_reused_module_has_its_first_name(self):
        model = Net(lambda m, x: m.norm(m.conv(x)))
        model.again = nn.Sequential(model.conv, model.norm)
        assert observed(model).norms == {'conv': 'norm'}

    def test_on_the_meta_device(self):
        model = Net(lambda m, x: m.norm(m.conv(x))).to('meta')
        x = torch.empty(1, 3, 8, 8, device='meta')
        assert conv_norm_pairs(model, lambda m: m(x)).norms == {'conv': 'norm'}

    def test_of_a_model_of_several_inputs(self):
        model = Net(lambda m, x: m.norm(m.conv(x['image'] * x['scale'])))
        x = dict(image=torch.ones(1, 3, 8, 8), scale=2)
        assert conv_norm_pairs(model, lambda m: [m(x)]).norms == {'conv': 'norm'}


class Restless(nn.Module):
    """Changes buffers and draws numbers in eval mode; its modes are of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('queue', torch.zeros(2))
        self.register_buffer('none', None)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval())
        self.frozen = False

    def train(self, mode: bool = True) -> 'Restless':
        self.frozen = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        self.queue = self.queue + torch.rand(2)
        return self.body(x) * random.random()


class TestNothingIsChanged:
    @pytest.mark.parametrize('fails', [False, True])
    def test_after_a_pass(self, fails):
        model = Restless()
        model.body.register_forward_hook(lambda *args: None)
        before = copy.deepcopy(model.state_dict())
        buffers = dict(model.named_buffers())
        modes = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        states = torch.get_rng_state(), random.getstate()

        def run(model: nn.Module) -> Tensor:
            out = model(torch.ones(1, 3, 4, 4))
            return out / 0 if not fails else model(torch.ones(1))

        if fails:
            with pytest.raises(RuntimeError):
                conv_norm_pairs(model, run)
        else:
            assert conv_norm_pairs(model, run).norms == {'body.0': 'body.1'}
        assert_same(before, model.state_dict(), 0)
        assert all(model.get_buffer(name) is buffers[name] for name in buffers)
        assert [module.training for module in model.modules()] == modes
        assert True in modes and False in modes and not model.frozen
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_seen_stays():
    with pytest.raises(FrozenInstanceError):
        observed(Net(lambda m, x: m.norm(m.conv(x)))).norms = {}


class Block(nn.Module):
    """Counts as one conv, whatever is in it; its parameters are read by what is in it."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [branch(x) for branch in self.branches]
        return sum(others, first * self.scale) if others else first


class TestAnotherKind:
    """Blocks in the place of convs."""

    @staticmethod
    def branch() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    @pytest.mark.parametrize('count', [1, 2])
    def test_pairs_of_blocks(self, count):
        model = Net(
            lambda m, x: m.norm(m.block(x)) + m.conv(x),
            block=Block(*(self.branch() for _ in range(count))),
        )
        x = torch.randn(1, 3, 8, 8)
        found = conv_norm_pairs(model, lambda model: model(x), Block)
        assert found.norms == {'block': 'norm'} and not found.unpaired
        # Of convs, those inside are seen.
        assert 'conv' in conv_norm_pairs(model, lambda model: model(x)).unpaired

    def test_what_else_reads_it(self):
        model = Net(
            lambda m, x: m.norm(m.block(x).relu()) * m.block.branches[0][0].bias.sum(),
            block=Block(self.branch()),
        )
        x = torch.randn(1, 3, 8, 8)
        found = conv_norm_pairs(model, lambda model: model(x), Block)
        assert found.unpaired == {'block': 'a parameter of block is read by sum'}
        assert found.entangled == {'block'}


#: Convs with a norm and all convs of networks, counted by hand in their papers' tables or
#: by the norms that their code builds.
HOSTS = {
    'ResNet': (dict(depth=50), 53, 53),
    'ResNeXt': (dict(depth=50), 53, 53),
    'RegNet': (dict(arch='regnetx_1.6gf'), 59, 59),
    'MobileNetV2': (dict(), 52, 52),
    'MobileNetV3': (dict(arch='large'), 46, 62),
    'EfficientNet': (dict(arch='b0'), 49, 81),
    'ShuffleNetV2': (dict(), 56, 56),
    'VGG': (dict(depth=16, norm_cfg=dict(type='BN')), 13, 13),
    'InceptionV3': (dict(), 94, 94),
    'ResNeSt': (dict(depth=50), 71, 87),
    'HRNet': (dict(arch='w18'), 305, 305),
    'ConvNeXt': (dict(arch='tiny'), 0, 22),
    'SwinTransformer': (dict(arch='tiny'), 0, 1),
}


#: Those of many layers.
LONG = ('HRNet', 'InceptionV3', 'ResNeSt', 'SwinTransformer')


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in HOSTS]
)
def test_networks_of_mmpretrain(name):
    config, pairs, convs = HOSTS[name]
    with MODELS.switch_scope_and_registry('mmpretrain') as models:
        model = models.build(dict(config, type=name))
    # Swin's windows need no less.
    found = observed(model, 1, 3, 224, 224)
    assert len(found.norms) == pairs
    assert len(found.norms) + len(found.unpaired) == convs
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if pairs == convs:
        assert sorted(found.norms.values()) == sorted(norms)
