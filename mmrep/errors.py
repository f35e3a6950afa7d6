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


def reason(error: BaseException) -> str:
    """The type of an error and the beginning of its message, on one line."""
    try:
        message = str(error)
    except Exception:
        # An error of a config's own may fail even at this.
        message = ''
    line = message.strip().partition('\n')[0]
    # A word may be longer than all that is kept.
    if ' ' in line:
        line = textwrap.shorten(line, 200, placeholder=' ...')
    line = printable(line, 200)
    return f'{type(error).__name__}: {line}' if line else type(error).__name__


def printable(value: object, width: int | None = None) -> str:
    """What comes from a file or a user, as a part of a sentence: text on one line.

    It is cut to ``width``, and line breaks and what else does not print, as the control
    sequences of a terminal, are written as Python writes them in strings.
    """
    text = str(value)
    if width is not None and len(text) > width:
        text = f'{text[: width - 4]} ...'
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
