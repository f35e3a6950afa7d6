"""The two-layer branches of DBB: 1x1 - norm - kxk - norm and 1x1 - norm - avg - norm."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.reparam import (
    ConvGeometry,
    LinearConv,
    NotFoldableError,
    bn_affine,
    constant_response,
    conv_geometry,
    current_weight,
    fold_layer,
    has_running_statistics,
    norm_tensors,
)

from .pooling import DilatedAvgPool2d
from .recompute import MadeAgain, is_compiling


class PointwiseSpatial(nn.Module):
    """A 1x1 conv and a norm, then a kxk conv or an average pooling and a norm.

    ``y = norm2(spatial(pad(norm1(conv1(x)))))``. To be one conv, ``pad`` has to put
    around the map what ``conv1`` and ``norm1`` make of a zero, per channel
    ``p = beta - gamma mean / sqrt(var + eps)`` from the running statistics (DBB, section
    3.3 and its code). Instead of a padded copy, ``p`` is subtracted before the zero
    padding and its response added after: ``spatial(pad_p(u)) == spatial(pad_0(u - p)) +
    spatial(p)``. While ``norm1`` uses batch statistics, ``p`` is a constant to autograd,
    as in the official code.

    Padding modes other than zeros need no ``p``: they commute with ``conv1`` and
    ``norm1``. A norm without running statistics and a conv whose kernel is not known
    pad with zeros; such a branch trains and cannot be folded.

    Args:
        conv1 (nn.Module): The 1x1 conv, without a bias.
        norm1 (nn.Module): The norm after it.
        spatial (nn.Module): The kxk conv without a bias, or the pooling, with padding.
        norm2 (nn.Module): The last norm.
    """

    def __init__(
        self, conv1: nn.Module, norm1: nn.Module, spatial: nn.Module, norm2: nn.Module
    ) -> None:
        super().__init__()
        self.conv1 = conv1
        self.norm1 = norm1
        self.pools = isinstance(spatial, DilatedAvgPool2d)
        self.add_module('pool' if self.pools else 'conv2', spatial)
        self.norm2 = norm2
        self.geometry = self._padding_geometry(spatial)

    def _padding_geometry(self, spatial: nn.Module) -> ConvGeometry | None:
        """The geometry of the spatial layer where ``p`` is needed, else ``None``."""
        try:
            geometry = spatial.geometry if self.pools else conv_geometry(spatial)
        except NotFoldableError:
            return None
        zeros = geometry.padding_mode == 'same' or (
            geometry.padding_mode == 'zeros' and any(geometry.padding)
        )
        return geometry if zeros and has_running_statistics(self.norm1) else None

    @property
    def spatial(self) -> nn.Module:
        """The second linear layer."""
        return self.pool if self.pools else self.conv2

    def response_to_zero(self) -> Tensor:
        """``p``: what ``norm1(conv1(0))`` is with running statistics, ``(mid,)``."""
        norm = self.norm1
        _, value = bn_affine(*norm_tensors(norm))
        return value.detach() if norm.training else value

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        mapped = self.conv1(x)
        x = self.norm1(mapped)
        if self.geometry is None:
            return self.norm2(self.spatial(x))
        # After norm1: the statistics that p is made of are the updated ones.
        value = self.response_to_zero()
        # No layer's backward needs the output of a norm, so this may be in place.
        x = x.sub_(value.to(x.dtype).reshape(1, -1, 1, 1))
        kept = MadeAgain() if self._makes_again() else None
        with kept or nullcontext():
            if kept is not None:
                make_x = self._maker(mapped.detach(), value.detach())
                kept.replace(x, make_x)
            if not self.pools:
                return self.norm2(self._convolve(x, value))
            value = value.to(x.dtype).reshape(1, -1, 1, 1)
            x = self.pool(x).add_(value)
            if kept is not None:
                kept.replace(x, lambda: self.pool.average(make_x()).add_(value))
            return self.norm2(x)

    def _makes_again(self) -> bool:
        """Whether what the cheap layers make is made again for the backward pass.

        Kept is what conv1 makes; the rest takes a fraction of the branch's time. Norms of
        other types may talk to other processes, which they should do once. A compiler
        decides itself what is worth keeping, and a trace needs nothing.
        """
        return (
            type(self.norm1) is nn.BatchNorm2d
            and torch.is_grad_enabled()
            and not is_compiling()
            and not torch.jit.is_tracing()
            and MadeAgain.is_possible()
        )

    def _maker(self, mapped: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """What makes ``norm1(mapped) - p`` once more, from the tensors of now."""
        norm = self.norm1
        weight, bias, training, eps = norm.weight, norm.bias, norm.training, norm.eps
        # In training they are the input's; else they may have moved by then.
        mean, var = (
            None if training else statistic.clone()
            for statistic in (norm.running_mean, norm.running_var)
        )

        def make() -> Tensor:
            x = F.batch_norm(mapped, mean, var, weight, bias, training, 0.0, eps)
            return x.sub_(value.to(x.dtype).reshape(1, -1, 1, 1))

        return make

    def _convolve(self, x: Tensor, value: Tensor) -> Tensor:
        """``conv2`` of what is padded with ``p``, given what is padded with zeros."""
        weight = current_weight(self.conv2)
        response = constant_response(weight, value.to(weight.dtype), self.geometry.groups)
        if self.norm2.training:
            # norm2 subtracts it again: its gradient is zero, and a bias that needs none
            # saves a pass over the map.
            response = response.detach()
        return self.geometry.convolve(x, weight, response)


@fold_layer.register(PointwiseSpatial)
def _(layer: PointwiseSpatial, done: LinearConv) -> LinearConv:
    done = fold_layer(layer.norm1, fold_layer(layer.conv1, done))
    done = fold_layer(layer.spatial, done._replace(pads_with_response=True))
    return fold_layer(layer.norm2, done._replace(pads_with_response=False))
