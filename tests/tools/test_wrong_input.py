"""What a tired user or a hostile one gives the tools: one sentence each, and no file."""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS, MODELS
from mmengine.visualization import Visualizer
from tiny_projects import REPVGG
from tool_runs import Project, tool, variant
from torch import Tensor, nn

from mmrep.deployment import read_config
from mmrep.errors import ConfigError
from mmrep.models.backbones import RepVGG

pytest.importorskip('mmpretrain')

#: Longer than Python reads a number, and more than a terminal shows.
MANY = '9' * 5000


#: A config that is interrupted while it is read. (Names of modules are mmengine's here.)
#: What runs in the background of a shell takes no notice otherwise.
CTRL_C = """
__import__('signal').signal(2, __import__('signal').default_int_handler)
__import__('os').kill(__import__('os').getpid(), 2)
__import__('time').sleep(9)
"""


class Case(NamedTuple):
    """A wrong input.

    Args:
        command: The tool and its arguments, in the folder that :func:`folder` makes. MANY
            stands for a number of 5,000 digits.
        says: What is in the sentence; parts are separated by ``.*``.
        files: Contents of further files, as text, bytes or what writes them.
        needs: A package without which there is no such case. Default: none.
    """

    command: str
    says: str
    files: dict[str, str | bytes | Callable] = {}
    needs: str = ''


class Odd(RepVGG):
    """A network with odd outputs, or with a foreign block that cannot be switched."""

    def __init__(self, returns: str, **options) -> None:
        super().__init__(arch=REPVGG['arch'], **options)
        self.returns = returns
        self.foreign = Foreign() if returns == 'foreign' else nn.Identity()

    def forward(self, x: Tensor):
        """What stands under its name in the table."""
        return RETURNS[self.returns](self.foreign(super().forward(x)[-1]))


class Foreign(nn.Module):
    """A block of another package, whose switch fails."""

    def forward(self, x: Tensor) -> Tensor:
        """Change nothing."""
        return x

    def switch_to_deploy(self) -> None:
        """Fail in a way of its own."""
        raise AttributeError('this block\nhas no conv')


RETURNS = {
    'complex': lambda y: y.to(torch.complex64),
    'an empty tensor': lambda y: y[:0],
    'nothing': lambda y: None,
    'a text': lambda y: 'cat',
    'not-a-number': lambda y: y * float('nan'),
    'a set': lambda y: {y},
    'an error': lambda y: y.no_such_thing,
    'foreign': lambda y: y,
}
MODELS.register_module(name='Odd', module=Odd, force=True)


def save(value: object) -> Callable:
    """What writes a checkpoint."""
    return lambda path: torch.save(value, path)


def changed(change: Callable[[dict], object]) -> Callable:
    """What writes a changed copy of ``net.pth``'s weights."""
    return lambda path: torch.save(
        change(torch.load('net.pth', weights_only=False)['state_dict']), path
    )


def each(change: Callable[[Tensor], Tensor]) -> Callable:
    """What changes every weight that has dimensions."""
    return changed(lambda s: {k: change(v) if v.dim() else v for k, v in s.items()})


def renamed(old: str, new: str) -> Callable:
    """What renames keys."""
    return changed(lambda s: {k.replace(old, new): v for k, v in s.items()})


def of_config(**model) -> dict:
    """A config of a bare model, and its weights."""
    config = Config(dict(model=model))
    return {
        'bad.py': config.pretty_text,
        'bad.pth': lambda path: torch.save(MODELS.build(config.model).state_dict(), path),
    }


