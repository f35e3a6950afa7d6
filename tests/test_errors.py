from pathlib import Path

import pytest

from mmrep.errors import ConfigError, printable, reason


class MuteError(Exception):
    def __str__(self) -> str:
        raise self


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ValueError('too large'), 'ValueError: too large'),
        (KeyError(), 'KeyError'),
        (RuntimeError('\n first  line\nsecond line'), 'RuntimeError: first line'),
        (RuntimeError('word ' * 100), f'RuntimeError: {"word " * 39}...'),
        (RuntimeError('9' * 5000), f'RuntimeError: {"9" * 196} ...'),
        (RuntimeError('\x1b[2J\xff'), r'RuntimeError: \x1b[2Jÿ'),
        (SystemExit(0), 'SystemExit: 0'),
    ],
    ids=repr,
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


@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('stage1.0', 'stage1.0'),
        ('größer', 'größer'),
        ('a\nb\t', r'a\nb\t'),
        ('\udcff\u202e', r'\udcff\u202e'),
        ('a' * 10, 'a' * 10),
        ('a' * 11, 'a' * 6 + ' ...'),
    ],
)
def test_printable_of_a_width(text, part):
    assert printable(text, 10) == part


def test_reason_of_an_error_without_words():
    assert reason(MuteError()) == 'MuteError'
