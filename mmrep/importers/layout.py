"""The class of layouts, which describe how a project names its weights."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from mmrep.checkpoints import listed
from mmrep.errors import CheckpointError, reason

from .renaming import Rules

#: Limit on the number of keys: three times those of the largest network, an
#: ACNet-ResNet-152. A block has a dozen, and takes some milliseconds to build.
_MOST_KEYS = 5000

#: ``family(state, layout, arch)``: the backbone's config, from its renamed weights and the
#: name of its architecture, or ``None`` to find it from the shapes.
Family = Callable[[Mapping[str, Tensor], 'Layout', str | None], dict]


class Renamed(NamedTuple):
    """The result of :meth:`Layout.rename`.

    Args:
        state: The weights under their new keys.
        origin: The source's key of every new key.
        left_out: The number of keys that were left out on purpose, by what they are.
    """

    state: dict[str, Tensor]
    origin: dict[str, str]
    left_out: Counter[str]


@dataclass(frozen=True)
class Layout:
    """How a project names its weights.

    Args:
        name: What ``--from`` calls it.
        mark: Regular expression that identifies the layout: in every such file it is found
            in some key followed by its shape, as in ``'stem.conv.weight 64 3 3 3'``.
        rules: New names of all keys, with the prefix ``backbone.`` or ``head.``.
        family: Function that reads the architecture.
        foreign_mark: As ``mark``; files that match both belong to another layout.
            Default: none.
        prepare: Function that changes names or shapes of the weights before they are
            renamed, for what rules on keys cannot do. Default: nothing.
        deploy_mark: As ``mark``, of files in deploy form. Default: ``'reparam'``.
        deploy_rules: Rules that replace some of ``rules`` in deploy form. Default: none.
        options: Arguments of every backbone of this layout. Default: none.
        arch_options: Settings of every architecture of this layout that cannot be read from
            its weights. Default: none.
        left_out: Regular expressions of keys that belong to no model, and what they are.
            Default: none.
        deploy_note: What users must know about the deploy form. Default: nothing.
    """

    name: str
    mark: str
    rules: Rules
    family: Family
    foreign_mark: str | None = None
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    deploy_mark: str = 'reparam'
    deploy_rules: Rules = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    arch_options: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    deploy_note: str = ''

    def knows(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether weights have this layout."""
        is_foreign = self.foreign_mark is not None and _has(weights, self.foreign_mark)
        return _has(weights, self.mark) and not is_foreign

    def rename(self, weights: Mapping[str, Tensor], source: str) -> Renamed:
        """Rename every key by the first rule that matches it.

        Args:
            weights: The source's weights.
            source: The file, for the error.

        Raises:
            CheckpointError: If no rule matches a key, two keys get the same name, weights
                do not belong together, or there are many more than any network has.
        """
        source = f'{source}, read as {self.name},'
        if len(weights) > _MOST_KEYS:
            raise CheckpointError(
                f'{source} holds {len(weights)} weights, and no network of that layout has '
                f'more than {_MOST_KEYS}: give the checkpoint of a model'
            )
        is_deploy = _has(weights, self.deploy_mark)
        rules = {**self.rules, **(self.deploy_rules if is_deploy else {})}
        state, origin, left_out = renamed = Renamed({}, {}, Counter())
        unknown = []
        try:
            prepared = self.prepare(weights)
        except Exception as error:
            # The shapes may be arbitrary.
            raise CheckpointError(
                f'{source} holds weights that do not belong together ({reason(error)}): '
                'give a whole and unchanged checkpoint'
            ) from error
        for key, value in prepared.items():
            kind = _first(self.left_out, key)
            target = _first(rules, key)
            if kind is not None:
                left_out[kind] += 1
            elif target is None:
                unknown.append(key)
            elif target in state:
                raise CheckpointError(
                    f'{source} holds {origin[target]} and {key}, which are the same '
                    'weight: remove one of them'
                )
            else:
                state[target], origin[target] = value, key
        if unknown:
            raise CheckpointError(
                f'{source} holds keys that this layout does not have ({listed(unknown)}): '
                'remove them, or name another layout with --from'
            )
        return renamed


def _has(weights: Mapping[str, Tensor], mark: str) -> bool:
    """Whether an expression is found in a key followed by its shape."""
    lines = (' '.join(map(str, (key, *w.shape))) for key, w in weights.items())
    return any(re.search(mark, line) for line in lines)


def _first(rules: Rules, key: str) -> str | None:
    """The new name of a key by the first rule that matches it; ``None`` if none does."""
    matches = ((re.fullmatch(pattern, key), new) for pattern, new in rules.items())
    return next((match.expand(new) for match, new in matches if match), None)