REPARAM, EXPORT = 'reparam net.py net.pth out.pth', 'export_onnx net.py net.pth out.onnx'
TRAIN, TEST = 'train net.py', 'test net.py net.pth'
BENCHMARK = 'benchmark net.py --no-compile --rounds 1 --tasks eval'
DIGITS = 'dataset_converters/digits out'
#: What the command line alone tells to be wrong.
ARGUMENTS = [
    *(
        Case(f'{name} {rest}', says)
        for name in ('reparam', 'export_onnx')
        for rest, says in (
            ('', 'required: config, checkpoint, out'),
            ('net.py net.pth', 'required: out'),
            ('net.py net.pth out.pth net', 'unrecognized arguments: net'),
            ("'' net.pth out.pth", 'argument config: it is empty'),
            ("net.py '' out.pth", 'argument checkpoint: it is empty'),
            ("net.py net.pth ''", 'argument out: it is empty'),
        )
    ),
    *(
        Case(f'{command} --shape{shape}', 'is not a shape: give C,H,W')
        for command in (REPARAM, EXPORT, BENCHMARK)
        for shape in (f' {"9" * 20}', ' MANY', ' 0', ' -1', ' 1.5', ' 1,2,3,4', '=')
    ),
    *(
        Case(f'{REPARAM} --seed {seed}', 'not a whole number from 0 to')
        for seed in ('9' * 20, 'MANY', '-1', '1.5', 'abc', "''")
    ),
    *(
        Case(f'{command} --rtol={rtol}', 'not a relative error: give a number between')
        for command in (REPARAM, EXPORT)
        for rtol in ('nan', 'inf', '-1', '0', '1', '1e9', 'MANY', 'abc')
    ),
    *(
        Case(f'{command} --cfg-options {options}', f'{name!r} is not an option')
        for command in (REPARAM, EXPORT, TRAIN, TEST, BENCHMARK)
        for options, name in (('nonsense', 'nonsense'),)
    ),
    Case(f'{REPARAM} --cfg-options =1', "'=1' is not an option"),
    Case(f"{REPARAM} --cfg-options 'a b=1'", "'a b=1' is not an option"),
    Case(f'{REPARAM} --cfg-options for=1', "'for=1' is not an option"),
    Case(f'{REPARAM} --cfg-options a=(,[)', 'Imbalanced brackets'),
    Case(f'{REPARAM} --cfg-options a={"(" * 2000}{")" * 2000}', 'RecursionError'),
    Case(f'{REPARAM} --cfg-options', 'expected at least one argument'),
    Case(f'{REPARAM} --bogus', 'unrecognized arguments: --bogus'),
    *(
        Case(f'{EXPORT} --opset {opset}', 'not a whole number from 1')
        for opset in ('0', '-1', 'abc', 'MANY')
    ),
    Case(f'{EXPORT} --form MANY', 'argument --form: invalid choice'),
    Case('convert_checkpoint', 'required: source, out'),
    Case("convert_checkpoint net.pth ''", 'argument out: it is empty'),
    Case(
        'convert_checkpoint net.pth out.pth --from jax', 'argument --from: invalid choice'
    ),
    Case('train', 'required: config'),
    Case(f"{TRAIN} --work-dir ''", 'argument --work-dir: it is empty'),
    Case(f"{TRAIN} --resume ''", 'argument --resume: it is empty'),
    Case(f'{TRAIN} --launcher ssh', 'argument --launcher: invalid choice'),
    Case(f'{TRAIN} --local_rank -1', 'not a whole number from 0'),
    Case(f'{TEST} --interval 0', 'not a whole number from 1'),
    Case(f'{TEST} --interval -1', 'not a whole number from 1'),
    Case(f'{TEST} --wait-time nan', 'not a number of seconds'),
    Case(f'{TEST} --wait-time=-1', 'not a number of seconds'),
    Case(f'{TEST} --out-item all', 'argument --out-item: invalid choice'),
    *(
        Case(f'{BENCHMARK} {option} {number}', f'{option}: ')
        for option in ('--batch-size', '--rounds')
        for number in ('0', '-1', 'abc', '9' * 20, 'MANY')
    ),
    Case(f'{BENCHMARK} --tasks sleep', 'argument --tasks: invalid choice'),
    Case(f'{DIGITS} --seed -1', 'not a whole number from 0'),
    Case(f'{DIGITS} --seed MANY', 'not a whole number from 0'),
    Case(f'{DIGITS} --scenes 0 1', 'not a whole number from 1'),
    Case(f'{DIGITS} --scenes 1', 'expected 2 arguments'),
    Case(f'{DIGITS} --per-class 1', 'not a whole number from 2'),
    Case('demo --only nothing', 'argument --only: invalid choice'),
    Case('demo MANY', 'unrecognized arguments: 999'),
]

