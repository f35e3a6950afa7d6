"""Mutants: small edits of a module's code, one at a time, for the tests to detect."""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

#: Operators, and those that replace them.
OPERATORS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult],
    ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
COMMUTING = (ast.Add, ast.Mult, ast.BitOr, ast.BitAnd)

#: Names that are easily taken for each other.
TWINS = (
    ('any', 'all'),
    ('min', 'max'),
    ('rows', 'columns'),
    ('top', 'left'),
    ('bottom', 'right'),
    ('height', 'width'),
    ('mean', 'var'),
    ('gamma', 'beta'),
    ('scale', 'shift'),
    ('stride', 'dilation'),
    ('in_channels', 'out_channels'),
    ('weight1', 'weight2'),
    ('bias1', 'bias2'),
    ('groups1', 'groups2'),
    ('reference', 'output'),
)
TWIN = {name: twin for pair in TWINS for name, twin in (pair, pair[::-1])}

#: Functions whose arguments are neither swapped nor dropped.
FIXED_CALLS = ('isinstance', 'hasattr', 'getattr', 'min', 'max', 'range')
FIXED_CALLS += ('gcd', 'promote_types', 'transpose')


@dataclass(frozen=True)
class Mutant:
    """A module with one edit.

    Args:
        module: The module's name.
        scope: The function or class of the edit.
        line: Its line.
        before, after: The edited part's code.
        number: Counts edits that read the same in one scope.
        code: The whole module, compiled.
    """

    module: str
    scope: str
    line: int
    before: str
    after: str
    number: int
    code: CodeType

    @property
    def name(self) -> str:
        """A name that does not change when lines move."""
        again = f' ({self.number})' if self.number > 1 else ''
        return f'{self.module}.{self.scope}: {self.before} -> {self.after}{again}'


def mutants(source: str, module: str, path: str = '<mutant>') -> Iterator[Mutant]:
    """All mutants of a module, in the order of its syntax tree.

    Not edited are annotations, docstrings, imports, ``__all__``, aliases of types, zip's
    ``strict``, and the messages of errors that are raised.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            node.comparators[0].order_matters = False
    numbers = Counter()
    for scope, holder, key, node in list(_places(tree, ())):
        for edited in _edits(node, holder, key):
            if ast.dump(edited) == ast.dump(node):
                continue
            edited = ast.fix_missing_locations(ast.copy_location(edited, node))
            holder[key] = edited
            code = compile(tree, path, 'exec')
            holder[key] = node
            texts = _difference(node, edited)
            numbers[scope, texts] += 1
            yield Mutant(
                module, '.'.join(scope), node.lineno, *texts, numbers[scope, texts], code
            )


def _difference(before: ast.AST, after: ast.AST) -> tuple[str, str]:
    """The lines in which two nodes differ, joined into one line for each node."""
    old, new = ast.unparse(before).splitlines(), ast.unparse(after).splitlines()
    for end in (0, -1):
        while old and new and old[end] == new[end]:
            del old[end], new[end]
    return tuple(' '.join(' '.join(lines).split()) for lines in (old, new))


def _places(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple]:
    """Each node that may be edited, with its scope, and its container and key there."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = *scope, node.name
    for field, value in ast.iter_fields(node):
        if field in ('annotation', 'returns', 'ctx', 'op', 'ops'):
            continue
        holder, keys = vars(node), [field]
        if isinstance(value, list):
            holder, keys = value, range(len(value))
        for key in keys:
            child = holder[key]
            if isinstance(child, ast.AST) and not _is_left(child, node, key):
                if hasattr(child, 'lineno'):
                    yield scope, holder, key, child
                if not isinstance(child, ast.Raise | ast.JoinedStr):
                    yield from _places(child, scope)


def _is_left(node: ast.AST, parent: ast.AST, key: str | int) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id='__all__')]) | ast.keyword(arg='strict'):
            return True
        case ast.Assign(value=ast.Subscript()) if isinstance(parent, ast.Module):
            return True
    return False


def _with(node: ast.AST, **fields) -> ast.AST:
    """A copy of a node with other fields."""
    node = copy.copy(node)
    vars(node).update(fields)
    return node


def _without(values: list) -> Iterator[list]:
    """A list without one of its elements."""
    for index in range(len(values)):
        yield values[:index] + values[index + 1 :]


