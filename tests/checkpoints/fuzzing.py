"""Fuzz the readers: valid files with random damage, and random pickles.

Whatever a file holds, reading it must end soon, in bounded memory, with its contents or
with one sentence. Each case depends on the seed and its number alone, so that it can be
made again: ``make_case(seed, number, folder)``.
"""

import io
import os
import pickle
import random
import resource
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from pickles import write_pickle
from safetensors.torch import save as save_safetensors

from mmrep.checkpoints import kept_meta, plain, read_checkpoint, state_dict_of
from mmrep.errors import CheckpointError
from mmrep.importers.keras import read_keras

#: For one case: seconds, and bytes more than the process has.
SECONDS, MEMORY = 5, 1 << 30

#: A child process ends after so many cases, and a new one goes on.
_BATCH = 500


class Case(NamedTuple):
    """A file to read.

    Args:
        path: The file.
        kind: How it was made.
        read: What reads it.
        is_whole: Whether only the undamaged contents may be read from it.
    """

    path: Path
    kind: str
    read: Callable[[Path], Any]
    is_whole: bool


@dataclass
class FuzzReport:
    """What was tried.

    Args:
        tried: How many files, by how they were made.
        refused: How many of them were refused.
        failures: What went wrong, with the seed and number of the case.
    """

    tried: Counter = field(default_factory=Counter)
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def checkpoint() -> dict:
    """What is damaged: small, with everything in it that training writes."""
    state = {
        'a.weight': torch.arange(24.0).reshape(4, 6),
        'a.bias': torch.ones(4),
        'n': torch.tensor(3),
    }
    return {
        'state_dict': state,
        'meta': {'CLASSES': ('cat', 'dog'), 'epoch': 3, 'seed': np.arange(3)},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0, 2.0], [1, 1])}},
        'optimizer': {'state': {0: {'step': 1}}, 'param_groups': [{'lr': 0.1}]},
    }


def _torch_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _keras_file() -> bytes:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, 'w') as file:
        for i in range(3):
            file[f'layers/dense_{i}/vars/0'] = np.ones((4, 5), 'f4')
        file.create_dataset('z', data=np.zeros((9, 9)), chunks=(3, 3), compression='gzip')
    return buffer.getvalue()


def _pickle_of(data: bytes) -> bytes:
    archive = torch._C.PyTorchFileReader(io.BytesIO(data))
    return archive.get_record('data.pkl')


FILES = {
    'zip': _torch_file(False),
    'legacy': _torch_file(True),
    'safetensors': save_safetensors(checkpoint()['state_dict'], {'meta': '{"epoch": 3}'}),
    'keras': _keras_file(),
}
PICKLE = _pickle_of(FILES['zip'])

#: Numbers at the edges of the fields that hold them.
NUMBERS = (0, 1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)

NAMES = (
    *('builtins list', 'builtins set', 'builtins range', 'builtins bytearray'),
    *('builtins getattr', 'builtins slice', 'builtins complex', '_codecs encode'),
    *('collections OrderedDict', 'collections defaultdict', 'collections deque'),
    *('collections Counter', 'datetime datetime', 'datetime timedelta'),
    *('numpy dtype', 'numpy ndarray', 'numpy._core.multiarray scalar'),
    *('numpy._core.multiarray _reconstruct', 'torch FloatStorage', 'torch Size'),
    *('torch float8_e5m2', 'torch device', 'torch._utils _rebuild_tensor_v2'),
    *('torch._utils _rebuild_tensor_v3', 'torch._utils _rebuild_parameter'),
    *('torch._utils _rebuild_qtensor', 'torch.storage UntypedStorage', 'posix system'),
    'mmengine.logging.history_buffer HistoryBuffer',
)

#: Opcodes without an argument.
PLAIN = b'().0123]}NQRabdelo)stu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94'.replace(
    b'.', b''
)