#: Files that are no configs, and configs that are no good.
CONFIGS = [
    *(
        Case(f'{command} {rest}', says)
        for command, rest in (
            ('reparam no.py', 'net.pth out.pth'),
            ('export_onnx no.py', 'net.pth out.onnx'),
            ('test no.py', 'net.pth'),
            ('train no.py', ''),
            ('benchmark no.py', ''),
            ('benchmark net.py no.py --no-compile', ''),
        )
        for says in ('config no.py does not exist: check the path',)
    ),
    Case('reparam . net.pth out.pth', 'is a folder: give a file in it'),
    Case('reparam net.py/net.py net.pth out.pth', 'does not exist'),
    Case('reparam /dev/zero net.pth out.pth', 'config /dev/zero is a device'),
    Case('reparam bad net.pth out.pth', 'bad is a named pipe', {'bad': os.mkfifo}),
    Case(f'reparam {"x" * 300} net.pth out.pth', 'File name too long'),
    Case(
        'reparam bad net.pth out.pth',
        'Too many levels of symbolic links',
        {'bad': lambda path: path.symlink_to(path)},
    ),
    Case('reparam net.pth net.py out.pth', 'net.pth cannot be read (OSError: Only py/yml'),
    Case('reparam bad.json net.pth out.pth', 'JSONDecodeError', {'bad.json': '{'}),
    Case('reparam bad.yaml net.pth out.pth', 'ParserError', {'bad.yaml': 'a: [1'}),
    *(
        Case('reparam bad.py net.pth out.pth', says, {'bad.py': source})
        for source, says in (
            ('', 'bad.py has no model=dict(...)'),
            ('model = [1]', 'bad.py has no model=dict(...)'),
            ('model = dict(', 'bad.py cannot be read (SyntaxError'),
            (b'\xff\xfe\x00', 'bad.py cannot be read (UnicodeDecodeError'),
            (b'model = 1\x00', 'null bytes'),
            ('1 / 0', 'bad.py cannot be read (ZeroDivisionError'),
            ('def f(): return f()\nf()', 'bad.py cannot be read (RecursionError'),
            ('model = {}\nmodel["a"] = model', 'bad.py cannot be read (RecursionError'),
            ('raise MemoryError', 'bad.py cannot be read (MemoryError'),
            ('import sys\nsys.exit(0)', 'bad.py cannot be read (SystemExit: 0'),
            ('raise SystemExit', 'bad.py cannot be read (SystemExit)'),
            ('raise KeyboardInterrupt', 'interrupted'),
            (CTRL_C, 'interrupted'),
            ('class E(BaseException): ...\nraise E', 'bad.py cannot be read (E)'),
            (
                'class E(Exception):\n    def __str__(self): raise E\nraise E',
                'bad.py cannot be read (E)',
            ),
            (r'raise Exception("\x1b[2J\x07")', r'(Exception: \x1b[2J\x07)'),
            ('raise Exception("a" * 9999)', 'aaa ...)'),
            ("_base_ = './none.py'", 'none.py'),
            ('_base_ = 5', 'bad.py cannot be read (TypeError'),
            ('custom_imports = 5', 'bad.py cannot be read (TypeError'),
            ("custom_imports = dict(imports=['none'])", 'Failed to import custom modules'),
            ("model = dict(type='None')", "model.type='None' is unknown to mmengine"),
            ('model = dict(type=5)', 'the model of this config cannot be built'),
        )
    ),
    *(
        Case(f'{command} --cfg-options {option}', says)
        for command in (REPARAM, TRAIN)
        for option, says in (
            ('default_scope=5', 'default_scope=5 is not the name of a package'),
            ('default_scope=[1]', 'default_scope=[1] is not the name of a package'),
            ('default_scope=..', "default_scope='..' is not the name of a package"),
            ('default_scope=a.b', "default_scope='a.b' is not the name of a package"),
            ('default_scope=none', 'needs none, which is not installed'),
            ('model=3', 'no model=dict(...)'),
            ('model.backbone.type.x=1', '--cfg-options do not fit config net.py'),
            ('model.type=None_', "type='None_' is unknown to mmpretrain"),
            ('model.backbone.type=None_', "type='None_' is unknown to mmpretrain"),
            ('model.backbone.norm_cfg.type=None_', "norm_cfg.type='None_' is unknown"),
            ('model.backbone.arch=Z9', "arch 'Z9' is unknown; choose from A0"),
            ('model.backbone.in_channels=-1', 'cannot be built (RuntimeError'),
            ('model.backbone.out_indices=(9,)', 'cannot be built (ArchitectureError'),
            ('model.head.num_classes=-3', 'num_classes=-3'),
        )
    ),
    Case(f'{REPARAM} --cfg-options model.backbone=3', 'model of this config cannot be'),
    Case(f'{REPARAM} --cfg-options model.data_preprocessor=3', 'model of this config'),
    Case(
        f'{REPARAM} --cfg-options model.backbone.in_channels=0', 'does not fit the config'
    ),
    Case(
        f'{REPARAM} --cfg-options model.backbone.deploy=True', 'train form and the config'
    ),
    Case('benchmark net.py --cfg-options model.type=None_', 'model of this config cannot'),
]

