"""Python expressions in settings files, read without running them: a small calculator over the syntax tree.

What it knows: numbers, texts, lists and tuples, arithmetic, comparisons, ``range`` and a few functions, comprehensions,
and numpy's ``arange``, ``linspace``, ``logspace`` and ``geomspace``. Anything else is refused, so that a settings file
can neither run code nor need the program it was written for.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LIMIT = 10_000  # values of one list, and steps of one expression's comprehensions
DIGITS = 4096  # bits of a whole number


class Unreadable(ValueError):
    """The text is not an expression this reader knows; the message says which part."""


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _range(*arguments: int) -> list[int]:
    found = range(*arguments)
    if len(found) > LIMIT:
        raise Unreadable(f"a range of {len(found)} values; at most {LIMIT}")
    return list(found)


def _numpy(name: str) -> Callable[..., list[Any]]:
    def call(*arguments: Any, **named: Any) -> list[Any]:
        import numpy as np

        count = named.get("num", arguments[2] if len(arguments) > 2 else 50) if name != "arange" else _count(*arguments)
        if not isinstance(count, int) or count > LIMIT:
            raise Unreadable(f"np.{name} with {count} values; at most {LIMIT}")
        return getattr(np, name)(*arguments, **named).tolist()

    return call


def _count(*arguments: float) -> int:
    low, high, step = (0, arguments[0], 1) if len(arguments) == 1 else (*arguments, 1)[:3]
    return int(abs((high - low) / step)) + 1


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "list": list,
    "tuple": list,
    "sorted": sorted,
    "reversed": lambda values: list(values)[::-1],
    "int": int,
    "float": float,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
    "sum": sum,
    "len": len,
    **{f"{numpy}.{n}": _numpy(n) for numpy in ("np", "numpy") for n in ("arange", "linspace", "logspace", "geomspace")},
}


def evaluate(text: str) -> Any:
    """The value of an expression; tuples and arrays become lists.

    Raises:
        Unreadable: for what is no expression, or holds a part outside the list above.
    """
    if len(text) > LIMIT:
        raise Unreadable(f"{len(text)} characters; at most {LIMIT}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Reader().read(tree.body, {})
    except Unreadable:
        raise
    except (SyntaxError, RecursionError, MemoryError):
        raise Unreadable("not an expression") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Unreadable(str(error)) from None


class _Reader:
    """Walks one syntax tree; ``names`` are the variables of the comprehensions around a place."""

    def __init__(self) -> None:
        self._turns = 0

    def read(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        found = getattr(self, f"_{type(node).__name__.lower()}", None)
        if found is None:
            raise Unreadable(f"'{ast.unparse(node)}' is none of numbers, lists, ranges and arithmetic")
        return found(node, names)

    def _constant(self, node: ast.Constant, names: Mapping[str, Any]) -> Any:
        if isinstance(node.value, (bytes, complex)) or node.value is Ellipsis:
            raise Unreadable(f"'{ast.unparse(node)}' is no number or text")
        return node.value

    def _name(self, node: ast.Name, names: Mapping[str, Any]) -> Any:
        if node.id not in names:
            raise Unreadable(f"the name '{node.id}' is not known")
        return names[node.id]

    def _list(self, node: ast.List | ast.Tuple | ast.Set, names: Mapping[str, Any]) -> list[Any]:
        return [self.read(item, names) for item in node.elts]

    _tuple = _set = _list

    def _dict(self, node: ast.Dict, names: Mapping[str, Any]) -> dict[Any, Any]:
        if None in node.keys:
            raise Unreadable("'**' in a dictionary")
        pairs = [(self.read(k, names), self.read(v, names)) for k, v in zip(node.keys, node.values, strict=True) if k]
        return dict(pairs)

    def _unaryop(self, node: ast.UnaryOp, names: Mapping[str, Any]) -> Any:
        if type(node.op) not in _UNARY:
            raise Unreadable(f"'{ast.unparse(node)}': this operator is not known")
        return _UNARY[type(node.op)](self.read(node.operand, names))

    def _binop(self, node: ast.BinOp, names: Mapping[str, Any]) -> Any:
        left, right = self.read(node.left, names), self.read(node.right, names)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) not in _BINARY:
            raise Unreadable(f"'{ast.unparse(node)}': this operator is not known")
        if isinstance(left, (str, dict)) or isinstance(right, (str, dict)):
            raise Unreadable(f"'{ast.unparse(node)}': arithmetic is for numbers")
        lists = isinstance(left, list), isinstance(right, list)
        if any(lists) and not (all(lists) and isinstance(node.op, ast.Add)):
            raise Unreadable(f"'{ast.unparse(node)}': lists can be joined with + only")
        return self._bounded(_BINARY[type(node.op)](left, right))

    def _bounded(self, value: Any) -> Any:
        if isinstance(value, list) and len(value) > LIMIT:
            raise Unreadable(f"a list of {len(value)} values; at most {LIMIT}")
        if isinstance(value, int) and value.bit_length() > DIGITS:
            raise Unreadable("a whole number of more than 1,000 digits")
        return value

    def _compare(self, node: ast.Compare, names: Mapping[str, Any]) -> bool:
        values = [self.read(part, names) for part in (node.left, *node.comparators)]
        if any(type(op) not in _COMPARE for op in node.ops):
            raise Unreadable(f"'{ast.unparse(node)}': this comparison is not known")
        return all(_COMPARE[type(op)](values[i], values[i + 1]) for i, op in enumerate(node.ops))

    def _ifexp(self, node: ast.IfExp, names: Mapping[str, Any]) -> Any:
        return self.read(node.body if self.read(node.test, names) else node.orelse, names)

    def _call(self, node: ast.Call, names: Mapping[str, Any]) -> Any:
        called = ast.unparse(node.func)
        if called not in _FUNCTIONS:
            raise Unreadable(f"'{called}' is none of {', '.join(n for n in _FUNCTIONS if 'numpy' not in n)}")
        if any(k.arg is None for k in node.keywords):
            raise Unreadable(f"'{ast.unparse(node)}': arguments must be written out")
        arguments = [self.read(argument, names) for argument in node.args]
        named = {str(k.arg): self.read(k.value, names) for k in node.keywords}
        return self._bounded(_FUNCTIONS[called](*arguments, **named))

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, names: Mapping[str, Any]) -> list[Any]:
        return [self.read(node.elt, inner) for inner in self._turn(node.generators, names)]

    _generatorexp = _setcomp = _listcomp

    def _turn(self, loops: Sequence[ast.comprehension], names: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if not loops:
            yield names
            return
        loop, *rest = loops
        if not isinstance(loop.target, ast.Name) or loop.is_async:
            raise Unreadable(f"'for {ast.unparse(loop.target)}': a loop has one variable")
        values = self.read(loop.iter, names)
        if not isinstance(values, list):
            raise Unreadable(f"'{ast.unparse(loop.iter)}' is no list or range")
        for value in values:
            self._turns += 1
            if self._turns > LIMIT:
                raise Unreadable(f"more than {LIMIT} turns of its loops")
            inner = {**names, loop.target.id: value}
            if all(self.read(condition, inner) for condition in loop.ifs):
                yield from self._turn(rest, inner)


def _power(base: Any, exponent: Any) -> Any:
    if not all(isinstance(v, (int, float)) for v in (base, exponent)):
        raise Unreadable("a power of numbers only")
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(exponent, 0) > DIGITS:
        raise Unreadable("a whole number of more than 1,000 digits")
    value = base**exponent
    if isinstance(value, complex):
        raise Unreadable("the root of a negative number")
    return value
