"""Which code is edited, and which is not."""

import pytest
from mutants import mutants

#: Code, and what one edit makes of it.
EDITS = {
    'x = a + b': {'a', 'b', 'a - b'},
    'x = a // b': {'a', 'b', 'a * b', 'b // a'},
    'x = -a': {'a'},
    'x = not a': {'a'},
    'x = a and b': {'a', 'b', 'a or b'},
    'x = a < b': {'a <= b', 'a >= b'},
    'x = a is None': {'a is not None'},
    'x = a if b else c': {'a', 'c', 'True', 'False'},
    'x = 1': {'2', '0'},
    'x = 3.0': {'4.0'},
    'x = True': {'False'},
    "x = 'zeros'": {"'zeros?'"},
    'x = a, b, c': {'(b, a, c)', '(a, c, b)'},
    "x = 'a', 'b'": {"('a',)", "('b',)", "'a?'", "'b?'"},
    'x = A, b.C': {'(A,)', '(b.C,)'},
    'x = {a, b}': {'{a}', '{b}'},
    'x = a in (b, c)': {'a not in (b, c)', '(b,)', '(c,)'},
    'x = f(a, b, c=d)': {'a', 'f(a, c=d)', 'f(b, a, c=d)', 'f(a, b)'},
    'x = f(A, B)': {'A', 'f(A)', 'f(B)'},
    'x = a.f(b)': {'a'},
    'x = min(a, b)': {'max'},
    'x = {a: b, c: d}': {'{a: b}', '{c: d}'},
    'x = [a for a in b if c]': {'[a for a in b]'},
    'x += a[b:c]': {'pass', ':c', 'b:'},
    'x = weight1': {'weight2'},
    'f()': {'pass'},
    'x += a': {'pass'},
    'a.x = b': {'pass'},
    'x = x + a': {'pass', 'x', 'a', 'x - a'},
    'raise ValueError(1 + 1)': {'pass'},
    'import a': set(),
    "__all__ = ['a']": set(),
    'x: tuple[int, int] = a': set(),
    'Alias = dict[str, int]': set(),
    'zip(a, b, strict=True)': {
        'pass',
        'a',
        'zip(a, strict=True)',
        'zip(b, a, strict=True)',
    },
    "def f():\n    'Docstring.'": set(),
    'def f(a):\n    return a': {'return'},
    'def f():\n    return None': set(),
    '@d\ndef f():\n    pass': {''},
    'if a:\n    b': {'True', 'False'},
    'for a in b:\n    c': {'pass'},
    'with a:\n    b': {'if True:'},
    'try:\n    a\nexcept E:\n    b': {'raise'},
    'try:\n    a\nexcept E:\n    raise': {'pass'},
    'try:\n    a\nfinally:\n    b': {'pass'},
}


@pytest.mark.parametrize('source', EDITS)
def test_edits(source):
    found = list(mutants(source, 'module'))
    assert {mutant.after for mutant in found} == EDITS[source]
    assert len({mutant.name for mutant in found}) == len(found)


#: A function in which every line and every term matters for one of the inputs.
SOURCE = """
def f(a, b, *, scale=1):
    total = (a - b) * scale
    if a > 2 and b != 3:
        total += 10
    return total, [n for n in (a, b) if n % 2], max(a, b)
"""
INPUTS = [(5, 1), (2, 1), (3, 1), (5, 3), (4, 6), (5, 7)]


def outcome(code) -> str:
    """The results of a module's function for the inputs, or its error."""
    try:
        exec(code, names := {})
        return str([names['f'](*pair) for pair in INPUTS] + [names['f'](5, 1, scale=2)])
    except Exception as error:
        return repr(error)


def test_every_mutant_is_another_function():
    expected = outcome(SOURCE)
    found = list(mutants(SOURCE, 'module'))
    same = [mutant.name for mutant in found if outcome(mutant.code) == expected]
    assert len(found) > 30
    assert same == []