#: What mmengine builds for a run, when the tool asks for it and later.
RUNS = [
    *(
        Case(f'{TRAIN} --cfg-options {option}', says)
        for option, says in (
            (
                'optim_wrapper.optimizer.type=None_',
                "optim_wrapper .*optimizer.type='None_'",
            ),
            ('optim_wrapper.type=None_', "optim_wrapper .*type='None_' is unknown"),
            ('optim_wrapper.constructor=None_', "optim_wrapper .*type='None_' is unknown"),
            ('optim_wrapper.optimizer.lr=-1', 'optim_wrapper > SGD .*learning rate: -1'),
            ('optim_wrapper.optimizer.lr=abc', 'optim_wrapper > SGD .*TypeError'),
            ('optim_wrapper=None', 'net.py has no optim_wrapper=dict'),
            ('train_cfg=None', 'net.py has no train_cfg=dict'),
            ('train_cfg.max_epochs=abc', "train_loop .*'abc'"),
            ('train_dataloader=None', 'net.py has no train_dataloader=dict'),
            ('train_dataloader.batch_size=0', 'train_loop > dataloader .*batch_size=0'),
            ('train_dataloader.num_workers=-1', 'train_loop > dataloader .*num_workers'),
            ('train_dataloader.sampler.type=None_', "dataloader .*type='None_' is unknown"),
            (
                'train_dataloader.collate_fn.type=None_',
                "collate_fn.type='None_' is unknown",
            ),
            ('train_dataloader.dataset.type=None_', "dataloader .*type='None_' is unknown"),
            (
                'train_dataloader.dataset.pipeline.0.type=None_',
                "dataloader > CustomDataset .*type='None_' is unknown",
            ),
            ('train_dataloader.dataset.data_root=no/data', 'no/data/train does not exist'),
            ('train_dataloader.dataset.data_root=empty', 'CustomDataset .*subfolders'),
            ('val_evaluator=None', 'a run of this config .*val_evaluator'),
            ('val_evaluator.type=None_', "val_loop > evaluator .*type='None_' is unknown"),
            ('param_scheduler.type=None_', "param_scheduler .*type='None_' is unknown"),
            ('param_scheduler=3', 'a run of this config .*param_scheduler'),
            ('visualizer.type=None_', "visualizer .*type='None_' is unknown"),
            ('default_hooks.logger.type=None_', "type='None_' is unknown"),
            ('default_hooks=3', 'default_hooks=3 is not a dict of hooks'),
            ('custom_hooks=3', 'a run of this config .*TypeError'),
            ('log_level=LOUD', "logger .*'LOUD'"),
            ('randomness.seed=abc', 'a run of this config .*TypeError'),
            ('env_cfg=3', 'a run of this config .*AttributeError'),
            ('compile=3', 'a run of this config .*compile'),
            ('model.init_cfg.type=None_', "type='None_' is unknown"),
            ('work_dir=5', 'work_dir of net.py is not a path'),
            ('load_from=5', 'load_from of net.py is not a path'),
            ('load_from=no.pth', 'no.pth does not exist'),
            ('auto_scale_lr=3 --auto-scale-lr', '--auto-scale-lr needs auto_scale_lr=dict'),
            ('auto_scale_lr.base_batch_size=0 --auto-scale-lr', '--auto-scale-lr needs'),
        )
    ),
    *(
        Case(f'{TEST} --cfg-options {option}', says)
        for option, says in (
            ('test_cfg=None', 'net.py has no test_cfg=dict'),
            ('test_dataloader=None', 'net.py has no test_dataloader=dict'),
            ('test_evaluator=None', 'a run of this config .*test_evaluator'),
            (
                'test_evaluator.type=None_',
                "test_loop > evaluator .*type='None_' is unknown",
            ),
            ('test_dataloader.dataset.type=None_', "dataloader .*type='None_' is unknown"),
            ('test_dataloader.batch_size=abc', 'test_loop > dataloader .*batch_size'),
            ('test_dataloader.dataset.data_root=no/data', 'no/data/val does not exist'),
            ('model.type=None_', "model .*type='None_' is unknown"),
            ('model.backbone.type=None_', "ImageClassifier .*type='None_' is unknown"),
            ('default_hooks.logger.type=None_', "type='None_' is unknown"),
            ('optim_wrapper.optimizer.type=None_ tta_model=None --tta', '--tta needs'),
        )
    ),
    Case(f'{TRAIN} --work-dir net.py', 'File exists'),
    Case(f'{TRAIN} --launcher pytorch', '--launcher pytorch needs the variable RANK'),
    Case(f'{TRAIN} --launcher slurm', '--launcher slurm needs the variable SLURM_PROCID'),
    Case(f'{TRAIN} --resume net.py', 'net.py cannot be read'),
    Case(f'{TRAIN} --resume deploy.pth', 'holds no training to resume'),
    Case(f'{TRAIN} --resume .', 'is a folder'),
    Case(f'{TEST} --out a.txt', 'a.txt must end in .json or .yaml or .pkl'),
    Case(f'{TEST} --out a.json --out-item pred', 'must end in .pkl'),
    *(
        Case(f'{TEST} --out {out}', says, {'a.json': Path.mkdir})
        for out, says in (
            ('dir.json/', 'dir.json/ is the name of a folder'),
            ('a.json', 'a.json is a folder'),
            ('net.py/x.json', 'net.py/x.json cannot be written'),
            ('/proc/x.json', '/proc/x.json cannot be written'),
            ('/dev/null/x.json', '/dev/null/x.json cannot be written'),
        )
    ),
    *(
        Case(
            f'{TEST} --deploy --cfg-options custom_hooks={hooks}', 'custom_hooks of net.py'
        )
        for hooks in ('5', 'abc')
    ),
    Case(f'{BENCHMARK} --device abacus', '--device abacus is unknown'),
    Case(f"{BENCHMARK} --device ''", 'is unknown'),
    Case(f'{BENCHMARK} --device meta', '--device meta is unknown'),
    Case(f'{BENCHMARK} --device cuda:99', '--device cuda:99'),
    Case(f'{BENCHMARK} --shape 5,8,8', 'give a fitting --shape'),
    Case(f'{BENCHMARK} --shape 9999999', 'does not fit into memory'),
    Case(f'{BENCHMARK} --out .', 'must end in .json'),
    Case(f'{BENCHMARK} --out x.txt', 'x.txt must end in .json'),
    Case(f'{BENCHMARK} --out x', 'x must end in .json'),
    Case(f'{BENCHMARK} --plane a.xyz', '--plane a.xyz must end in .png'),
    Case(f'{BENCHMARK} --plane a.png', 'no metafile.yml has an accuracy'),
    *(
        Case(f'{BENCHMARK} --plane a.png', 'metafile.yml is not a', {'metafile.yml': text})
        for text in ('a: [', '[1]', 'Models: 5', 'Models: [{Config: 5}]')
    ),
    Case('dataset_converters/digits net.py', 'net.py exists: give another folder'),
    Case('dataset_converters/digits . --overwrite', 'this tool did not write it'),
]

