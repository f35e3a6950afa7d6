import math
import tempfile
from typing import Any

import pytest
from mmengine.config import Config

from mmrep.deployment.config_text import written_config
from mmrep.errors import ConfigError

INF, NAN = math.inf, math.nan


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    'entries',
    [
        dict(foo=INF),
        dict(foo=-INF, bar=[INF, (1, -INF)], baz=dict(a=[dict(b=dict(c=INF))])),
        {'foo': {'a b': INF, 'c': {INF}}},
        dict(custom_hooks=[dict(type='EarlyStoppingHook', greater_keys=INF)]),
        dict(foo=1e308, bar='inf', baz=[1.5, None, True, (), [], {}]),
    ],
    ids=str,
)
def test_it_reads_back(entries):
    text, read = written_config(Config(entries))
    assert read.to_dict() == entries
    assert Config.fromstring(text, '.py').to_dict() == entries


def test_nan_reads_back():
    entries = dict(model=dict(norm_cfg=dict(eps=NAN), sizes=[1, (NAN,)]))
    text, read = written_config(Config(entries))
    for cfg in (read, Config.fromstring(text, '.py')):
        assert math.isnan(cfg.model.norm_cfg.eps)
        assert math.isnan(cfg.model.sizes[1][0])


def test_what_is_finite_is_written_by_mmengine():
    cfg = Config(dict(a=dict(b=[1.5, 'x'], c=None), d=(1e-5,)))
    assert written_config(cfg)[0] == cfg.pretty_text


def test_what_is_large_is_written_without_yapf(format_by):
    """It would take minutes."""
    format_by(None)
    entries = dict(
        a=1,
        names={f'n{i}': i for i in range(9_000)},
        boxes=[dict(type='A', at=(i, INF)) for i in range(300)],
    )
    text, read = written_config(Config(entries))
    assert read.to_dict() == entries
    assert text.endswith('\n')
    # In the same bytes, in whatever order the entries come.
    entries = {name: entries[name] for name in reversed(entries)}
    assert written_config(Config(entries))[0] == text


@pytest.mark.parametrize(
    ('entries', 'says'),
    [
        (dict(foo=print), 'SyntaxError'),
        (dict(foo=object()), 'SyntaxError'),
        (dict(foo={'for': 1}), 'SyntaxError'),
        (dict(foo=nested(300)), 'Error'),
        (dict(foo=1 + INF * 1j), 'NameError'),
        (dict(_base_='abc'), 'abc'),
        (dict(custom_imports=5), 'TypeError'),
    ],
    # Without an address, which another process has elsewhere.
    ids=lambda value: str(value).partition(' at 0x')[0][:40],
)
def test_what_cannot_be_written(entries: dict[str, Any], says, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with pytest.raises(ConfigError, match=rf'cannot be written as text \(.*{says}') as info:
        written_config(Config(entries))
    assert '\n' not in str(info.value)
    assert not list(tmp_path.iterdir())
