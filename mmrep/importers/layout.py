"""What a layout is."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .renaming import Rules

#: ``family(state, layout, arch)``: the backbone's config, from its renamed weights and the
#: name of its architecture, or ``None`` for the one that the shapes tell.
Family = Callable[[Mapping[str, Tensor], 'Layout', str | None], dict]


@dataclass(frozen=True)
class Layout:
    """How a project names its weights.

    Args:
        name: What ``--from`` calls it.
        mark: Regular expression that some key of every such file matches, and no key of
            another layout's.
        rules: New names of all keys, with ``backbone.`` and ``head.`` before them.
        family: What reads the architecture.
        deploy_rules: Rules in the place of some of these in deploy form. Default: none.
        options: Arguments of every backbone of this layout. Default: none.
        arch_options: What every architecture of this layout has that its weights do not
            tell. Default: none.
        left_out: Regular expressions of keys that belong to no model, and what they are.
            Default: none.
        deploy_note: What users must know of the deploy form. Default: nothing.
    """

    name: str
    mark: str
    rules: Rules
    family: Family
    deploy_rules: Rules = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    arch_options: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    deploy_note: str = ''

    def knows(self, keys: Iterable[str]) -> bool:
        """Whether keys are of this layout."""
        return any(re.search(self.mark, key) for key in keys)

    def rules_for(self, keys: Iterable[str]) -> Rules:
        """The rules for the form that the keys are in."""
        is_deploy = any('reparam' in key for key in keys)
        return {**self.rules, **(self.deploy_rules if is_deploy else {})}