#: Files that are no checkpoints, and those of other models.
CHECKPOINTS = [
    *(
        Case(f'{name} {config} {checkpoint} {out}', says)
        for name, out in (
            ('reparam', 'out.pth'),
            ('export_onnx', 'out.onnx'),
            ('test', ''),
        )
        for config, checkpoint, says in (
            ('net.py', 'no.pth', 'no.pth does not exist'),
            ('net.py', '.', 'is a folder'),
            ('net.py', 'https://a.b/c.pth', 'is an address: download it first'),
            ('net.py', 'net.py', 'net.py cannot be read as a checkpoint'),
            ('deploy.py', 'net.pth', 'train form and the config is not'),
        )
    ),
    *(
        Case(f'{REPARAM} --cfg-options {option}', f'cannot be written as text .*{says}')
        for option, says in (('_base_=abc', 'abc'), ('custom_imports=5', 'TypeError'))
    ),
    *(
        Case('reparam bad.py net.pth out.pth', 'written as text', {'bad.py': text})
        for text in (
            "_base_ = 'net.py'\nfoo = [print]",
            "_base_ = 'net.py'\nfoo = [object()]",
            "_base_ = 'net.py'\nfoo = {'for': 1}",
            "_base_ = 'net.py'\nfoo = dict(a=1)\nfor _ in range(300): foo = [foo]",
        )
    ),
    *(
        Case(f'{REPARAM} --cfg-options {norm}.type=BN {norm}.eps={eps}', says)
        for norm in ('model.backbone.norm_cfg',)
        for eps, says in (('nan', 'not finite'), ('1e400', 'no output depends'))
    ),
    Case('reparam deploy.py deploy.pth out.pth', 'deploy.pth is in deploy form already'),
    Case('reparam net.py deploy.pth out.pth', 'deploy.pth is in deploy form already'),
    Case('test net.py deploy.pth', 'in deploy form and the config is not'),
    Case('export_onnx net.py deploy.pth out.onnx --form train', 'deploy form'),
    *(
        Case('reparam net.py bad.pth out.pth', says, {'bad.pth': write})
        for write, says in (
            ('', 'bad.pth'),
            ('PK\x03\x04', 'bad.pth cannot be read'),
            (save([]), 'holds no state dict'),
            (save(5), 'holds no state dict'),
            (save({}), 'holds no state dict'),
            (save({'state_dict': {}}), 'holds no state dict'),
            (save({'state_dict': {1: torch.ones(1)}}), 'holds no state dict'),
            (save({'model': {'state_dict': {'a': torch.ones(1)}}}), 'holds no state dict'),
            (changed(lambda s: {'net': {'model': s}}), 'holds no state dict'),
            (save({MANY + str(i): torch.ones(1) for i in range(9)}), 'which no training'),
            (save({'a\nb': torch.ones(1)}), r"a weight of the name 'a\nb'"),
            (each(torch.flatten), 'of another shape'),
            (each(lambda v: v[:0]), 'of another shape'),
            (each(lambda v: v * float('nan')), 'stem: its output is not finite'),
            (renamed('backbone.', ''), 'does not fit the config'),
            (changed(lambda s: dict(list(s.items())[:-1])), '1 missing: head.fc.bias'),
        )
    ),
    Case(
        'reparam bad.py bad.pth out.pth',
        'input of shape',
        of_config(**REPVGG, in_channels=0),
    ),
]

