import copy

import pytest
import torch
from laws import randomise
from mmengine.registry import MODELS
from test_block_verification import FAULTS, RTOL, fault_in, observe
from tiny_projects import ONE_SWITCH
from torch import Tensor, nn
from torch.nn.utils import prune

from mmrep.reparam import (
    block_references,
    compare_block,
    compare_blocks,
    fuse_conv_norm,
    fused_parts,
    seen_inputs,
    switch_method,
    switch_to_deploy,
)
from mmrep.reparam.foreign import switched

#: Some of what each network fuses, and the layer that it becomes.
PARTS: dict[str, dict[str, str]] = {
    'RepLKNet': {
        'stages.0.blocks.0.large_kernel': 'lkb_reparam',
        'stages.3.blocks.0.large_kernel': 'lkb_reparam',
    },
    'LeViT': {
        'patch_embed.patch_embed.0': '',
        'stages.0.0.block.qkv': '',
        'stages.0.0.block.proj.1': '',
    },
    'RepMLPNet': {'stages.0.0.repmlp_block': 'fc3', 'stages.1.0.repmlp_block': 'fc3'},
}


class Convs(nn.Module):
    """Convs and norms side by side, whose switch fuses them into the convs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))

    def fuse(self) -> None:
        self.conv1 = fuse_conv_norm(self.conv1, self.norm1)
        self.conv2 = fuse_conv_norm(self.conv2, self.norm2)
        self.norm1, self.norm2 = nn.Identity(), nn.Identity()


class Network(nn.Module):
    """A network of one switch, and of a module that nothing calls."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.unused = Convs()

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)

    def switch_to_deploy(self) -> None:
        for module in self.modules():
            if isinstance(module, Convs):
                module.fuse()


class Switches(nn.Module):
    """Its switch puts a conv of float32, in training mode, beside what is there."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def switch_to_deploy(self) -> None:
        self.conv = nn.Conv2d(4, 4, 1)

    def forward_fuse(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TestSwitched:
    @pytest.mark.parametrize('arguments', ['*args', '**kwargs', 'one=1', '*, one=1', ''])
    def test_method_that_needs_no_argument(self, arguments):
        kind = type('Kind', (nn.Module,), {'fuse': eval(f'lambda self, {arguments}: None')})
        assert switch_method(kind()) == 'fuse'

    def test_what_is_new_is_like_the_block(self):
        frozen = nn.Conv2d(4, 4, 1, bias=False).requires_grad_(False)
        for parts, trainable in (((frozen, nn.Conv2d(4, 4, 1)), True), ((frozen,), False)):
            block = Switches(*copy.deepcopy(parts)).bfloat16().eval()
            assert switched(block) is block
            assert {p.dtype for p in block.conv.parameters()} == {torch.bfloat16}
            assert {p.requires_grad for p in block.conv.parameters()} == {trainable}
            assert not block.conv.training

    def test_what_was_there_stays(self):
        norm = nn.BatchNorm2d(4).eval().requires_grad_(False)
        block = Switches(nn.Conv2d(4, 4, 1).bfloat16(), norm)
        switched(block)
        assert norm.weight.dtype == torch.float32
        assert not norm.weight.requires_grad
        assert not norm.training

    def test_block_without_parameters(self):
        block = Switches(nn.Identity())
        assert switched(block).conv.training

    @pytest.mark.parametrize('fuses', [True, False])
    def test_forward_of_the_fused_form_is_of_one_method(self, fuses):
        """Ultralytics' networks have it beside ``fuse_convs``."""
        block = Switches()
        if fuses:
            block = type('Fuses', (nn.Module,), {'fuse_convs': lambda self: None})()
        before = block.forward
        assert switched(block).forward == before


