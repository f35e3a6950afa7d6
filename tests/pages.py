"""Run the code in a page of the documentation as its reader would."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from processes import run_python

ROOT = Path(__file__).resolve().parents[1]

#: Commands that set a machine up, which the tests leave out.
_SETS_UP = ('apt', 'git', 'make', 'mim', 'pip', 'source')


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """The fenced blocks in order: the language and the text of each."""
    for match in re.finditer(r'^```(\w+)\n(.*?)^```$', page.read_text(), re.M | re.S):
        yield match[1], match[2]


def run_page(page: Path, folder: Path, **names: str) -> str:
    """Run what is in a page, in order, in a folder that stands for a clone.

    Python code that starts with a file's name in a comment is written into that file. All
    other Python code up to the next commands is run as one script. Of the commands, only
    those that start Python are run.

    Args:
        page: The page.
        folder: An empty folder.
        **names: The values of the page's placeholders, such as ``CONFIG``.

    Returns:
        What was printed.
    """
    for name in ('configs', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    printed, script = [], ''

    def run(*arguments: str) -> None:
        ran = run_python(*arguments, cwd=folder, PYTHONPATH=str(folder))
        assert ran.returncode == 0, f'{arguments}\n{ran.stderr}'
        printed.append(ran.stdout)

    for language, text in [*fences(page), ('bash', '')]:
        if language == 'python' and (file := re.match(r'# (\S+\.py)\n', text)):
            (folder / file[1]).write_text(text)
        elif language == 'python':
            script += text
        elif language == 'bash':
            if script:
                run('-c', script)
                script = ''
            for line in text.replace('\\\n', ' ').splitlines():
                words = [names.get(word, word) for word in shlex.split(line, comments=True)]
                if not words or words[0] in _SETS_UP:
                    continue
                assert words[0] == 'python', line
                run(*words[1:])
    return '\n'.join(printed)
