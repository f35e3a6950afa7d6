"""The errors that say why a file is not read."""

_LONGEST = 300


class Refusal(Exception):
    """What is wrong with a file and what to do; the caller puts its name in front."""

    def __init__(self, problem: str, remedy: str) -> None:
        # Parts of the text may come from the file.
        shown = ''.join(c if c.isprintable() else '?' for c in problem[:_LONGEST])
        super().__init__(f'{shown}{"..." if problem[_LONGEST:] else ""}: {remedy}')


def damaged(what: str) -> Refusal:
    """The file was damaged, or is not a checkpoint."""
    return Refusal(
        f'cannot be read as a checkpoint ({what})',
        'it may be cut short or not a checkpoint, so copy or download it again',
    )


def unsafe(what: str) -> Refusal:
    """The file names, calls or changes something that no checkpoint needs."""
    return Refusal(
        f'holds {what}, which could run code when loaded',
        'save the checkpoint without it',
    )


def excessive(what: str) -> Refusal:
    """The file asks for more work or memory than its size can justify."""
    return Refusal(
        f'holds {what}, which no training writes',
        'save the checkpoint without it',
    )


def unsupported(kind: str, where: str, remedy: str) -> Refusal:
    """The file holds a kind of value that this reader does not support."""
    return Refusal(f'holds {kind}{where}', remedy)
