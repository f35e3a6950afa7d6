"""The two-layer branches of DBB: 1x1 - norm - kxk - norm and 1x1 - norm - avg - norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.reparam import (
    LINEAR_CONVS,
    ConvGeometry,
    LinearConv,
    bn_affine,
    constant_response,
    conv_geometry,
    fold_layer,
    has_running_statistics,
    is_watched,
    norm_tensors,
    register_fold,
)

from .pooling import DilatedAvgPool2d


class PointwiseSpatial(nn.Module):
    """A 1x1 conv and a norm, then a kxk conv or an average pooling and a norm.

    ``y = norm2(spatial(pad(norm1(conv1(x)))))``. To equal one conv, ``pad`` has to pad with
    the response of ``conv1`` and ``norm1`` to zeros, per channel
    ``p = beta - gamma mean / sqrt(var + eps)`` from the running statistics (DBB, section
    3.3 and its code). Instead of making a padded copy, ``p`` is subtracted before the zero
    padding and the response to it is added afterwards: ``spatial(pad_p(u)) ==
    spatial(pad_0(u - p)) + spatial(p)``. While ``norm1`` uses batch statistics, no gradient
    flows through ``p``, as in the official code.

    Padding modes other than zeros need no ``p``: they commute with ``conv1`` and
    ``norm1``. After a norm without running statistics, zeros are padded; such a branch can
    be trained, but not folded.

    Args:
        conv1, norm1 (nn.Module): The 1x1 conv and the norm after it.
        spatial (nn.Module): The kxk conv or the pooling, with padding.
        norm2 (nn.Module): The last norm.
        geometry (ConvGeometry): The geometry of the spatial layer.
    """

    def __init__(
        self,
        conv1: nn.Module,
        norm1: nn.Module,
        spatial: nn.Module,
        norm2: nn.Module,
        geometry: ConvGeometry,
    ) -> None:
        super().__init__()
        self.conv1 = conv1
        self.norm1 = norm1
        self.pools = isinstance(spatial, DilatedAvgPool2d)
        self.add_module('pool' if self.pools else 'conv2', spatial)
        self.norm2 = norm2
        self.geometry = geometry

    @property
    def spatial(self) -> nn.Module:
        """The second linear layer."""
        return self.pool if self.pools else self.conv2

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, H, W)`` to ``(N, out, H', W')``."""
        x = self.norm1(self.conv1(x))
        pads_zeros = self.geometry.fill == 'zeros' and any(
            map(any, self.geometry.pad(tuple(x.shape[2:])))
        )
        # After norm1, so that p is computed from the updated running statistics.
        pad_value = self._response_to_zero() if pads_zeros else None
        if pad_value is None:
            return self.norm2(self.spatial(x))
        per_channel = pad_value.to(x.dtype).reshape(1, -1, 1, 1)
        x = x - per_channel
        if self.pools:
            # The average of a constant is the constant.
            return self.norm2(self.pool(x) + per_channel)
        conv = self.conv2
        if type(conv) in LINEAR_CONVS and not is_watched(conv):
            bias = constant_response(
                conv.weight, pad_value.to(conv.weight.dtype), conv.groups
            )
            bias = bias if conv.bias is None else bias + conv.bias
            return self.norm2(conv_geometry(conv).convolve(x, conv.weight, bias))
        return self.norm2(self._pad_and_crop(x, per_channel))

    def _response_to_zero(self) -> Tensor | None:
        """``p``, the response of ``conv1`` and ``norm1`` to zeros; None to pad with zeros.

        If the two were fused, ``norm1`` is the identity and ``p`` is the bias of ``conv1``.
        """
        bias = getattr(self.conv1, 'bias', None)
        if has_running_statistics(self.norm1):
            scale, shift = bn_affine(*norm_tensors(self.norm1))
            response = shift if bias is None else torch.addcmul(shift, scale, bias)
            return response.detach() if self.norm1.training else response
        return bias if isinstance(self.norm1, nn.Identity) else None

    def _pad_and_crop(self, x: Tensor, pad_value: Tensor) -> Tensor:
        """Apply ``conv2``, of any type, with ``p`` as the padding value.

        The map is padded with ``p`` by at least as much as ``conv2`` pads with zeros, and
        the output pixels in which ``conv2`` read its own padding are cropped.
        """
        pads, stride = self.geometry.pad(tuple(x.shape[2:])), self.geometry.stride
        rows, columns = (-(-max(pad) // s) for pad, s in zip(pads, stride, strict=True))
        down, right = rows * stride[0], columns * stride[1]
        out = self.conv2(F.pad(x, (right, right, down, down)) + pad_value)
        return F.pad(out, (-columns, -columns, -rows, -rows))


@register_fold(PointwiseSpatial)
def _(layer: PointwiseSpatial, partial: LinearConv) -> LinearConv:
    partial = fold_layer(layer.norm1, fold_layer(layer.conv1, partial))
    partial = fold_layer(layer.spatial, partial._replace(pads_with_response=True))
    return fold_layer(layer.norm2, partial._replace(pads_with_response=False))
