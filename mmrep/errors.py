"""Errors that a user can mend, and text to print in them."""

import textwrap


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that says how."""

    def __str__(self) -> str:
        # Names of files may hold anything, new lines included.
        return printable(super().__str__())


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class ConfigError(UserError):
    """A config that cannot be used."""


def reason(error: BaseException) -> str:
    """The type of an error and the beginning of its message, on one line."""
    try:
        message = str(error)
    except Exception:
        # The exception class of a config may fail even in str().
        message = ''
    line = message.strip().partition('\n')[0]
    # Not for a single word, of which textwrap would keep nothing.
    if ' ' in line:
        line = textwrap.shorten(line, 200, placeholder=' ...')
    line = printable(line, 200)
    return f'{type(error).__name__}: {line}' if line else type(error).__name__


def printable(value: object, width: int | None = None) -> str:
    """Text from a file or a user, made fit to be printed within a line.

    Line breaks and other characters that do not print, as the control sequences of a
    terminal, become the escapes of Python strings.

    Args:
        value: The value, whose ``str`` is taken.
        width: Number of characters that it is cut to. Default: None, not cut.
    """
    text = str(value)
    if width is not None and len(text) > width:
        text = f'{text[: width - 4]} ...'
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
