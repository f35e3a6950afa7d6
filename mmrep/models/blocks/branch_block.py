"""A block whose branches are listed in a config."""

import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mmengine.model import Sequential
from torch import nn

from mmrep.registry import MODELS

from ..layers import DilatedAvgPool2d
from .base import ReparamBlock, Size, pair


@MODELS.register_module()
class BranchBlock(ReparamBlock):
    """``y = act(se(post_norm(sum_b branch_b(x))))``: any sum of branches, from a config.

    A branch is one of these, with a norm after it:

    - ``'kxk'``, or rows and columns as ``'3x3'`` and ``'1x3'``: a conv on the middle taps
      of the block's kernel. ``dict(kernel_size=3, dilation=2)`` is a conv on every second
      of these taps;
    - ``'avg'``: the average over the taps; left out unless there are as many output as
      input channels;
    - ``'identity'``: the input; left out unless the output has its shape;
    - ``dict(type='mmrep.DiverseBranchBlock')``: another block, which has its own norms.

    ``dict(kernel_size=1, norm=False)``, ``dict(type='avg', norm=False)`` and
    ``dict(type='identity', norm=False)`` have no norm. The first branch is the main one; it
    has the block's own kernel size. The other arguments are
    :class:`~mmrep.models.blocks.ReparamBlock`'s.

    Args:
        in_channels, out_channels: See the base.
        kernel_size (int | tuple[int, int]): Rows and columns of the kernel. Default: 3.
        branches (Sequence[str | dict]): The branches. Default: ``('kxk', '1x1',
            'identity')``, RepVGG's.
        post_norm (bool): Whether a norm follows the sum. Default: False.
        **kwargs: The options of :class:`~mmrep.models.blocks.ReparamBlock`, by name.

    Raises:
        ValueError: If a branch is none of these or does not fit into the kernel, or if the
            first branch does not have the block's kernel size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 3,
        *,
        branches: Sequence[str | dict] = ('kxk', '1x1', 'identity'),
        post_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.chosen = tuple(branches)
        self.ends_with_norm = post_norm
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)

    def build_branches(self) -> dict[str, nn.Module]:
        branches, seen = {}, Counter()
        for entry in self.chosen:
            label, branch = self._builder(entry)()
            if not seen and not self._may_be_main(branch):
                raise ValueError(
                    "the first branch must have the block's own kernel size, as 'kxk', "
                    f'not {entry!r}'
                )
            seen[label] += 1
            if branch is not None:
                number = f'_{seen[label]}' if seen[label] > 1 else ''
                branches[f'branch_{label}{number}'] = branch
        if not branches:
            raise ValueError("branches is empty: give at least one, as branches=('kxk',)")
        return branches

    def build_post_norm(self) -> nn.Module | None:
        return self.build_norm(self.out_channels) if self.ends_with_norm else None

    def _may_be_main(self, branch: nn.Module | None) -> bool:
        conv = getattr(branch, 'conv', None)
        return isinstance(branch, ReparamBlock) or (
            conv is not None and conv.kernel_size == self.kernel_size
        )

    def _builder(
        self, entry: str | Mapping[str, Any]
    ) -> Callable[[], tuple[str, nn.Module | None]]:
        """A function that builds a branch: its label, and the branch or None."""
        options = dict(entry) if isinstance(entry, Mapping) else self._by_name(entry)
        kind = options.pop('type', 'conv')
        makers = dict(conv=self._conv, avg=self._avg, identity=self._identity)
        make = makers.get(kind) or partial(self._block, kind)
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            raise ValueError(f'{entry!r} is not a valid branch: {error}') from None
        return partial(make, **options)

    def _by_name(self, name: str) -> dict[str, Any]:
        if name in ('avg', 'identity'):
            return dict(type=name)
        if name == 'kxk':
            return dict(kernel_size=self.kernel_size)
        if isinstance(name, str) and (size := re.fullmatch(r'(\d+)x(\d+)', name)):
            return dict(kernel_size=tuple(map(int, size.groups())))
        raise ValueError(
            f"{name!r} is not a valid branch: choose 'kxk', rows and columns as '1x3', "
            "'avg' or 'identity', or give a dict"
        )

    def _conv(
        self, kernel_size: int | Size, dilation: int | Size = 1, norm: bool = True
    ) -> tuple[str, nn.Module]:
        apart = pair(dilation)
        label = '{}x{}'.format(*pair(kernel_size))
        if apart != (1, 1):
            label += f'_d{apart[0]}' if apart[0] == apart[1] else '_d{}x{}'.format(*apart)
        spread = tuple(a * b for a, b in zip(apart, self.dilation, strict=True))
        return label, self._with_norm(norm, **self.aligned_conv(kernel_size, spread))

    def _avg(self, norm: bool = True) -> tuple[str, nn.Module | None]:
        if self.in_channels != self.out_channels:
            return 'avg', None
        return 'avg', self._with_norm(norm, pool=DilatedAvgPool2d(self.geometry))

    def _identity(self, norm: bool = True) -> tuple[str, nn.Module | None]:
        if not self.keeps_shape:
            return 'identity', None
        return 'identity', self.build_norm(self.out_channels) if norm else nn.Identity()

    def _block(self, kind: Any, **options: Any) -> tuple[str, nn.Module]:
        found = MODELS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(found, type) and issubclass(found, ReparamBlock)):
            raise ValueError(f'{kind!r} is not a re-parameterizable block')
        return found.__name__, self.nested(found, **options)

    def _with_norm(self, norm: bool, **layers: nn.Module) -> nn.Module:
        if norm:
            layers['norm'] = self.build_norm(self.out_channels)
        return Sequential(OrderedDict(layers))
