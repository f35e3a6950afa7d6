"""Settings of the site that ``make docs`` builds."""

import re
import runpy
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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
html_math_renderer = 'mathml'
html_static_path = ['_static']
html_css_files = ['math.css']
html_title = f'mmrep {release}'

myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
# The notebooks are kept with their outputs; tests execute them.
nb_execution_mode = 'off'

# Names of other projects, whose pages a build without a network does not have.
nitpick_ignore_regex = [
    (r'py:.*', r'(torch|nn|mmengine|collections|numpy|np|onnx|pathlib)\..*'),
    (r'py:.*', 'Tensor|ModelProto|optional'),
    (r'py:class', r'mmrep\..*\._\w+|.*\.UnitOwner'),
]

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_default_options = {'members': True}
napoleon_numpy_docstring = False


def setup(app: Sphinx) -> None:
    """Connect the functions below."""
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_math_block, None))
    app.connect('source-read', name_files)
    app.connect('autodoc-skip-member', skip_fields)


def visit_math(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers render without a script or a network."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that is a paragraph of its own."""
    writer.body.append(convert(node.astext(), display='block'))
    raise nodes.SkipNode


def skip_fields(
    app: Sphinx, kind: str, name: str, member: object, *_: object
) -> bool | None:
    """Skip the fields of named tuples, which the docstrings of the tuples describe."""
    return True if (member.__doc__ or '').startswith('Alias for field number') else None


def name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace links to files outside ``docs``, which are not on the site, by names."""
    if page.startswith('tutorials/'):
        # For these pages '..' is docs itself.
        return
    source[0] = re.sub(
        r'\[([^\]]+)\]\((?:\.\./)+([\w/.-]*?)(/|\.md)?(#[\w-]+)?\)',
        lambda link: link[0] if link[2].endswith('.py') else _named(link),
        source[0],
    )


def _named(link: re.Match) -> str:
    text, path = link[1], link[2] + (link[3] or '')
    return f'`{path}`' if text in path else f'{text} (`{path}`)'
