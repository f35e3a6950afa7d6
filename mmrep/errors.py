"""The error that a user can mend."""

import textwrap


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that says how."""

    def __str__(self) -> str:
        # Names of files may hold anything, new lines included.
        return printable(super().__str__())


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that is not the model's."""


class ConfigError(UserError):
    """A config that cannot be used."""


def printable(value: object) -> str:
    """A value as text of one line: line breaks, control characters, stray bytes escaped."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def reason(error: Exception) -> str:
    """The type of an error and the beginning of its message, on one line."""
    line = textwrap.shorten(str(error).strip().partition('\n')[0], 200, placeholder=' ...')
    return f'{type(error).__name__}: {line}' if line else type(error).__name__
