"""Settings of the site that ``make docs`` builds."""

import re
import runpy
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = 'mmrep'
author = 'The mmrep authors'
copyright = author
release = runpy.run_path(str(ROOT / 'mmrep' / 'version.py'))['__version__']

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']

html_theme = 'furo'
html_title = f'mmrep {release}'

myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
# The notebooks are kept with their outputs; tests execute them.
nb_execution_mode = 'off'

# Names of other projects, whose pages a build without a network does not have.
nitpick_ignore_regex = [
    (r'py:.*', r'(torch|nn|mmengine|collections|numpy|onnx|pathlib)\..*'),
    (r'py:.*', 'Tensor|ModelProto|optional'),
    (r'py:class', r'mmrep\..*\._\w+|.*\.UnitOwner'),
]

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Connect the change of links below."""
    app.connect('source-read', name_files)


def name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Name the folders and pages outside ``docs`` that a page links to: they are no pages."""
    text = re.sub(
        r'\[([^\]]+)\]\((?:\.\./)+([\w/.-]*?)(/|\.md)?(#[\w-]+)?\)',
        lambda link: link[0] if link[2].endswith('.py') else _named(link),
        source[0],
    )
    source[0] = text


def _named(link: re.Match) -> str:
    text, path = link[1], link[2] + (link[3] or '')
    return f'`{path}`' if text in path else f'{text} (`{path}`)'