class TestParts:
    def test_of_layers_is_what_holds_them(self):
        network = Network(nn.Sequential(Convs(), nn.ReLU()), Convs())
        assert fused_parts(network) == ['parts.0.0', 'parts.1', 'unused']

    def test_nothing_is_changed(self):
        network = randomise(Network(Convs()))
        before = copy.deepcopy(network)
        fused_parts(network)
        assert str(network) == str(before)
        torch.testing.assert_close(network.state_dict(), before.state_dict())

    def test_inside_another_is_the_other(self):
        class Outer(Convs):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Convs()

        assert fused_parts(Network(Outer(), Convs())) == ['parts.0', 'parts.1', 'unused']

    def test_norms_go_with_what_has_a_kernel(self):
        """A container of norms alone is no part: its convs are elsewhere."""

        class Apart(Convs):
            def __init__(self) -> None:
                super().__init__()
                self.convs = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
                self.norms = nn.Sequential(nn.BatchNorm2d(4))

            def fuse(self) -> None:
                self.convs[0] = fuse_conv_norm(self.convs[0], self.norms[0])
                self.norms[0] = nn.Identity()

        assert fused_parts(Network(Apart(), Convs())) == ['parts.0', 'parts.1', 'unused']

    def test_a_kernel_alone_is_enough(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)))

            def switch_to_deploy(self) -> None:
                self.body[0][0].weight.data *= 2

        assert fused_parts(Scaled()) == ['body.0']

    def test_whose_names_begin_alike(self):
        network = Network(Convs())
        network.parts_of_another = Convs()
        assert fused_parts(network) == ['parts.0', 'parts_of_another', 'unused']

    @pytest.mark.parametrize(
        'change',
        [
            lambda conv: conv.weight.mul_(2),
            lambda conv: conv.double(),
            lambda conv: setattr(conv, 'bias', None),
            lambda conv: setattr(conv, '__class__', type('Other', (nn.Conv2d,), {})),
            lambda conv: conv.register_buffer('mask', torch.ones(4)),
        ],
    )
    @torch.no_grad()
    def test_is_seen_by_any_change(self, change):
        class Changed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)))

            def switch_to_deploy(self) -> None:
                change(self.body[0][0])

        assert fused_parts(Changed()) == ['body.0']

    def test_with_a_pruned_weight(self):
        graphs = []

        class Pruned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)))
                prune.l1_unstructured(self.body[0][0], 'weight', 0.5)

            def switch_to_deploy(self) -> None:
                conv = self.body[0][0]
                graphs.append(conv.weight.grad_fn)
                conv.weight.mul_(2)
                conv.bias.mul_(2)

        block = Pruned()
        weight = block.body[0][0].weight
        before = weight.detach().clone()
        assert fused_parts(block) == ['body.0']
        assert graphs == [None] and weight.grad_fn is not None
        assert block.body[0][0].weight is weight and torch.equal(weight, before)

    def test_whose_switch_fails(self):
        network = Network(Convs())
        del network.parts[0].norm1
        assert fused_parts(network) == []

    def test_that_is_the_block_itself(self):
        class Block(Convs):
            switch_to_deploy = Convs.fuse

        assert fused_parts(Block()) == ['']
        block = randomise(Block())
        references = observe(block, 1, 4, 9, 9)
        assert references.keys() == {''}
        switch_to_deploy(block)
        assert compare_blocks(references, block)[''].is_within(RTOL)

    def test_of_the_block_itself_is_all_of_it(self):
        class Scaled(Network):
            def __init__(self) -> None:
                super().__init__(Convs())
                self.scale = nn.Parameter(torch.ones(4))

            def switch_to_deploy(self) -> None:
                super().switch_to_deploy()
                del self.scale

        assert fused_parts(Scaled()) == ['']

    @pytest.mark.parametrize('base', [nn.Conv2d, nn.BatchNorm2d])
    def test_of_one_layer(self, base):
        class Layer(base):
            def switch_to_deploy(self) -> None:
                self.weight.data *= 2

        assert fused_parts(Layer(*[4, 4, 1][: 3 if base is nn.Conv2d else 1])) == ['']

    def test_that_are_not_called(self):
        model = nn.Sequential(randomise(Network(Convs())))
        references = observe(model, 1, 4, 9, 9)
        assert references.keys() == {'0', '0.parts.0'}

    def test_that_cannot_be_copied(self):
        """It is compared as a whole."""
        model = nn.Sequential(randomise(Network(Convs())))
        model[0].lock = (i for i in range(2))
        references = observe(model, 1, 4, 9, 9)
        assert references.keys() == {'0'}

    def test_norms_that_go_into_another_part(self):
        class Before(Network):
            """Its norm is folded into the conv of the next part."""

            def __init__(self) -> None:
                super().__init__(nn.Sequential(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))

            @torch.no_grad()
            def switch_to_deploy(self) -> None:
                norm, conv = self.parts[0][0], self.parts[1]
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                shift = norm.bias - norm.running_mean * scale
                conv.bias += conv.weight.sum((2, 3)) @ shift
                conv.weight *= scale.view(1, -1, 1, 1)
                self.parts[0][0] = nn.Identity()

        model = nn.Sequential(randomise(Before()))
        assert fused_parts(model[0]) == ['parts']
        references = observe(model, 1, 4, 9, 9)
        switch_to_deploy(model)
        differences = compare_blocks(references, model)
        assert differences.keys() == {'0', '0.parts'}
        assert all(difference.is_within(RTOL) for difference in differences.values())


class Wrong(nn.Module):
    """A conv and a norm whose switch mirrors the kernel."""

    def __init__(self, size: int | None = None, **options) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, **options), nn.BatchNorm2d(4)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        assert self.size in (None, x.size(2))
        y = self.norm(self.conv(x)).relu() + 1
        return y + x if y.shape == x.shape else y

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        self.conv.weight.copy_(self.conv.weight.flip(3))