#: Three values to come back to.
START = (
    b'\x80\x02]q\x000)q\x010cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81q\x020'
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Change bytes, or cut, repeat or move a part of a file."""
    data = bytearray(data)
    # Most of some files is padding.
    places = [at for at, byte in enumerate(data) if byte not in (0, ord('Z'))]
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = min(rng.choice(places) + rng.choice((0, 0, 1)), len(data) - 1)
        size = rng.choice((1, 2, 4, 8, 30, 200))
        match rng.randrange(8):
            case 0 | 1 | 2:
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                data[at] = rng.randrange(256)
            case 4:
                number = rng.choice(NUMBERS)
                raw = struct.pack('<Q', number)[: rng.choice((1, 2, 4, 8))]
                data[at : at + len(raw)] = raw
            case 5:
                del data[at : at + size]
            case 6:
                data[at:at] = data[at : at + size]
            case 7:
                del data[rng.choice((at, len(data) - size)) :]
        if not data:
            break
        places = [place for place in places if place < len(data)] or [0]
    return bytes(data)


def random_pickle(rng: random.Random) -> bytes:
    """Opcodes that mean something here, with arguments that do."""
    parts = [pickle.PROTO, bytes([rng.choice((2, 2, 4))])]
    for _ in range(rng.choice((5, 20, 60, 300))):
        match rng.randrange(7):
            case 0:
                parts.append(b'c' + rng.choice(NAMES).replace(' ', '\n').encode() + b'\n')
            case 1:
                number = rng.choice((-1, 1)) * rng.choice(NUMBERS)
                parts.append(pickle.dumps(number, 2)[2:-1])
            case 2:
                text = rng.choice(('a', 'storage', '0', 'cpu', 'latin1', '<f8', 'mean'))
                parts.append(pickle.BINUNICODE + struct.pack('<L', len(text)))
                parts.append(text.encode())
            case 3:
                parts.append(rng.choice((b'q', b'h', b'h')) + bytes([rng.randrange(4)]))
            case 4:
                start = rng.randrange(2, len(PICKLE))
                parts.append(PICKLE[start : start + rng.randrange(40)])
            case _:
                parts.append(bytes([rng.choice(PLAIN)]))
    return b''.join([*parts, pickle.STOP])


def random_value(rng: random.Random, depth: int = 0) -> bytes:
    """The opcodes of a value, perhaps made by a call or changed by a state."""
    choice = rng.randrange(4 if depth > 4 else 12)
    if choice == 0:
        return pickle.dumps(rng.choice((-1, 1)) * rng.choice(NUMBERS), 2)[2:-1]
    if choice == 1:
        return pickle.dumps(rng.choice((None, True, 0.5, 'latin1', '<f8', 'mean')), 2)[2:-1]
    if choice == 2:
        return b'c' + rng.choice(NAMES).replace(' ', '\n').encode() + b'\n'
    if choice == 3:
        return rng.choice((b')', b']', b'}', b'h\x00', b'h\x01', b'h\x02'))
    values = [random_value(rng, depth + 1) for _ in range(rng.choice((1, 2, 2, 3, 7)))]
    inner = b''.join(values)
    made = (
        *(b'(' + inner + b't', b']' + b'(' + inner + b'e', b'(' + inner + b'l'),
        b'}' + b''.join(random_value(rng, 5) + value + b's' for value in values),
        *(values[0] + b'(' + inner + b'tR', values[0] + b'(' + inner + b'tb'),
        *(values[0] + b'2\x86', inner + rng.choice((b'q\x00', b'q\x01', b'q\x02'))),
    )
    return made[choice - 4]


def make_case(seed: int, number: int, folder: Path) -> Case:
    """The file of a number."""
    rng = random.Random(f'{seed}-{number}')
    kinds = (*FILES, 'zip', 'damaged pickle', 'random pickle', 'random pickle')
    kind = kinds[number % len(kinds)]
    path = folder / ('a.safetensors' if kind == 'safetensors' else 'a.pth')
    if kind == 'damaged pickle':
        write_pickle(path, damage(PICKLE, rng), legacy=False)
    elif kind == 'random pickle':
        data = rng.choice((random_pickle, lambda rng: START + random_value(rng) + b'.'))(
            rng
        )
        write_pickle(path, data, legacy=rng.random() < 0.3)
    else:
        path.write_bytes(damage(FILES[kind], rng))
    return Case(path, kind, read_keras if kind == 'keras' else read_fully, kind == 'zip')


def read_fully(path: Path) -> Any:
    """Read a file, and do with it what the tools do."""
    contents = read_checkpoint(path)
    plain(kept_meta(contents))
    plain(contents)
    # It may be none, which is said when it is asked for.
    with suppress(CheckpointError):
        state_dict_of(contents, path)
    return contents


def outcome(case: Case) -> str:
    """``'refused'``, ``'read'`` or what went wrong."""
    try:
        contents = case.read(case.path)
    except CheckpointError as error:
        message = str(error)
        wrong = '\n' in message or len(message) > 1000
        return f'a message of {len(message)} characters' if wrong else 'refused'
    except BaseException as error:
        return f'{type(error).__name__}: {error}'[:300].replace('\n', ' ')
    if case.is_whole and plain_of(contents) != WHOLE:
        return 'it was read as something else'
    return 'read'


def plain_of(contents: Any) -> Any:
    """Contents that can be compared."""
    if isinstance(contents, torch.Tensor):
        return str(contents.dtype), contents.tolist()
    if isinstance(contents, HistoryBuffer):
        return [part.tolist() for part in contents.data]
    if isinstance(contents, dict):
        return {key: plain_of(value) for key, value in contents.items()}
    if isinstance(contents, list | tuple):
        return [type(contents).__name__, *map(plain_of, contents)]
    return plain(contents)


WHOLE = plain_of(checkpoint())


def _run(seed: int, numbers: range, out: int, folder: Path) -> None:
    """Try cases, one line each; a case that does not end ends the process."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in numbers:
        case = make_case(seed, number, folder)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        line = outcome(case)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, f'{case.kind}\t{line}\n'.encode(errors='replace'))
        case.path.unlink()


def fuzz(seconds: float, seed: int) -> FuzzReport:
    """Try random files for some time.

    Args:
        seconds: How long.
        seed: Of what is random.

    Returns:
        What was tried. Nothing is wrong if it has no ``failures``.
    """
    report, number, end = FuzzReport(), 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            done = _batch(seed, number, end, Path(folder), report)
            number += done
    return report


def _batch(seed: int, first: int, end: float, folder: Path, report: FuzzReport) -> int:
    """Try some cases in a process of their own; returns how many."""
    out_of_child, out = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _run(seed, range(first, first + _BATCH), out, folder)
            status = 0
        finally:
            os._exit(status)
    os.close(out)
    done = 0
    with open(out_of_child) as lines:
        for line in lines:
            kind, _, result = line.rstrip('\n').partition('\t')
            report.tried[kind] += 1
            report.refused += result == 'refused'
            if result not in ('refused', 'read'):
                report.failures.append(f'seed {seed}, case {first + done}: {result}')
            done += 1
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    if status and not time.monotonic() > end:
        reason = f'signal {os.WTERMSIG(status)}' if os.WIFSIGNALED(status) else status
        report.failures.append(f'seed {seed}, case {first + done}: ended by {reason}')
        done += 1
    return done