#: Models with which nothing can be done.
MODELS_OF_CONFIGS = [
    *(
        Case(f'reparam bad.py bad.pth out.pth {shape}', says, files)
        for shape in ('--shape 8,8',)
        for returns, says in (
            ('complex', 'is complex'),
            ('an empty tensor', 'empty'),
            ('nothing', 'no tensor'),
            ('a text', 'no tensor'),
            ('a set', 'no tensor'),
            ('not-a-number', 'output'),
            ('an error', 'train form cannot process .*AttributeError'),
            ('foreign', r'foreign: its own switch_to_deploy raises AttributeError'),
        )
        for files in (of_config(type='Odd', returns=returns),)
    ),
    *(
        Case('export_onnx bad.py bad.pth out.onnx --shape 8,8', says, files, 'onnxruntime')
        for returns, says in (
            ('complex', 'is complex'),
            ('an empty tensor', 'empty'),
            ('nothing', 'returns no tensor'),
            ('a text', 'returns no tensor'),
            ('not-a-number', 'output'),
            ('an error', 'cannot process .*AttributeError'),
            ('foreign', r'foreign: its own switch_to_deploy raises AttributeError'),
        )
        for files in (of_config(type='Odd', returns=returns),)
    ),
    Case(f'{REPARAM} --shape 5,8,8', 'give a fitting --shape'),
    Case(f'{REPARAM} --shape 9000000', 'does not fit into memory'),
    Case(f'{EXPORT} --opset 3', 'try another --opset', {}, 'onnxruntime'),
    Case(f'{EXPORT} --opset 999', 'try another --opset', {}, 'onnxruntime'),
    Case('reparam net.py net.pth out.onnx', 'must end in .pth'),
    Case('export_onnx net.py net.pth out.pth', 'must end in .onnx'),
    Case('reparam net.py net.pth deploy.pth', 'deploy.pth exists: give another name'),
    Case('reparam net.py net.pth net.pth --overwrite', 'would replace net.pth'),
]

