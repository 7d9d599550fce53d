"""Functions, lines, annotations, expressions, names: how the code is written."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator

from tests.bench.counted.source import Function, Row, Source, at_most

JSON = {"JsonObject", "JsonMapping", "Config", "Params"}  # names for dict[str, Any]


def _parameters(function: Function) -> int:
    """How many parameters a function has; self and cls do not count."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    extra = (a.vararg is not None) + (a.kwarg is not None)
    return len([n for n in names if n not in ("self", "cls")]) + extra


def count_functions(sources: list[Source]) -> list[Row]:
    """Parameters and lengths."""
    wide, long, lengths, most = [], [], [], 0
    for source in sources:
        for function in source.functions:
            count = _parameters(function)
            most = max(most, count)
            length = (function.end_lineno or 0) - function.lineno + 1
            lengths.append(length)
            if count > 6:
                wide.append(source.at(function, f"{function.name} {count}"))
            if length > 50:
                long.append(source.at(function, f"{function.name} {length} lines"))
    median = statistics.median(lengths)
    return [
        at_most("functions with more than 6 parameters", wide, 0),
        Row("... the most", most, "at most 6", most <= 6),
        at_most("functions over 50 lines", long, 0),
        Row("median function, lines", median, "under 12", median < 12),
    ]


def _strings(text: str) -> dict[int, int]:
    """line -> columns of its longest string that begins and ends there."""
    found: dict[int, int] = {}
    start: list[tuple[int, int]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        begin = token.start
        if kind == "FSTRING_START":  # Python 3.12 and later cut f-strings into tokens
            start.append(begin)
            continue
        if kind == "FSTRING_END":
            begin = start.pop()
        elif kind != "STRING":
            continue
        if begin[0] == token.end[0] and not start:
            row = begin[0]
            found[row] = max(found.get(row, 0), token.end[1] - begin[1])
    return found


def count_lines(sources: list[Source]) -> list[Row]:
    """Lines that are too long. One that fits without its longest string is a whole string: the
    formatter leaves it, and so do people, to find a message with grep.
    """
    wide = {100: [], 120: [], 160: []}
    other = []
    for source in sources:
        strings = _strings(source.text)
        for number, line in enumerate(source.text.splitlines(), 1):
            for limit, places in wide.items():
                if len(line) > limit:
                    places.append(f"{source.name}:{number}")
            if len(line) > 100 and len(line) - strings.get(number, 0) > 100 - 2:
                other.append(f"{source.name}:{number}")
    rows = [Row(f"lines over {n} columns", len(p), "", True, tuple(p)) for n, p in wide.items()]
    return [*rows, at_most("... over 100 that are no whole string", other, 0)]


def count_any(sources: list[Source]) -> list[Row]:
    """Annotations of parameters, results and fields, and how many of them say Any, or the name of a
    JSON object (moetool/data.py), whose values are anything too.
    """
    every, vague, named = 0, [], []
    for source in sources:
        for node in ast.walk(source.tree):
            note = None
            if isinstance(node, ast.arg | ast.AnnAssign):
                note = node.annotation
            elif isinstance(node, Function):
                note = node.returns
            if note is None:
                continue
            every += 1
            if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(note)):
                vague.append(source.at(node, ast.unparse(note)))
            elif any(isinstance(n, ast.Name) and n.id in JSON for n in ast.walk(note)):
                named.append(source.at(node, ast.unparse(note)))
    share, json = len(vague) / max(1, every), len(named) / max(1, every)
    return [
        Row("annotations with Any", share, "at most 4 %", share <= 0.04, tuple(vague), True),
        Row("... with a JSON object by name", json, "", True, tuple(named), True),
    ]


def count_expressions(sources: list[Source]) -> list[Row]:
    """Comprehensions with two `for`, conditional expressions inside one another, tuples of three
    or more returned without a name.
    """
    double, nested, tuples = [], [], []
    kinds = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, kinds) and len(node.generators) > 1:
                double.append(source.at(node))
            if isinstance(node, ast.IfExp) and any(
                isinstance(n, ast.IfExp) for n in (node.body, node.orelse, node.test)
            ):
                nested.append(source.at(node))
        for function in source.functions:
            if _returns_tuple(function):
                tuples.append(source.at(function, function.name))
    return [
        at_most("comprehensions with two for", double, 0),
        at_most("nested conditional expressions", nested, 0),
        at_most("functions that return three or more without a name", tuples, 0),
    ]


def _returns_tuple(function: Function) -> bool:
    """Whether a function gives back a tuple of three or more: by what it says, or by a literal.
    Tuples of any length (tuple[int, ...]) are lists, and keys for sorting are no result.
    """
    for node in ast.walk(function.returns) if function.returns else ():
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "tuple":
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            plain = not any(isinstance(e, ast.Constant) and e.value is ... for e in inner)
            if len(inner) > 2 and plain:
                return True
    if function.returns is not None and "..." in ast.unparse(function.returns):
        return False  # said to be a list
    return any(
        isinstance(node, ast.Return)
        and isinstance(node.value, ast.Tuple)
        and len(node.value.elts) > 2
        and not any(isinstance(e, ast.Starred) for e in node.value.elts)
        for node in _own(function)
    )


def _own(function: Function) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            stack.extend(ast.iter_child_nodes(node))


def count_names(sources: list[Source]) -> list[Row]:
    """Files that are too long, and classes that share a name."""
    long = [
        f"{s.name} {len(s.text.splitlines())}" for s in sources if len(s.text.splitlines()) > 400
    ]
    names = Counter(c.name for s in sources for c in s.tree.body if isinstance(c, ast.ClassDef))
    shared = [f"{name} {count}" for name, count in sorted(names.items()) if count > 1]
    return [
        at_most("files over 400 lines", long, 0),
        at_most("names that two classes share", shared, 0),
    ]