def _swapped(values: list) -> Iterator[list]:
    """A list with two neighbours swapped."""
    for index in range(len(values) - 1):
        a, b = values[index : index + 2]
        if ast.dump(a) != ast.dump(b):
            yield [*values[:index], b, a, *values[index + 2 :]]


def _names_something(node: ast.AST) -> bool:
    """Whether a node is a string or a type: in sequences of them order rarely matters."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    name = getattr(node, 'attr', getattr(node, 'id', ''))
    return name.lstrip('_')[:1].isupper()


def _edits(node: ast.AST, holder: dict | list, key: str | int) -> Iterator[ast.AST]:
    """The nodes that may replace a node."""
    if key == 'test':
        yield ast.Constant(True)
        yield ast.Constant(False)
    match node:
        case ast.BinOp(left, op, right):
            yield from (left, right)
            for other in OPERATORS.get(type(op), ()):
                yield _with(node, op=other())
            if not isinstance(op, COMMUTING):
                yield _with(node, left=right, right=left)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.BoolOp(op, values):
            yield _with(node, op=OPERATORS[type(op)][0]())
            for rest in _without(values):
                yield _with(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                for other in OPERATORS[type(op)]:
                    yield _with(node, ops=[*ops[:index], other(), *ops[index + 1 :]])
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
            if value == 1:
                yield ast.Constant(0)
        case ast.Constant(value=str(value)):
            yield ast.Constant(value + '?')
        case ast.Name(id=name, ctx=ast.Load()) if name in TWIN:
            yield _with(node, id=TWIN[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in TWIN:
            yield _with(node, attr=TWIN[name])
        case ast.Slice(lower, upper, step):
            for field, value in dict(lower=lower, upper=upper, step=step).items():
                if value is not None:
                    yield _with(node, **{field: None})
        case ast.Call():
            yield from _edits_of_call(node)
        case ast.Tuple(elts, ast.Load()) | ast.List(elts, ast.Load()) | ast.Set(elts):
            ordered = getattr(node, 'order_matters', not all(map(_names_something, elts)))
            if isinstance(node, ast.Set):
                ordered = False
            for rest in _swapped(elts) if ordered else _without(elts):
                yield _with(node, elts=rest)
        case ast.Dict(keys, values):
            for rest in _without(list(zip(keys, values, strict=True))):
                keys, values = map(list, zip(*rest, strict=True)) if rest else ([], [])
                yield ast.Dict(keys, values)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            for index, part in enumerate(node.generators):
                for ifs in _without(part.ifs):
                    generators = list(node.generators)
                    generators[index] = ast.comprehension(
                        part.target, part.iter, ifs, part.is_async
                    )
                    yield _with(node, generators=generators)
        case ast.stmt():
            yield from _edits_of_statement(node)


def _edits_of_call(call: ast.Call) -> Iterator[ast.AST]:
    function, args, keywords = call.func, call.args, call.keywords
    name = getattr(function, 'id', None) or getattr(function, 'attr', None)
    plain = not any(isinstance(arg, ast.Starred) for arg in args)
    if isinstance(function, ast.Attribute):
        yield function.value
    elif args and plain and name not in FIXED_CALLS:
        yield args[0]
    if len(args) > 1 and name not in FIXED_CALLS:
        if all(map(_names_something, args)):
            yield from (_with(call, args=rest) for rest in _without(args))
        else:
            yield _with(call, args=args[:-1])
            yield from (_with(call, args=rest) for rest in _swapped(args))
    for word, rest in zip(keywords, _without(keywords), strict=True):
        if word.arg != 'strict':
            yield _with(call, keywords=rest)


def _edits_of_statement(node: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            for rest in _without(node.decorator_list):
                yield _with(node, decorator_list=rest)
        case ast.With(body=body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.Try(handlers=handlers, finalbody=finalbody):
            for index, handler in enumerate(handlers):
                others = list(handlers)
                others[index] = _with(handler, body=[ast.Raise()])
                yield _with(node, handlers=others)
            if finalbody:
                yield _with(node, finalbody=[ast.Pass()])
        case ast.Raise() | ast.AugAssign() | ast.For() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if any(
            isinstance(part, ast.Name) and part.id == name for part in ast.walk(value)
        ):
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != 'None':
            yield ast.Return(None)
