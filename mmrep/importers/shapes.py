"""Read settings of blocks of any kind from the shapes of renamed weights."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.models.layers.se_layer import make_divisible

#: Squeeze ratios to try. Several may fit, so those of named architectures come first.
_RATIOS = (16, 4, *range(1, 65))


def check_name(arch: str | None, named: Iterable[str]) -> None:
    """Raise ``CheckpointError`` if ``arch`` is not the name of an architecture."""
    if arch is not None and arch not in named:
        raise CheckpointError(f'arch {arch!r} is unknown; choose from {", ".join(named)}')


def count_blocks(
    state: Iterable[str], prefix: str, inside: str = '', first: int = 1
) -> Iterator[int]:
    """Count the blocks of each stage by the largest block number in its keys.

    Missing blocks and stages count, too, and a file may name a billion of them. So this is
    an iterator: the caller stops at the first block that is missing.

    Args:
        state: The keys.
        prefix: Regular expression of what precedes a stage's number.
        inside: Regular expression of what precedes a block's number in its stage.
            Default: nothing.
        first: Number of the first stage. Default: 1.
    """
    # int() refuses thousands of digits. Keys with such numbers are reported as unexpected
    # later.
    stage = re.compile(rf'{prefix}(0|[1-9]\d{{0,8}})\.{inside}(\d{{1,9}})\.')
    found = map(stage.match, state)
    last = dict(sorted((int(m[1]), int(m[2])) for m in found if m))
    for i in range(first, 1 + max(last, default=-1)):
        yield 1 + last.get(i, 0)


def kernel(state: Mapping[str, Tensor], block: str, *names: str) -> Tensor:
    """The kernel of a block's main conv, in any form.

    Args:
        state: The weights.
        block: The block's name.
        *names: What its conv may be called.

    Raises:
        CheckpointError: If there is none; the caller names the file.
    """
    keys = (f'{block}.{name}.weight' for name in names)
    weight = next((state[key] for key in keys if key in state), None)
    if weight is None or weight.dim() != 4:
        raise CheckpointError(f"the main conv of mmrep's block {block} is missing")
    return weight


def named_arch(
    measured: dict[str, Any],
    named: Mapping[str, Mapping[str, Any]],
    untold: Iterable[str] = (),
) -> str | dict[str, Any]:
    """The name of a measured architecture, or ``measured`` itself if it has none.

    Args:
        measured: The settings that were found from the shapes.
        named: The settings of the named architectures.
        untold: Settings that cannot be found from these weights. Default: none.
    """
    told = set(measured) - set(untold)
    same = (
        name
        for name, settings in named.items()
        if all(measured[key] == settings[key] for key in told)
    )
    return next(same, measured)


def factor(width: int, unit: int) -> float:
    """A factor ``f`` for which ``int(unit * f) == width``."""
    factor = width / unit
    return factor if int(unit * factor) == width else (width + 0.5) / unit


def squeezed(state: Mapping[str, Tensor], layer: str) -> int:
    """The inner channels of an SE layer; 0 where there is none.

    Raises:
        CheckpointError: If its weight is not that of a conv; the caller names the file.
    """
    weight = state.get(f'{layer}.conv1.conv.weight')
    if weight is None:
        return 0
    if weight.dim() != 4:
        raise CheckpointError(f"a weight of mmrep's {layer} is not that of a conv")
    return len(weight)


def is_se_cfg(cfg: Mapping[str, int], layers: Iterable[tuple[int, int]]) -> bool:
    """Whether a config fits SE layers of these widths, outer and inner."""
    ratio, divisor = cfg['ratio'], cfg.get('divisor', 8)
    return all(make_divisible(outer // ratio, divisor) == inner for outer, inner in layers)


def find_se_cfg(layers: list[tuple[int, int]]) -> dict[str, int]:
    """The config of SE layers of these widths: one ratio for all, rounded to 1 or to 8.

    Raises:
        CheckpointError: If there is none; the caller names the file.
    """
    candidates = (dict(ratio=r, divisor=d) for d in (1, 8) for r in _RATIOS)
    fitting = next((cfg for cfg in candidates if is_se_cfg(cfg, layers)), None)
    if fitting is None:
        raise CheckpointError('its SE layers have no common squeeze ratio')
    return fitting
