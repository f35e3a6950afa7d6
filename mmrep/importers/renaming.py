"""Rename the keys of a state dict by a table, and account for every one of them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmrep.checkpoints import listed
from mmrep.errors import CheckpointError

#: Regular expressions of whole keys, and the new keys, with ``\1`` for their groups.
Rules = Mapping[str, str]


class Renamed(NamedTuple):
    """What :func:`rename` made of a state dict.

    Args:
        state: The weights under their new keys.
        origin: The source's key of every new one.
        left_out: What was left out on purpose: how many keys, by what they are.
    """

    state: dict[str, Tensor]
    origin: dict[str, str]
    left_out: dict[str, int]


def under(places: Rules, parts: Rules, separator: str = r'\.') -> dict[str, str]:
    """The rules for every part in every place; parts have no groups."""
    return {
        f'{place}{separator}{part}': f'{new_place}.{new_part}'
        for place, new_place in places.items()
        for part, new_part in parts.items()
    }


def every_leaf(modules: Rules) -> dict[str, str]:
    """Rules for modules as rules for their parameters and buffers."""
    return {
        rf'{module}\.(?P<leaf>\w+)': rf'{new}.\g<leaf>' for module, new in modules.items()
    }


def rename(
    weights: Mapping[str, Tensor],
    rules: Rules,
    left_out: Mapping[str, str],
    source: str,
) -> Renamed:
    """Give every key the name that the first rule for it says.

    Args:
        weights: The source's weights.
        rules: The layout's rules.
        left_out: Regular expressions of keys that belong to no model, and what they are.
        source: The file and the layout, for the error.

    Raises:
        CheckpointError: If there is no rule for a key, or two keys get one name.
    """
    renamed = Renamed({}, {}, {})
    table = [(re.compile(pattern), new) for pattern, new in rules.items()]
    unknown = []
    for key, value in weights.items():
        kind = next((k for p, k in left_out.items() if re.fullmatch(p, key)), None)
        if kind is not None:
            renamed.left_out[kind] = renamed.left_out.get(kind, 0) + 1
            continue
        matches = ((pattern.fullmatch(key), new) for pattern, new in table)
        target = next((match.expand(new) for match, new in matches if match), None)
        if target is None:
            unknown.append(key)
            continue
        if target in renamed.state:
            raise CheckpointError(
                f'{source} holds {renamed.origin[target]} and {key}, which are one and '
                'the same: take one of them out'
            )
        renamed.state[target] = value
        renamed.origin[target] = key
    if unknown:
        raise CheckpointError(
            f'{source} holds keys that this layout does not have ({listed(unknown)}): take '
            'them out, or name another layout with --from'
        )
    return renamed


def missing_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The counters of batch norms that older weights lack; they matter to no output."""
    counters = (
        key.removesuffix('running_mean') + 'num_batches_tracked'
        for key in state
        if key.endswith('.running_mean')
    )
    return {key: torch.tensor(0) for key in counters if key not in state}
