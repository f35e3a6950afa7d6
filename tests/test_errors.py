import pytest

from mmrep.errors import reason


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
