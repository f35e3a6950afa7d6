"""A re-parameterizable block: the sum of its branches, then SE, then an activation."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import chain, pairwise
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmcv.cnn.bricks.scale import LayerScale
from mmengine.model import BaseModule, ModuleDict, ModuleList, Sequential
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmrep.registry import MODELS
from mmrep.reparam import (
    ConvGeometry,
    LinearConv,
    NotFoldableError,
    conv_geometry,
    fold_branches,
    fold_layer,
    has_running_statistics,
    linear_conv_type,
    one_conv_kernel,
    register_fold,
    set_kernel,
)

from ..layers import PadOrCrop, SELayer, build_activation, run_block

Size = tuple[int, int]

#: Layers whose output is zero if their weight and bias are zero.
_MAY_START_AT_ZERO = (nn.Conv2d, nn.GroupNorm, _BatchNorm, LayerScale)


def pair(value: int | Size) -> Size:
    """``value`` as ``(rows, columns)``; an int counts for both."""
    return (value, value) if isinstance(value, int) else tuple(value)


class ReparamBlock(BaseModule):
    """The base of every block: ``y = act(se(post_norm(linear(x))))``.

    ``linear`` is the sum of the branches, or one conv with the equivalent kernel. Most
    blocks have no ``post_norm``. A subclass has to define :meth:`build_branches` only:
    the forward pass, fusing and the switch are implemented here.

    Where every norm uses running statistics (in eval mode, with ``norm_eval``, in frozen
    stages) the train form can compute with its equivalent kernel. It derives the kernel
    from the current parameters in every forward pass, with exact gradients to them; see
    :func:`~mmrep.reparam.one_conv_kernel`.

    Args:
        in_channels, out_channels (int): Numbers of channels.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel.
        stride (int | tuple[int, int]): Stride. Default: 1.
        padding (int | tuple[int, int], optional): Padding, in pixels. Default: None,
            the padding that keeps the size at stride 1.
        dilation (int | tuple[int, int]): Dilation. Default: 1.
        groups (int): Number of groups. Default: 1.
        padding_mode (str): As in ``nn.Conv2d``, for every branch. Default: ``'zeros'``.
        se_cfg (dict, optional): Config of :class:`~mmrep.models.layers.SELayer`.
            Default: None, no SE.
        se_position (str): ``'before_act'`` (RepVGG-D2se) or ``'after_act'`` (RepVGGplus).
            Default: ``'before_act'``.
        with_cp (bool): Recompute the block in the backward pass to save memory. The
            running statistics are still updated once per step. Default: False.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict, optional): Config of the activation; None for none.
            Default: ``dict(type='ReLU')``.
        deploy (bool): Build one conv instead of the branches. Default: False.
        one_conv (bool | int | str): Whether the train form computes with its equivalent
            kernel where it can: always (True), never (False), or from this number of
            output pixels in a batch on. ``'auto'`` means on a CPU only, from the number
            of pixels on for which this was measured to be faster. Default: ``'auto'``.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    #: Attributes of ``nn.Conv2d``, for code that reads them from the conv it expects here.
    transposed, output_padding = False, (0, 0)
    #: Names of the SE layer, the norm of a branch and the one conv in state-dict keys.
    se_name, norm_name, reparam_name = 'se_layer', 'norm', 'branch_reparam'

    def __new__(cls, *args: Any, **kwargs: Any) -> 'ReparamBlock':
        if 'bias' in kwargs and 'bias' not in inspect.signature(cls.__init__).parameters:
            raise TypeError(
                f"{cls.__name__} takes no 'bias': it is a block with norms, not a conv "
                'layer. As conv_cfg, give a conv layer made of a block, as '
                "dict(type='mmrep.DBBConv2d')"
            )
        return super().__new__(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size = 1,
        padding: int | Size | None = None,
        dilation: int | Size = 1,
        groups: int = 1,
        padding_mode: str = 'zeros',
        se_cfg: dict | None = None,
        se_position: str = 'before_act',
        with_cp: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict | None = dict(type='ReLU'),
        deploy: bool = False,
        one_conv: bool | int | str = 'auto',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not (se_cfg is None or isinstance(se_cfg, dict)):
            raise TypeError(f'se_cfg must be a dict or None, not {se_cfg!r}')
        if se_position not in ('before_act', 'after_act'):
            raise ValueError(
                f"se_position must be 'before_act' or 'after_act', not {se_position!r}"
            )
        if not isinstance(one_conv, int) and one_conv != 'auto':
            raise ValueError(
                "one_conv must be True, False, 'auto' or a number of pixels, "
                f'not {one_conv!r}'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(kernel_size)
        self.stride = pair(stride)
        self.dilation = pair(dilation)
        self.padding = self._same_size_padding() if padding is None else pair(padding)
        self.groups = groups
        self.padding_mode = padding_mode
        self.se_cfg = se_cfg
        self.se_position = se_position
        self.with_cp = with_cp
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.act_cfg = act_cfg
        self.deploy = deploy
        self.one_conv = one_conv
        #: Size of the last input, kept where the kernel depends on it ('SAME' padding).
        self.input_size: Size | None = None

        #: Whether the block was made by :meth:`from_conv`, and starts as that conv.
        self.starts_as_conv = False
        #: Names of the branches; none in deploy form.
        self.branch_names: tuple[str, ...] = ()
        self.post_norm: nn.Module | None = None
        self.geometry = self._build_geometry()
        if deploy:
            self._add_reparam(self.build_conv(self.kernel_size, bias=True))
        else:
            self._add_branches(self.build_branches())
            self.post_norm = self.build_post_norm()
        se = None if se_cfg is None else SELayer(out_channels, **se_cfg)
        self.register_module(self.se_name, se)
        self.act = None if act_cfg is None else build_activation(act_cfg)

    @classmethod
    def from_conv(
        cls, conv: nn.Module, norm: nn.Module | None = None, **options: Any
    ) -> 'ReparamBlock':
        """Make a block that computes ``norm(conv(x))``, with these two in its main branch.

        The main branch holds the given modules, not copies: tensors, dtype, device and
        ``requires_grad`` stay. In a block with a ``post_norm``, ``norm`` becomes the
        ``post_norm``. Every other branch starts with a contribution of zero, since the
        scale of its last norm or the kernel of its last conv is zero. A branch without
        parameters (an identity, an average) cannot; in a block with one, the main branch
        holds a copy of ``conv``, from whose kernel that of the branch is subtracted.

        Args:
            conv (nn.Module): A conv of a type whose kernel is known.
            norm (nn.Module, optional): The norm after it. Default: None, no norm in the
                main branch, and no ``post_norm``.
            **options: Other arguments of the block. Default: ``act_cfg=None``, the type of
                ``conv`` for the convs, and, if ``norm`` is a batch norm, its type, eps and
                momentum for the norms.

        Raises:
            NotFoldableError: If the kernel of the conv's type is not known.
            ValueError: If a branch cannot start at zero, if the block has no place for
                ``norm``, or if ``deploy`` is True.
        """
        geometry = conv_geometry(conv)
        arguments = dict(asdict(geometry), padding_mode=geometry.fill)
        defaults = dict(act_cfg=None)
        if (conv_type := linear_conv_type(conv)) is not nn.Conv2d:
            defaults['conv_cfg'] = dict(type=conv_type)
        if isinstance(norm, _BatchNorm):
            defaults['norm_cfg'] = dict(
                type=type(norm), eps=norm.eps, momentum=norm.momentum
            )
        if options.get('deploy'):
            raise ValueError('from_conv makes a block in train form: leave out deploy')
        block = cls(**{**arguments, **defaults, **options})
        like = next(conv.parameters())
        block.to(like.device, like.dtype).train(conv.training)
        block._start_as(conv, norm)
        return block

    @torch.no_grad()
    def _start_as(self, conv: nn.Module, norm: nn.Module | None) -> None:
        kind = type(self).__name__
        first, main = next(iter(self.branches().items()))
        layers = [name for name, _ in main.named_children()]
        nested = isinstance(main, ReparamBlock)
        known = layers in (['conv'], ['conv', self.norm_name], ['conv', 'scale'])
        if not (nested or (known and isinstance(main, nn.Sequential))):
            raise ValueError(f'{first} of {kind} is not a Sequential of a conv and a norm')
        self.load_state_dict(self.start_of_others(), strict=False)
        self.starts_as_conv = True
        if self.post_norm is not None:
            self.post_norm, norm = norm, None
        if (fixed := self.fixed_kernel()) is not None:
            if norm is not None:
                raise ValueError(
                    f'{kind} has a branch without parameters, which cannot start at 0 '
                    'beside a norm: give the conv alone'
                )
            # The given conv may still be used elsewhere.
            conv = copy.deepcopy(conv)
            conv.weight.sub_(fixed)
        if nested:
            main._start_as(conv, norm)
            return
        main.conv = conv
        if self.norm_name in layers:
            norm = nn.Identity().train(self.training) if norm is None else norm
            setattr(main, self.norm_name, norm)
        elif norm is not None:
            raise ValueError(f'the main branch of {kind} has no norm: give the conv alone')

    def start_of_others(self) -> dict[str, Tensor]:
        """The state dict of all but the main conv and its norm, for a contribution of zero.

        Raises:
            ValueError: If the last layer of a branch has no scale or kernel to set to zero.
        """
        zeros = self._start_at_zero()
        states = {
            key: torch.zeros_like(tensor) if key in zeros else tensor
            for branch in self.branch_names[1:]
            for key, tensor in self.get_submodule(branch)
            .state_dict(prefix=f'{branch}.')
            .items()
        }
        first = self.branch_names[0]
        main = self.get_submodule(first)
        if isinstance(main, ReparamBlock):
            inside = main.start_of_others()
            states.update((f'{first}.{key}', inside[key]) for key in inside)
        elif hasattr(main, 'scale'):
            states[f'{first}.scale.weight'] = torch.ones_like(main.scale.weight)
        return states

    def _start_at_zero(self) -> dict[str, nn.Parameter]:
        """The parameters of the last layers of every branch but the main one, by name."""
        zeros, fixed = {}, self._fixed_branches()
        for branch in self.branch_names[1:]:
            if branch in fixed:
                continue
            for name in self._last_layers(branch):
                last = self.get_submodule(name)
                if not isinstance(last, _MAY_START_AT_ZERO) or last.weight is None:
                    raise ValueError(
                        f'the last layer of {branch} of {type(self).__name__} has no scale '
                        'or kernel that could start at 0'
                    )
                zeros.update(last.named_parameters(name, recurse=False))
        return zeros

    def _last_layers(self, branch: str) -> list[str]:
        """Names of a branch's last layers; several for a block without ``post_norm``."""
        block = self.get_submodule(branch)
        if not isinstance(block, ReparamBlock):
            *_, (name, _) = block.named_modules(prefix=branch)
            return [name]
        if block.post_norm is not None:
            return [f'{branch}.post_norm']
        inside = chain.from_iterable(map(block._last_layers, block.branch_names))
        return [f'{branch}.{name}' for name in inside]

    def _fixed_branches(self) -> dict[str, nn.Module]:
        """The branches after the main one that have no tensor: an identity, an average."""
        branches = list(self.branches().items())[1:]
        return {
            name: branch
            for name, branch in branches
            if not any(True for _ in chain(branch.parameters(), branch.buffers()))
        }

    @torch.no_grad()
    def fixed_kernel(self) -> Tensor | None:
        """The kernel of the sum of the branches without a tensor; None if there are none.

        A block that starts as a conv has subtracted it from its main branch's kernel.
        """
        if not (fixed := self._fixed_branches()):
            return None
        like = self.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        folded = fold_branches(fixed, self.geometry, self.input_size, dtype, like.device)
        return folded.weight.to(like.dtype)

    def apply(self, fn: Callable[[nn.Module], None]) -> 'ReparamBlock':
        """Apply a function to every module inside, as a network's initializers do.

        In a block made by :meth:`from_conv`, the branches that start with a contribution
        of zero keep it: a network's initializers are meant for its own convs and norms.
        Once training has changed one of these zeros, none of them is set to zero again.
        """
        zeros = self._start_at_zero() if self.starts_as_conv else {}
        at_start = not any(tensor.any() for tensor in zeros.values())
        fixed = self.fixed_kernel() if self.starts_as_conv and at_start else None
        before = None if fixed is None else self.weight.detach().clone()
        super().apply(fn)
        with torch.no_grad():
            for name in zeros if at_start else ():
                self.get_parameter(name).zero_()
            if before is not None and not torch.equal(self.weight, before):
                # The initializer wrote the kernel that all branches together shall have.
                self.weight.sub_(fixed)
        return self

    def build_branches(self) -> Mapping[str, nn.Module]:
        """The branches by name, the main one first.

        A dotted name nests the branch in a ``ModuleDict`` or, before a number, in a
        ``ModuleList``: ``'branch_list.0'``. The keys of the state dict start with the name.
        """
        raise NotImplementedError

    def build_post_norm(self) -> nn.Module | None:
        """The norm after the sum of the branches. Default: none."""
        return None

    def _add_branches(self, branches: Mapping[str, nn.Module]) -> None:
        self.branch_names = tuple(branches)
        for name in {name.partition('.')[0] for name in branches}:
            if hasattr(self, name) or name in ('act', self.se_name, self.reparam_name):
                raise ValueError(
                    f'a branch cannot be named {name!r}: the block has this attribute'
                )
        for name, branch in branches.items():
            owner: nn.Module = self
            for part, following in pairwise(name.split('.')):
                if part not in owner._modules:
                    kind = ModuleList if following.isdigit() else ModuleDict
                    owner.add_module(part, kind())
                owner = owner._modules[part]
            owner.add_module(name.rpartition('.')[2], branch)

    def build_conv(
        self, kernel_size: int | Size, bias: bool = False, **geometry: Any
    ) -> nn.Module:
        """A conv of this block's ``conv_cfg``; its geometry is the default."""
        options = dict(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=pair(kernel_size),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.padding_mode != 'zeros':
            # Not every conv type knows this argument.
            options['padding_mode'] = self.padding_mode
        return build_conv_layer(self.conv_cfg, bias=bias, **{**options, **geometry})

    def build_norm(self, channels: int) -> nn.Module:
        """A norm of this block's ``norm_cfg``."""
        return build_norm_layer(self.norm_cfg, channels)[1]

    def build_scale(self, value: float) -> nn.Module:
        """A trainable factor for each output channel, which starts as ``value``."""
        return LayerScale(self.out_channels, data_format='channels_first', scale=value)

    def build_conv_norm(self, conv: nn.Module, **before: nn.Module) -> Sequential:
        """``conv`` with a norm after it and, by name, other layers before it."""
        norm = self.build_norm(self.out_channels)
        return Sequential(OrderedDict(**before, conv=conv, **{self.norm_name: norm}))

    def nested(self, kind: type['ReparamBlock'], **options: Any) -> 'ReparamBlock':
        """A block with this block's geometry, convs and norms, to be used as a branch."""
        own = ('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode')
        names = (*own, 'conv_cfg', 'norm_cfg', 'one_conv')
        given = {name: getattr(self, name) for name in names}
        channels = self.in_channels, self.out_channels
        return kind(*channels, **{**given, 'act_cfg': None, **options})

    def pointwise_conv(self, out_channels: int) -> nn.Module:
        """A leading 1x1 conv: stride and padding belong to the layer after it."""
        return self.build_conv(
            1, out_channels=out_channels, stride=1, padding=0, dilation=1
        )

    def aligned_conv(
        self, kernel_size: int | Size, dilation: int | Size | None = None
    ) -> dict[str, nn.Module]:
        """Arguments of :meth:`build_conv_norm` for a conv on the block's middle taps.

        Its output has the size of the block's. If this takes a negative padding, or one
        that differs between opposite sides, the input is padded or cropped by a layer
        before the conv.

        Args:
            kernel_size (int | tuple[int, int]): Rows and columns of its kernel.
            dilation (int | tuple[int, int], optional): A multiple of the block's.
                Default: None, the block's.

        Raises:
            ValueError: If the kernel does not fit into the block's.
        """
        kernel_size = pair(kernel_size)
        dilation = self.dilation if dilation is None else pair(dilation)
        # Dilation has no effect on a single tap.
        sizes = zip(dilation, kernel_size, strict=True)
        dilation = tuple(apart if taps > 1 else 1 for apart, taps in sizes)
        if self.geometry.padding_mode == 'same':
            # 'SAME' padding follows from the conv's own kernel: a 1x1 conv gets none.
            return dict(conv=self.build_conv(kernel_size, dilation=dilation))
        sides = []
        for axis, padding in enumerate(self.padding):
            apart = self.dilation[axis]
            span = dilation[axis] * (kernel_size[axis] - 1)
            spare, rest = divmod(apart * (self.kernel_size[axis] - 1) - span, apart)
            if rest or spare < 0:
                raise ValueError(
                    f'a {kernel_size} kernel of dilation {dilation} does not fit into the '
                    f'middle of the {self.kernel_size} conv of dilation {self.dilation}'
                )
            before = spare // 2
            # Pixels before the first tap, and after the last.
            sides.append((padding - before * apart, padding - (spare - before) * apart))
        rows, columns = sides
        even = rows[0] == rows[1] >= 0 and columns[0] == columns[1] >= 0
        padding = (rows[0], columns[0]) if even else 0
        conv = self.build_conv(kernel_size, padding=padding, dilation=dilation)
        if even:
            return dict(conv=conv)
        return dict(align=PadOrCrop(rows, columns, self.padding_mode), conv=conv)

    @property
    def keeps_shape(self) -> bool:
        """Whether the identity can be a branch, with a tap on the output pixel's place.

        This takes as many output as input channels, stride 1 and a padding that keeps the
        size. In an even dilated kernel, the output pixel's place lies between two taps.
        """
        spans = zip(self.dilation, self.kernel_size, self.padding, strict=True)
        return (
            self.in_channels == self.out_channels
            and self.stride == (1, 1)
            and all(d * (k - 1) == 2 * p and p % d == 0 for d, k, p in spans)
        )

    def branches(self) -> dict[str, nn.Module]:
        """The branches by name; none in deploy form."""
        return {name: self.get_submodule(name) for name in self.branch_names}

    @property
    def weight(self) -> Tensor:
        """The kernel of the main branch, which initializers write."""
        return self.main_conv.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the main branch's conv, if it has one."""
        return self.main_conv.bias

    @property
    def main_conv(self) -> nn.Module:
        """The conv of the main branch, or the one conv in deploy form."""
        return self.get_submodule(self.main_conv_name())

    def main_conv_name(self) -> str:
        """The name of :attr:`main_conv`, which may lie in a nested block."""
        if self.deploy:
            return self.reparam_name
        main = self.get_submodule(first := self.branch_names[0])
        inside = main.main_conv_name() if isinstance(main, ReparamBlock) else 'conv'
        return f'{first}.{inside}'

    def main_norm_name(self) -> str:
        """The name of the norm after the main branch's conv, or after all branches."""
        if self.post_norm is not None:
            return 'post_norm'
        main = self.get_submodule(first := self.branch_names[0])
        nested = isinstance(main, ReparamBlock)
        inside = main.main_norm_name() if nested else self.norm_name
        return f'{first}.{inside}'

    def linear_parts(self) -> list[nn.Module]:
        """The branches and the norm after them: what becomes one conv."""
        after = [] if self.post_norm is None else [self.post_norm]
        return [*self.branches().values(), *after]

    def last_norms(self) -> list[nn.Module]:
        """The layers with a weight that end ``linear``: they scale all of its output."""
        if self.post_norm is not None:
            return [self.post_norm]
        names = chain.from_iterable(map(self._last_layers, self.branch_names))
        last = map(self.get_submodule, names)
        return [layer for layer in last if hasattr(layer, 'weight')]

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        out = run_block(self, self._linear_and_se, x, self.with_cp)
        if self.act is not None:
            out = self.act(out)
        if self._se is not None and self.se_position == 'after_act':
            out = self._se(out)
        return out

    @property
    def _se(self) -> nn.Module | None:
        return getattr(self, self.se_name)

    def _linear_and_se(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self._se is not None and self.se_position == 'before_act':
            out = self._se(out)
        return out

    def linear(self, x: Tensor) -> Tensor:
        """``post_norm`` of the sum of the branches, or the one conv that equals it."""
        if self.geometry.moves_with_size:
            self._see_size(tuple(x.shape[2:]))
        if self.deploy:
            return self.main_conv(x)
        out = self._one_conv(self.linear_parts(), self.equivalent_kernel_bias, x)
        if out is not None:
            return out
        branches = self.branches()
        if self.post_norm is not None:
            # post_norm may be the only norm that uses batch statistics.
            out = self._one_conv(branches.values(), self._kernel_of_sum, x)
        if out is None:
            first, *others = branches.values()
            out = first(x)
            for branch in others:
                out = out + branch(x)
        return out if self.post_norm is None else self.post_norm(out)

    def _one_conv(
        self,
        parts: Iterable[nn.Module],
        derive: Callable[[Size], tuple[Tensor, Tensor]],
        x: Tensor,
    ) -> Tensor | None:
        """Apply parts as one conv; None where :func:`one_conv_kernel` says they may not."""
        kernel = one_conv_kernel(parts, derive, x, self.stride, self.one_conv)
        if kernel is None:
            return None
        return self.geometry.convolve(x, *(tensor.to(x.dtype) for tensor in kernel))

    def sum_kernel(self) -> Tensor:
        """The kernel of the sum of the branches, ``(out, in / groups, kh, kw)``.

        It is the block's equivalent kernel if there is no ``post_norm``.
        """
        return self._kernel_of_sum(self.input_size)[0]

    def _kernel_of_sum(self, input_size: Size) -> tuple[Tensor, Tensor]:
        folded = self._fold(self.branches(), input_size)
        return folded.weight, folded.bias

    def equivalent_kernel_bias(
        self,
        input_size: Size | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The kernel and bias of ``linear`` in eval mode: ``linear(x) == conv(x, W, b)``.

        Differentiable with respect to the branches' parameters; the block is unchanged.

        Args:
            input_size (tuple[int, int], optional): Size of the input in pixels. The kernel
                depends on it under 'SAME' padding with a stride. Default: None, the size
                of the last input.
            dtype (torch.dtype, optional): Dtype of the computation and the result.
                Default: None, the parameters', at least float32.
            device (torch.device | str, optional): Device of the computation and the
                result. Default: None, the parameters'.

        Returns:
            tuple[Tensor, Tensor]: ``weight`` ``(out, in / groups, kh, kw)`` and ``bias``
            ``(out,)``.

        Raises:
            NotFoldableError: If a branch is not linear; names it and the reason.
        """
        if self.deploy:
            conv = self.main_conv
            return conv.weight.to(device, dtype), conv.bias.to(device, dtype)
        size = input_size or self.input_size
        folded = self._fold(self.branches(), size, dtype, device, self.post_norm)
        return folded.weight, folded.bias

    def branch_kernels(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What each branch adds to the equivalent kernel in eval mode, by branch name.

        The kernels add up to the ``weight`` of :meth:`equivalent_kernel_bias`, and have its
        shape. Deploy form has none.

        Args:
            dtype (torch.dtype, optional): Dtype of the computation and the result.
                Default: None, the parameters', at least float32.

        Raises:
            NotFoldableError: If a branch is not linear; names it and the reason.
        """
        return {
            name: self._fold(
                {name: branch}, self.input_size, dtype, then=self.post_norm
            ).weight
            for name, branch in self.branches().items()
        }

    def _fold(
        self,
        branches: Mapping[str, nn.Module],
        input_size: Size | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        then: nn.Module | None = None,
    ) -> LinearConv:
        """Fold the sum of some branches, and a norm after it, to one conv."""
        tensors = [*self.parameters(), *self.buffers()]
        tensor = tensors[0] if tensors else torch.empty(0)
        # There is no autocast on the meta device, and nothing to compute.
        kind = 'cpu' if tensor.is_meta else tensor.device.type
        # A branch without tensors, as an identity, has no dtype of its own.
        dtype = dtype or torch.promote_types(tensor.dtype, torch.float32)
        device = tensor.device if device is None else device
        with torch.autocast(kind, enabled=False):
            folded = fold_branches(branches, self.geometry, input_size, dtype, device)
            if then is None:
                return folded
            try:
                return fold_layer(then, folded)
            except NotFoldableError as error:
                raise NotFoldableError(f'post_norm: {error}') from None

    @property
    def lacks_size(self) -> bool:
        """Whether the kernel depends on the size of an input, and none has been seen."""
        return not self.deploy and self.geometry.moves_with_size and self.input_size is None

    def check_foldable(self) -> None:
        """Raise what :meth:`switch_to_deploy` would raise; compute and change nothing."""
        self.equivalent_kernel_bias(device='meta')

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by the one conv that equals them, fused in float64.

        Idempotent. Train or eval mode, device, dtype and ``requires_grad`` stay as they
        are; the conv has the block's geometry and padding mode.

        Raises:
            NotFoldableError: If a branch is not linear; names it and the reason. The
                block is unchanged.
        """
        if self.deploy:
            return
        self.check_foldable()
        weight, bias = self.equivalent_kernel_bias(dtype=torch.float64)
        replaced = [p for part in self.linear_parts() for p in part.parameters()]
        if not replaced:
            raise NotFoldableError('no branch has a parameter: there is nothing to fuse')
        with torch.device('meta'):
            # Skip initialization: set_kernel replaces the tensors.
            conv = self.build_conv(self.kernel_size, bias=True)
        set_kernel(conv, weight, bias, replaced)
        for name in {name.partition('.')[0] for name in self.branch_names}:
            delattr(self, name)
        self.branch_names, self.post_norm, self.deploy = (), None, True
        self._add_reparam(conv.train(self.training))
        if self.geometry.moves_with_size:
            start = self.geometry.start(self.input_size)
            self.reparam_start = torch.tensor(start, device=conv.weight.device)
            self._read_start()

    @torch.no_grad()
    def conv_norm_form(self) -> 'ReparamBlock':
        """A ``mmrep.ConvNormBlock``, one conv and a norm, with this block's function.

        The sum of the branches becomes the conv, and a ``post_norm`` its norm. Without a
        ``post_norm``, the norm is a new one, which in eval mode only adds the bias, until
        :func:`~mmrep.reparam.measure_norms` gives it the statistics of its input. SE layer
        and activation are shared with this block; dtype, device and ``requires_grad``
        stay.

        Raises:
            NotFoldableError: If the block is not foldable, its kernel depends on the size
                of the input, its norm has no running statistics or no scale, its class
                overrides ``forward`` or ``linear``, or hooks are registered on it, which
                the new block would lack.
        """
        if self.geometry.moves_with_size:
            raise NotFoldableError("its padding depends on the size of its input ('SAME')")
        own = (type(self).forward, type(self).linear)
        if own != (ReparamBlock.forward, ReparamBlock.linear):
            raise NotFoldableError('its class overrides forward or linear')
        hooks = (
            *(self._forward_hooks, self._forward_pre_hooks),
            *(self._backward_hooks, self._backward_pre_hooks),
        )
        if any(hooks):
            raise NotFoldableError('it has hooks: remove them first')
        block = MODELS.build(dict(self._conv_norm_config(), type='mmrep.ConvNormBlock'))
        block.register_module(block.se_name, self._se)
        block.act = self.act
        block.se_cfg, block.act_cfg = self.se_cfg, self.act_cfg
        main = block.get_submodule(block.branch_names[0])
        if self.post_norm is None:
            weight, bias = self.equivalent_kernel_bias(dtype=torch.float64)
            norm = getattr(main, block.norm_name)
        else:
            folded = self._fold(self.branches(), self.input_size, torch.float64)
            weight, bias, norm = folded.weight, folded.bias, copy.deepcopy(self.post_norm)
            setattr(main, block.norm_name, norm)
        if not has_running_statistics(norm) or norm.weight is None:
            raise NotFoldableError(
                f'a {type(norm).__name__} cannot be kept: give norms with running '
                'statistics and an affine map'
            )
        parts = self.linear_parts() or [self.main_conv]
        replaced = [p for part in parts for p in part.parameters()]
        set_kernel(main.conv, weight, bias, replaced)
        main.conv.bias = None
        if self.post_norm is None:
            # With its present statistics, the norm returns its input.
            norm.to(main.conv.weight).requires_grad_(main.conv.weight.requires_grad)
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
        # For the conv's output z this gives norm(z + bias).
        norm.running_mean -= bias.to(norm.running_mean)
        block.train(self.training)
        # With norm_eval the norms stay in eval mode in training, and so does this one.
        norms = [m for part in parts for m in part.modules() if has_running_statistics(m)]
        norm.train(any(m.training for m in norms) if norms else self.training)
        return block

    def _conv_norm_config(self) -> dict:
        """The arguments of the ``ConvNormBlock`` that replaces this block."""
        names = (
            *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding'),
            *('dilation', 'groups', 'padding_mode', 'se_position', 'with_cp'),
            *('conv_cfg', 'norm_cfg', 'one_conv'),
        )
        return {name: getattr(self, name) for name in names} | {'act_cfg': None}

    def _same_size_padding(self) -> Size:
        span = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(pixels % 2 for pixels in span):
            raise ValueError(
                f'no padding keeps the size with kernel_size={self.kernel_size} and '
                f'dilation={self.dilation}: give padding'
            )
        return span[0] // 2, span[1] // 2

    def _build_geometry(self) -> ConvGeometry:
        """The geometry of a conv of ``conv_cfg``; of an unknown type, the arguments'."""
        with torch.device('meta'):
            conv = self.build_conv(self.kernel_size)
        try:
            return conv_geometry(conv)
        except NotFoldableError as error:
            if self.deploy:
                raise NotFoldableError(f'deploy=True is impossible: {error}') from None
        names = ConvGeometry.__dataclass_fields__
        return ConvGeometry(**{name: getattr(self, name) for name in names})

    def _add_reparam(self, conv: nn.Module) -> None:
        self.add_module(self.reparam_name, conv)
        if self.geometry.moves_with_size:
            # Row and column of the fused kernel's first tap; positive until it is fused.
            self.register_buffer('reparam_start', torch.ones(2, dtype=torch.int64))
            self._read_start()

    def _read_start(self) -> None:
        # Reading the buffer in a forward pass would wait for the GPU and break the graph.
        start = self.reparam_start
        self._fused_start = None if start.is_meta else tuple(start.tolist())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if hasattr(self, 'reparam_start'):
            self._read_start()

    def _see_size(self, input_size: Size) -> None:
        """Keep the input's size; raise if the fused kernel is wrong for it."""
        self.input_size = input_size
        if not self.deploy:
            return
        fused, needed = self._fused_start, self.geometry.start(input_size)
        if fused is not None and max(fused) <= 0 and fused != needed:
            raise ValueError(
                "this block was fused for inputs for which 'SAME' padding puts the first "
                f'tap at pixel {fused}; for an input of {input_size} it is at {needed}: '
                'fuse the block for this size, or resize the input'
            )


@register_fold(ReparamBlock)
def _(block: ReparamBlock, partial: LinearConv) -> LinearConv:
    if block.act is not None or block._se is not None:
        raise NotFoldableError(f'{type(block).__name__} has an activation or SE')
    if block.deploy and block.geometry.moves_with_size:
        raise NotFoldableError(f'{type(block).__name__} was fused for one input size')
    kernel = block.equivalent_kernel_bias(partial.input_size, partial.dtype, partial.device)
    return partial.then_conv(*kernel, block.geometry)