class TestWhatIsShown:
    @pytest.mark.parametrize(
        ('options', 'size', 'shown'),
        [
            (dict(kernel_size=7, padding=3, stride=2), (2, 3), (14, 15)),
            (dict(kernel_size=(7, 1), padding=(3, 0), stride=2), (14, 13), (14, 26)),
            (dict(kernel_size=3, padding=4, dilation=4, stride=3), (5, 20), (25, 40)),
        ],
    )
    def test_every_tap_is_met(self, options, size, shown):
        """Though the map has fewer pixels than the kernel."""
        model = nn.Sequential(randomise(Wrong(**options)))
        references = observe(model, 1, 4, *size)
        expected = torch.randn(1, 4, *shown, generator=torch.Generator().manual_seed(0))
        assert torch.equal(references['0'].inputs.seeded.args[0], expected)
        with torch.no_grad():
            model[0].conv.weight[:, :, -1] = 0
        (difference,) = compare_blocks(references, model).values()
        assert not difference.is_within(RTOL) and difference.note == ''

    def test_without_a_conv(self):
        class Activation(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.tanh()

            def switch_to_deploy(self) -> None: ...

        references = observe(nn.Sequential(nn.Conv2d(3, 4, 1), Activation()), 1, 3, 1, 1)
        assert references['1'].inputs.seeded.args[0].shape == (1, 4, 1, 1)

    def test_tokens_are_as_many(self):
        class Tokens(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.transpose(1, 2).unflatten(2, (2, 2))).flatten(2)

            def switch_to_deploy(self) -> None: ...

        model = nn.Sequential(Tokens(3, 4, 3, padding=1)).eval()
        with seen_inputs(model) as seen:
            model(torch.ones(1, 4, 3))
        reference = block_references(model, seen)['0']
        assert reference.inputs.seeded.args[0].shape == (1, 4, 3)
        assert reference.note == ''

    def test_of_one_size_alone(self):
        model = nn.Sequential(randomise(Wrong(2, kernel_size=7, padding=3)))
        references = observe(model, 1, 4, 2, 2)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.note == (
            'it accepts no larger input, so some taps of kernels may not be compared'
        )

    @pytest.mark.parametrize('options', [dict(padding=1), dict(padding=0)])
    @pytest.mark.parametrize(
        ('bias', 'scale'), [(0, 1), (-9, 10), (-90, 100), (-1e5, None)]
    )
    def test_what_noise_does_not_wake(self, options, bias, scale):
        model = nn.Sequential(randomise(Wrong(kernel_size=3, **options)))
        nn.init.constant_(model[0].norm.bias, bias)
        references = observe(model, 1, 4, 9, 9)
        x = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
        assert torch.equal(references['0'].inputs.seeded.args[0], (scale or 100) * x)
        switch_to_deploy(model)
        (difference,) = compare_blocks(references, model).values()
        assert difference.is_within(RTOL) is (scale is None)
        assert difference.note == (
            ''
            if scale
            else 'its output does not depend on its input, so its kernels are not compared'
        )


class TestLaw:
    @pytest.mark.parametrize('name', ONE_SWITCH)
    def test_every_part_is_right_and_every_fault_is_seen(self, name, tally):
        parts = PARTS[name]
        with MODELS.switch_scope_and_registry('mmpretrain') as models:
            model = randomise(models.build(ONE_SWITCH[name]))
        references = observe(model, 1, 3, 64, 64)
        assert {'', *parts} <= references.keys()
        switch_to_deploy(model)
        for part, reference in references.items():
            right = compare_block(reference, model.get_submodule(part))
            # Of the whole, rounding adds up.
            assert right.worst < (1e-6 if part else RTOL / 10), (part, right)
            assert right.is_within(RTOL) and right.note == ''
        for part, layer in parts.items():
            module = model.get_submodule(part)
            for fault in FAULTS:
                with fault_in(module.get_submodule(layer), fault):
                    wrong = compare_block(references[part], module)
                assert not wrong.is_within(RTOL), (part, fault.__name__, wrong)
                tally('wrong blocks')

    def test_part_that_the_whole_hides(self):
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = Convs()

            def forward(self, x: Tensor) -> Tensor:
                return x[:, :, 1:-1, 1:-1] + 1e-7 * self.body(x)

        model = randomise(Network(Residual()))
        references = observe(model, 1, 4, 9, 9)
        switch_to_deploy(model)
        with torch.no_grad():
            model.parts[0].body.conv1.weight *= 1.01
        right = {
            name: difference.is_within(RTOL)
            for name, difference in compare_blocks(references, model).items()
        }
        assert right == {'': True, 'parts.0.body': False}
