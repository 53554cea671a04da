"""Which lines of a kernel belong to which statement: by the names that lines assign, which are those of the cascade.

    R_next = tl.maximum(R, R_1 * 0.127)        R      what becomes of R
    q = Q_desc.load([b, h, m_first, 0])        Q      a tile of Q
    O_desc.store([b, h, m_first, 0], ...)      O

Kernels are read as text, by `ast`; nothing of them is run. A name that no statement or tensor has, with what is
appended to it taken off again, belongs to none: coordinates, bounds of loops, tests. Functions that go by another name
than the kernel's are helpers, which know nothing of the cascade.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator


def line_names(text: str, kernel: str, known: Collection[str]) -> dict[int, tuple[str, ...]]:
    """The names, of those that are known, that each line of a kernel is about; lines count from 1."""
    found: dict[int, dict[str, None]] = {}
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    own = [node for node in functions if node.name == kernel or node.name.startswith(f"{kernel}_")]
    for node in (node for function in own for node in ast.walk(function)):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Return):
            continue
        names = [name for word in _words(node) if (name := owner(word, known)) is not None]
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            found.setdefault(line, {}).update(dict.fromkeys(names))
    return {line: tuple(names) for line, names in sorted(found.items()) if names}


def owner(word: str, known: Collection[str]) -> str | None:
    """The name of the cascade that a variable of a kernel belongs to: `R_next` to R, a tile `q` to Q; None for none."""
    stem = word
    while stem:
        if stem in known:
            return stem
        stem = stem.rpartition("_")[0]
    tiles = [name for name in known if name.lower() == word.rpartition("_")[0].lower() or name.lower() == word]
    return tiles[0] if len(tiles) == 1 else None


def _words(node: ast.stmt) -> Iterator[str]:
    """The variables that a line gives a value; of a store the tensor."""
    match node:
        case ast.Assign():
            yield from (one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name))
        case ast.AugAssign(target=ast.Name(id=name)):
            yield name
        case ast.Return(value=value) if value is not None:
            yield from (one.id for one in ast.walk(value) if isinstance(one, ast.Name))
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=base), attr=what), args=arguments)):
            if what == "store" and base != "tl":
                yield base
            elif what in ("store", "atomic_add") and arguments:
                yield from (one.id for one in ast.walk(arguments[0]) if isinstance(one, ast.Name))
        case _:
            pass
