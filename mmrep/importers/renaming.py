"""Rules that rename keys."""

from collections.abc import Mapping

#: Regular expressions of whole keys, and the new keys, with ``\1`` for their groups.
Rules = Mapping[str, str]


def under(places: Rules, parts: Rules, separator: str = r'\.') -> dict[str, str]:
    """Combine every place with every part; groups in parts must have names."""
    return {
        f'{place}{separator}{part}': f'{new_place}.{new_part}'
        for place, new_place in places.items()
        for part, new_part in parts.items()
    }


def every_leaf(modules: Rules) -> dict[str, str]:
    """Expand rules for modules to rules for their parameters and buffers."""
    return {
        rf'{module}\.(?P<leaf>\w+)': rf'{new}.\g<leaf>' for module, new in modules.items()
    }