_STEM, _STAGE = 'backbone.stem', 'backbone.stage_1.0'
_CONV = '.branch_3x3.conv.weight'
#: What convert_checkpoint.py finds in files.
CONVERSIONS = [
    *(
        Case('convert_checkpoint bad.pth out.pth', says, {'bad.pth': write})
        for write, says in (
            (save([]), 'holds no state dict'),
            (save({'a': torch.ones(1)}), 'none of the layouts'),
            (save({f'{MANY}{i}': torch.ones(1) for i in range(9)}), 'which no training'),
            (renamed('stage_1.', f'stage_{MANY}.'), 'which no training'),
            (renamed('stage_1.0', f'stage_1.{MANY}'), 'which no training'),
            (renamed('stage_1.0', 'stage_1.999999999'), 'block stage_1.0 is missing'),
            (
                changed(lambda s: s | {f'{_STAGE}{MANY}{_CONV}': s[_STAGE + _CONV]}),
                'stage_1',
            ),
            (
                changed(lambda s: s | {f'{_STAGE[:-1]}7{_CONV}': s[_STAGE + _CONV]}),
                'stage_1.1',
            ),
            (
                changed(lambda s: s | {'a\nb': torch.ones(1)}),
                r"a weight of the name 'a\nb'",
            ),
            (each(lambda v: v[:0]), 'weights without elements'),
            (changed(lambda s: s | {_STEM + _CONV: s[_STEM + _CONV][:, :0]}), 'elements'),
            (
                changed(lambda s: s | {'head.fc.weight': s['head.fc.weight'][:0]}),
                'elements',
            ),
            (changed(lambda s: s | {'head.fc.weight': torch.ones(())}), 'is not a matrix'),
            (each(torch.flatten), 'stem is missing'),
            (each(torch.sum), 'stem is missing'),
            (
                changed(
                    lambda s: s | {f'{_STEM}.se_layer.conv1.conv.weight': torch.ones(())}
                ),
                'se_layer is not that of a conv',
            ),
            (
                changed(lambda s: {k: v for k, v in s.items() if 'stage_2' not in k}),
                'block stage_2.0 is missing',
            ),
        )
    ),
    Case('convert_checkpoint no.pth out.pth', 'no.pth does not exist'),
    Case('convert_checkpoint net.pth net.pth --overwrite', 'would replace its source'),
    Case('convert_checkpoint net.pth deploy.pth', 'deploy.pth exists'),
    *(
        Case(f'convert_checkpoint net.pth {out}', 'must end in .pth or .safetensors')
        for out in ('.', 'c.onnx', 'c', 'c.PTH', 'c.py')
    ),
    Case('convert_checkpoint net.pth c.pth/', 'c.pth/ is the name of a folder'),
    Case('convert_checkpoint net.pth out.pth --arch MANY', 'leave --arch 999'),
    Case('convert_checkpoint net.pth out.pth --arch A0', 'leave --arch A0 out'),
    Case('convert_checkpoint net.pth out.pth --from timm', 'another layout with --from'),
    Case(
        'convert_checkpoint bad.h5 out.pth',
        'cannot be read as weights of Keras',
        {'bad.h5': b'\x89HDF\r\n\x1a\n' + b'0' * 100},
        'h5py',
    ),
]

CASES = [*ARGUMENTS, *CONFIGS, *RUNS, *CHECKPOINTS, *MODELS_OF_CONFIGS, *CONVERSIONS]


