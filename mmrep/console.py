"""The command ``mmrep``, whose sub-commands are the tools."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

from mmrep.cli import run_tool
from mmrep.deployment import list_models, shipped

#: The file of each sub-command, and what it does.
COMMANDS = {
    'train': ('train', 'train the model of a config'),
    'test': ('test', 'evaluate a checkpoint'),
    'reparam': ('reparam', 'fuse a checkpoint and verify the result'),
    'expand': ('expand', 'replace convs of a model by blocks'),
    'export': ('export_onnx', 'write an ONNX file and verify it'),
    'quantize': ('quantize_onnx', 'write an int8 ONNX file and measure its accuracy'),
    'import': ('convert_checkpoint', 'import the weights of another project'),
    'benchmark': ('benchmark', 'time models side by side'),
    'compare': ('compare_blocks', 'train a network with one block after the other'),
    'analyze': ('analyze_branches', 'show what the branches of a model do'),
}


def usage() -> str:
    """What ``mmrep --help`` prints."""
    lines = [f'  {name:<10} {what}' for name, (_, what) in COMMANDS.items()]
    return '\n'.join(
        [
            'usage: mmrep COMMAND ...',
            '',
            'Structural re-parameterization for OpenMMLab.',
            '',
            *lines,
            "  list       print the names of the shipped configs, or those like '*dbb*'",
            '',
            '`mmrep COMMAND --help` shows the arguments of a command, and an example.',
        ]
    )


def main() -> None:
    """Run the command line."""
    command, *arguments = sys.argv[1:] or ['--help']
    if command in ('-h', '--help'):
        print(usage())
    elif command == 'list':
        run_tool(lambda: print(*list_models(*arguments[:1]), sep='\n'))
    elif command in COMMANDS:
        run_tool(lambda: _run(command, arguments))
    else:
        print(usage(), file=sys.stderr)
        print(f'error: there is no command {command!r}', file=sys.stderr)
        sys.exit(2)


def _run(command: str, arguments: list[str]) -> None:
    """Run a tool as Python would, under the name of the command."""
    name = COMMANDS[command][0]
    path = str(shipped('tools') / f'{name}.py')
    sys.argv[:] = [f'mmrep {command}', *arguments]
    loader = SourceFileLoader('__main__', path)
    module = module_from_spec(spec_from_loader('__main__', loader))
    sys.modules['__main__'] = module
    loader.exec_module(module)
