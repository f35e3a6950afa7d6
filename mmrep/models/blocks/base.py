"""A re-parameterizable block: the sum of its branches, then SE, then an activation."""

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from mmrep.reparam import (
    ConvGeometry,
    NotFoldableError,
    conv_geometry,
    fold_branches,
    has_running_statistics,
    is_batch_norm,
)

from ..layers import PadOrCrop, SELayer, build_activation, run_block

Size = tuple[int, int]

#: The multiply-adds of a conv that take as long. Measured on two cores with AVX-512;
#: what Python takes for a fold is estimated for a GPU, which multiplies meanwhile.
_AS_LONG = {
    'a fold on a CPU': 3 * 10**7,
    'a fold': 5 * 10**9,
    'a weight': 80,
    'a normalised value': 200,
}


def pair(value: int | Size) -> Size:
    """``value`` for rows and for columns."""
    return (value, value) if isinstance(value, int) else tuple(value)


class ReparamBlock(BaseModule):
    """The base of every block: ``y = act(se(linear(x)))``.

    ``linear`` is the sum of the branches, or one conv with the equivalent kernel. A
    subclass names its branches in ``branch_names`` and builds them in
    :meth:`build_branches`, and is done: forward, fusing and the switch are here.

    Where every norm uses running statistics (in eval mode, with ``norm_eval``, in frozen
    stages) the train form computes with its equivalent kernel, derived anew from the
    current parameters in every forward, with exact gradients to them. It does so where
    deriving, which is the same for every input, takes less than the branches would take
    more, which grows with the number of pixels: hardly for many channels on tiny maps.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel.
        stride (int | tuple[int, int]): Stride. Default: 1.
        padding (int | tuple[int, int], optional): Padding, in pixels. Default: None,
            which means as much as keeps the size at stride 1.
        dilation (int | tuple[int, int]): Dilation. Default: 1.
        groups (int): Number of groups. Default: 1.
        padding_mode (str): As ``nn.Conv2d``'s, for every branch. Default: ``'zeros'``.
        se_cfg (dict, optional): Config of :class:`~mmrep.models.layers.SELayer`.
            Default: None, no SE.
        se_position (str): ``'before_act'`` (RepVGG-D2se) or ``'after_act'`` (RepVGGplus).
            Default: ``'before_act'``.
        with_cp (bool): Recompute the block in the backward pass to save memory. The
            running statistics are updated once, as without. Default: False.
        conv_cfg (dict, optional): Config of the convs. Default: None, ``nn.Conv2d``.
        norm_cfg (dict): Config of the norms. Default: ``dict(type='BN')``.
        act_cfg (dict, optional): Config of the activation; None for none.
            Default: ``dict(type='ReLU')``.
        deploy (bool): Build the one conv in the place of the branches. Default: False.
        one_conv (bool): Allow the train form to compute with its equivalent kernel.
            Default: True.
        init_cfg (dict | list[dict], optional): Initialization. Default: None.
    """

    #: Attributes that hold the branches; one that a block does without is ``None``.
    branch_names: tuple[str, ...] = ()

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
        one_conv: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not (se_cfg is None or isinstance(se_cfg, dict)):
            raise TypeError(f'se_cfg must be a dict or None, not {se_cfg!r}')
        if se_position not in ('before_act', 'after_act'):
            raise ValueError(
                f"se_position is 'before_act' or 'after_act', not {se_position!r}"
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
        #: Size of the last input; what the tap of a 1x1 depends on under 'SAME' padding.
        self.input_size: Size | None = None

        if deploy:
            # Not every conv type that has no deploy form has a bias, either.
            with torch.device('meta'):
                self.frame = self._geometry_of(self.build_conv(self.kernel_size))
            self._add_reparam(self.build_conv(self.kernel_size, bias=True))
        else:
            main_conv = self.build_conv(self.kernel_size)
            self.frame = self._geometry_of(main_conv)
            self.build_branches(main_conv)
        self.foldable = not deploy and self._is_foldable()
        self._costs = self._count_costs()
        self.se_layer = None if se_cfg is None else SELayer(out_channels, **se_cfg)
        self.act = None if act_cfg is None else build_activation(act_cfg)

    def build_branches(self, main_conv: nn.Module) -> None:
        """Set an attribute for every one of ``branch_names``.

        Args:
            main_conv (nn.Module): The kxk conv of the block, for the main branch.
        """
        raise NotImplementedError

    def build_conv(
        self, kernel_size: int | Size, bias: bool = False, **geometry
    ) -> nn.Module:
        """A conv of this block's ``conv_cfg``, with its geometry where none is given."""
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

    def conv_norm(self, conv: nn.Module, **before: nn.Module) -> Sequential:
        """``conv`` with a norm after it and, by name, other layers before it."""
        branch = Sequential()
        for name, layer in before.items():
            branch.add_module(name, layer)
        branch.add_module('conv', conv)
        branch.add_module('norm', self.build_norm(self.out_channels))
        return branch

    def conv_norm_1x1(self) -> Sequential:
        """A 1x1 conv and a norm, under the middle tap of the block's conv.

        Its output has the size of the block's: where the block's padding is not the one
        that keeps the size, it pads or crops its input.
        """
        conv = self.build_conv(1, padding=0, dilation=1)
        if self.frame is not None and self.frame.padding_mode == 'same':
            return self.conv_norm(conv)
        rows, columns = (
            # Pixels before the middle tap, and after it.
            (p - (k - 1) // 2 * d, p - k // 2 * d)
            for p, k, d in zip(self.padding, self.kernel_size, self.dilation, strict=True)
        )
        if rows == columns == (0, 0):
            return self.conv_norm(conv)
        return self.conv_norm(conv, align=PadOrCrop(rows, columns, self.padding_mode))

    def branches(self) -> dict[str, nn.Module]:
        """The branches that this block has, by name; none in deploy form."""
        if self.deploy:
            return {}
        named = {name: getattr(self, name) for name in self.branch_names}
        return {name: branch for name, branch in named.items() if branch is not None}

    def last_norms(self) -> dict[str, nn.Module]:
        """The norm that ends each branch, by the branch's name."""
        return {
            name: branch if has_running_statistics(branch) else [*branch.children()][-1]
            for name, branch in self.branches().items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        out = run_block(self, self._linear_and_se, x, self.with_cp)
        if self.act is not None:
            out = self.act(out)
        if self.se_layer is not None and self.se_position == 'after_act':
            out = self.se_layer(out)
        return out

    def _linear_and_se(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.se_layer is not None and self.se_position == 'before_act':
            out = self.se_layer(out)
        return out

    def linear(self, x: Tensor) -> Tensor:
        """The sum of the branches, or the one conv that they equal."""
        if self.frame is not None and self.frame.moves_with_size:
            self._see_size(tuple(x.shape[2:]))
        if self.deploy:
            return self.branch_reparam(x)
        if self.one_conv and self.foldable and self._is_linear_now() and self._pays(x):
            weight, bias = self.equivalent_kernel_bias(tuple(x.shape[2:]))
            dtype = next(self.parameters()).dtype
            return self.frame.convolve(x, weight.to(dtype), bias.to(dtype))
        branches = list(self.branches().values())
        if len(branches) == 1:
            return branches[0](x)
        # A sum of two is nobody else's: not the input, which a branch may return as it is.
        out = branches[0](x) + branches[1](x)
        for branch in branches[2:]:
            out += branch(x)
        return out

    def equivalent_kernel_bias(
        self,
        input_size: Size | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The conv that ``linear`` is in eval mode: ``linear(x) == conv(x, W, b)``.

        Differentiable with respect to the branches' parameters; changes nothing.

        Args:
            input_size (tuple[int, int], optional): Size of the input in pixels, which the
                kernel depends on under 'SAME' padding with a stride. Default: None, the
                size of the last input.
            dtype (torch.dtype, optional): Of the computation and the result.
                Default: None, the parameters', at least float32.
            device (torch.device | str, optional): Of the computation and the result.
                Default: None, the parameters'.

        Returns:
            tuple[Tensor, Tensor]: ``weight`` ``(out, in / groups, kh, kw)`` and ``bias``
            ``(out,)``.

        Raises:
            NotFoldableError: If a branch is not linear; names it and the reason.
        """
        if self.deploy:
            conv = self.branch_reparam
            return conv.weight.to(device, dtype), conv.bias.to(device, dtype)
        if self.frame is None:
            raise NotFoldableError(f'{self.branch_names[0]}: {self._unknown_conv}')
        kind = next(self.parameters()).device.type
        # There is no autocast on the meta device, and nothing to compute.
        with torch.autocast('cpu' if kind == 'meta' else kind, enabled=False):
            return fold_branches(
                self.branches(),
                self.frame,
                input_size or self.input_size,
                dtype,
                device,
            )

    @property
    def lacks_size(self) -> bool:
        """Whether the kernel depends on the size of an input, and none has been seen."""
        return (
            not self.deploy
            and self.frame is not None
            and self.frame.moves_with_size
            and self.input_size is None
        )

    def check_foldable(self) -> None:
        """Raise what :meth:`switch_to_deploy` would raise; change nothing.

        Norms with a forward of their own are tried out; nothing else is computed.
        """
        self.equivalent_kernel_bias(device='meta')

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Replace the branches by the one conv that they equal, fused in float64.

        Idempotent. Train or eval mode, device, dtype and ``requires_grad`` stay as they
        are; the conv's geometry, padding mode included, is the block's.

        Raises:
            NotFoldableError: If a branch is not linear; names it and the reason. The
                block is unchanged.
        """
        if self.deploy:
            return
        self.check_foldable()
        weight, bias = self.equivalent_kernel_bias(dtype=torch.float64)
        like = next(self.parameters())
        with torch.device('meta'):
            # Its own numbers would be drawn for nothing.
            conv = self.build_conv(self.kernel_size, bias=True)
        conv.weight = nn.Parameter(weight.to(like, memory_format=torch.contiguous_format))
        conv.bias = nn.Parameter(bias.to(like))
        trainable = [
            p.requires_grad for b in self.branches().values() for p in b.parameters()
        ]
        # A frozen block stays frozen.
        conv.requires_grad_(any(trainable))
        for name in self.branch_names:
            delattr(self, name)
        self.deploy = True
        self._add_reparam(conv.train(self.training))
        if self.frame.moves_with_size:
            start = self.frame.start(self.input_size)
            self.reparam_start = torch.tensor(start, device=like.device)

    def _same_size_padding(self) -> Size:
        span = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(pixels % 2 for pixels in span):
            raise ValueError(
                f'no padding keeps the size with kernel_size={self.kernel_size} and '
                f'dilation={self.dilation}: give padding'
            )
        return span[0] // 2, span[1] // 2

    def _geometry_of(self, conv: nn.Module) -> ConvGeometry | None:
        """The block's frame; ``None`` where ``conv_cfg`` is of a type without one."""
        try:
            return conv_geometry(conv)
        except NotFoldableError as error:
            self._unknown_conv = str(error)
            if self.deploy:
                raise NotFoldableError(f'deploy=True is impossible: {error}') from None
            return None

    def _add_reparam(self, conv: nn.Module) -> None:
        self.branch_reparam = conv
        if self.frame.moves_with_size:
            # Where the first tap of the fused kernel lies; positive until it is fused.
            self.register_buffer('reparam_start', torch.ones(2, dtype=torch.int64))

    def _is_foldable(self) -> bool:
        """Whether the branches are linear in eval mode, whatever the input's size."""
        try:
            self.equivalent_kernel_bias((64, 64), device='meta')
        except NotFoldableError:
            return False
        return True

    def _is_linear_now(self) -> bool:
        """Whether no norm of a branch uses batch statistics, or may be something else."""
        return not any(
            has_running_statistics(layer) and (layer.training or not is_batch_norm(layer))
            for branch in self.branches().values()
            for layer in branch.modules()
        )

    def _pays(self, x: Tensor) -> bool:
        """Whether deriving the kernel takes less time than the branches would take more.

        In multiply-adds: those of transform III and of the convs that are saved, and
        what takes as long as so many, see :data:`_AS_LONG`.
        """
        frame = self.frame
        pixels = x.size(0) * x.size(2) * x.size(3) // (frame.stride[0] * frame.stride[1])
        deriving, saved_per_pixel = self._costs
        fixed = _AS_LONG['a fold on a CPU' if x.device.type == 'cpu' else 'a fold']
        return fixed + deriving < pixels * saved_per_pixel

    def _count_costs(self) -> tuple[int, int]:
        """Multiply-adds of deriving the kernel, and those saved for a pixel."""
        width = self.in_channels // self.groups
        one = self.out_channels * width * self.kernel_size[0] * self.kernel_size[1]
        branches = list(self.branches().values())
        weights = sum(p.numel() for b in branches for p in b.parameters() if p.dim() > 1)
        merged = sum(hasattr(b, 'conv1') and not b.pools for b in branches)
        norms = sum(has_running_statistics(m) for b in branches for m in b.modules())
        deriving = _AS_LONG['a weight'] * weights + merged * one * width
        saved = weights - one + _AS_LONG['a normalised value'] * norms * self.out_channels
        return deriving, saved

    def _see_size(self, input_size: Size) -> None:
        """Keep the input's size; refuse one that the fused kernel is wrong for."""
        self.input_size = input_size
        if not self.deploy:
            return
        fused = tuple(self.reparam_start.tolist())
        needed = self.frame.start(input_size)
        if max(fused) <= 0 and fused != needed:
            raise ValueError(
                f"this block was fused for inputs that 'SAME' padding shifts by {fused} "
                f'pixels; an input of {input_size} shifts by {needed}: fuse it for this '
                'size, or resize the input to the parity it was fused for'
            )
