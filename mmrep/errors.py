"""The error that a user can mend."""

import textwrap


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that says how."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that is not the model's."""


class ConfigError(UserError):
    """A config that cannot be used."""


def reason(error: Exception) -> str:
    """The type of an error and the beginning of its message, on one line."""
    line = textwrap.shorten(str(error).strip().partition('\n')[0], 200, placeholder=' ...')
    return f'{type(error).__name__}: {line}' if line else type(error).__name__
