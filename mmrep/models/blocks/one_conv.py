"""When a block in train form computes with its equivalent kernel."""

from typing import TYPE_CHECKING

from torch import Tensor

from mmrep.reparam import NotFoldableError, computes_as_folded

if TYPE_CHECKING:
    from .base import ReparamBlock

#: Output pixels of a batch from which one conv takes less time than the branches.
#: Deriving a kernel takes the same for every input; what it saves grows with the pixels.
#: Both grow with the channels, so that the number of pixels alone is a fair rule.
#: Measured on two cores; no GPU was at hand.
AUTO_PIXELS = 400


def one_conv_kernel(block: 'ReparamBlock', x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The kernel and bias that a block computes with instead of its branches, if it does.

    It does where its ``one_conv`` allows it for an input of this size, and where its
    branches are linear at this moment: every norm uses running statistics, every layer is
    of a type whose forward is known, and nobody waits in a hook or a parametrization for
    a layer to compute. All of this is looked up in the modules as they are now.

    Args:
        block: A block in train form.
        x: Its input ``(N, in, H, W)``.

    Returns:
        ``weight`` and ``bias`` with gradients to the branches, or ``None`` for branches.
    """
    pixels = {True: 0, 'auto': AUTO_PIXELS}.get(block.one_conv, block.one_conv)
    if block.one_conv is False or x.size(0) * x.size(2) * x.size(3) < pixels * (
        block.stride[0] * block.stride[1]
    ):
        return None
    try:
        for part in block.linear_parts():
            if not all(map(computes_as_folded, part.modules())):
                return None
        return block.equivalent_kernel_bias(tuple(x.shape[2:]))
    except NotFoldableError:
        return None