@pytest.fixture
def folder(
    classifier: Project,
    deployed_classifier: Project,
    tmp_path: Path,
    monkeypatch,
    format_by,
) -> Iterator[Path]:
    """The folder that the commands are given in."""
    sources = (classifier, 'net'), (deployed_classifier, 'deploy')
    for project, name in sources:
        shutil.copy(project.config, tmp_path / f'{name}.py')
        shutil.copy(project.checkpoint, tmp_path / f'{name}.pth')
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # What takes most of the time and changes nothing: compilers that are asked for their
    # version, the style of the config in the log, the memory of all tests searched.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    format_by(lambda text, **_: (text, True))
    monkeypatch.setattr('mmengine.dataset.base_dataset.gc', SimpleNamespace(collect=int))
    yield tmp_path
    # mmengine names them by the second, and this is not the only run in it.
    for kind in (MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder; a run's log is none of its results."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and not ('work_dirs' in path.parts and path.suffix != '.pth')
    }


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.command[:80])
def test_it_is_refused(case, folder, call, capsys, tally):
    if case.needs:
        pytest.importorskip(case.needs)
    for name, value in case.files.items():
        if callable(value):
            value(folder / name)
        else:
            (folder / name).write_bytes(value.encode() if isinstance(value, str) else value)
    before = contents(folder)
    name, *arguments = shlex.split(case.command.replace('MANY', MANY))
    with pytest.raises(SystemExit) as info:
        call(name, *arguments)
    code, printed = info.value.code, capsys.readouterr()
    assert 'Traceback' not in printed.err
    if isinstance(code, str):
        assert code.startswith('error: ')
    else:
        # argparse and an interrupt.
        assert code in (2, 130)
        code = printed.err.splitlines()[-1]
    assert code.isprintable() and len(code) < 2200
    for part in case.says.split('.*'):
        assert part in code
    assert contents(folder) == before
    tally('bad inputs')


@pytest.mark.parametrize(
    ('source', 'code', 'says'),
    [
        ('import sys\nsys.exit(0)', 1, 'error: config bad.py cannot be read (System'),
        (CTRL_C, 130, 'interrupted'),
    ],
)
def test_exit_status(tmp_path, source, code, says):
    """As a shell sees it."""
    (tmp_path / 'bad.py').write_text(source)
    done = tool('train', 'bad.py', cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(says)
    assert 'Traceback' not in done.stderr
    assert os.listdir(tmp_path) == ['bad.py']


def test_help_is_no_error(call, capsys):
    with pytest.raises(SystemExit) as info:
        call('train', '--help')
    assert info.value.code == 0
    assert 'usage: train.py' in capsys.readouterr().out


class Fails(Hook):
    """Fails in the middle of training, or before it."""

    def __init__(self, where: str, how: str) -> None:
        setattr(self, where, lambda runner, **_: FAILURES[how]())


def build_nothing() -> None:
    """Ask mmengine for what it does not have."""
    MODELS.build(dict(type='None_'))


def leave() -> None:
    """End Python as if all were well."""
    raise SystemExit(0)


FAILURES = dict(divide=lambda: 1 / 0, build=build_nothing, leave=leave)
HOOKS.register_module(name='Fails', module=Fails, force=True)


def train_with(folder: Path, call: Callable, **options: str) -> None:
    hook = dict(type='Fails', **options)
    call('train', variant(folder / 'net.py', folder, custom_hooks=[hook]))


@pytest.mark.parametrize('how', ['divide', 'build'])
def test_an_error_in_training_is_the_developers(folder, call, how):
    """It keeps its traceback, even if mmengine builds something there."""
    with pytest.raises((ZeroDivisionError, KeyError)) as info:
        train_with(folder, call, where='before_train_iter', how=how)
    assert info.value.__traceback__ is not None


def test_what_is_built_before_training_is_the_configs(folder, call):
    with pytest.raises(SystemExit, match=r"^error: None_ of this .*'None_' is unknown"):
        train_with(folder, call, where='before_run', how='build')


def test_its_traceback_is_in_the_log(folder, call):
    options = ['--cfg-options', 'log_level=DEBUG', 'model.head.num_classes=-3']
    with pytest.raises(SystemExit, match='num_classes=-3'):
        call('train', 'net.py', *options)
    (log,) = folder.glob('work_dirs/net/*/*.log')
    assert 'Traceback (most recent call last):' in log.read_text()


@pytest.mark.parametrize('where', ['before_run', 'before_train_iter'])
def test_code_that_leaves_is_no_success(folder, call, where):
    with pytest.raises(SystemExit, match='ended the tool'):
        train_with(folder, call, where=where, how='leave')


def test_a_config_that_this_user_may_not_read(folder):
    (folder / 'net.py').chmod(0)
    root = not os.geteuid()
    if root:
        # Who may read everything.
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match='may not be read by this user'):
            read_config(folder / 'net.py')
    finally:
        if root:
            os.seteuid(0)
