from pathlib import Path

import pytest

from mmrep.errors import ConfigError, printable, reason


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ValueError('too large'), 'ValueError: too large'),
        (KeyError(), 'KeyError'),
        (RuntimeError('\n first  line\nsecond line'), 'RuntimeError: first line'),
        (RuntimeError('word ' * 100), f'RuntimeError: {"word " * 39}...'),
    ],
    ids=str,
)
def test_reason(error, text):
    assert reason(error) == text


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('a b/ä[red].py', 'a b/ä[red].py'),
        ('a\nimport os\r\n', r'a\nimport os\r\n'),
        ('\x1b[2Ja\udcff\x85\u2028', r'\x1b[2Ja\udcff\x85\u2028'),
        (Path('a\tb'), r'a\tb'),
    ],
    ids=ascii,
)
def test_printable(name, text):
    assert printable(name) == text
    assert str(ConfigError(f'{name} is missing')) == f'{text} is missing'
