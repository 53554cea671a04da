"""Torch's positional style on traced values: dimensions by number, broadcasting, contraction, views.

    torch.softmax(x @ w, -1)   with x[I,J], w[J,K]   -->   softmax[k] (sum[j] x[i,j] * w[j,k])

A value carries its axes in torch's order, None for a dimension of extent 1, so that every operation here is index
notation underneath. A view (transposing, adding a dimension) moves nothing: it is the same value with other axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from cascade.frontend.forms import Applied, Fold, Literal, Loop, Ordered, Pointwise, Previous, Scan, SizeOf
from cascade.frontend.frames import fail
from cascade.frontend.notation import (
    Operand, RankVariable, Tensor, Value, at, axes_of, broadcast, copy_axis, free, new_axis, operand, pointwise,
    rename, renaming, same_extent, without,
)  # fmt: skip

Axis: TypeAlias = RankVariable | None
Axes: TypeAlias = tuple[Axis, ...]


def view(value: Operand, axes: Sequence[Axis]) -> Value:
    """The value with other axes over the same ranks."""
    return Value(Ordered(), (value,), ranks=tuple(axis for axis in axes if axis is not None), axes=tuple(axes))


def dimension(axes: Sequence[Axis], dim: object, extra: int = 0) -> int:
    """A dimension by number, counted from the end where negative, as an index."""
    count = len(axes) + extra
    if isinstance(dim, bool) or not isinstance(dim, int) or not -count <= dim < count:
        help = "dimensions count from 0, or from the end: -1"
        raise fail("C427", f"there is no dimension {dim!r} in a tensor of {len(axes)}", help)
    return dim % count


def dimensions(axes: Sequence[Axis], dim: object) -> list[int]:
    """One dimension, several, or all (None, or an empty list)."""
    items = list(dim) if isinstance(dim, tuple | list) else [] if dim is None else [dim]
    return sorted({dimension(axes, item) for item in items}) or list(range(len(axes)))


def left(axes: Sequence[Axis], dims: Iterable[int], keepdim: object) -> Axes:
    """The axes that a reduction leaves."""
    gone = set(dims)
    if keepdim:
        return tuple(None if i in gone else axis for i, axis in enumerate(axes))
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def reduce(form: str, x: object, dim: object = None, keepdim: object = False, *, library: bool = False) -> Value:
    """A reduction over dimensions by number."""
    value = operand(x)
    axes = axes_of(value)
    dims = dimensions(axes, dim)
    along = tuple(axis for i in dims if (axis := axes[i]) is not None)
    kept = left(axes, dims, keepdim)
    if not along:
        return view(value, kept)
    made = Applied(form, along) if library else Fold(form, along)
    return Value(made, (value,), ranks=without(free(value), along), axes=kept)


def along_dimensions(function: str, dims: Sequence[object], *objects: object) -> Value:
    """A function of the library that keeps the dimensions it works along, counted in its first operand."""
    operands, axes = broadcast([operand(o) for o in objects])
    along = tuple(axis for dim in dims if (axis := axes[dimension(axes, dim)]) is not None)
    if dims and not along:
        raise fail("C422", f"{function} works along a dimension of extent 1 here", "choose another dimension")
    return Value(Applied(function, along), operands, axes=axes)


def extent(axis: Axis) -> Value:
    """The extent of an axis, as an integer in expressions."""
    return Value(Literal(1)) if axis is None else Value(SizeOf(rank=axis))


# --- contraction -----------------------------------------------------------------------------------------------------


def contract(operands: Sequence[object], labels: Sequence[str], output: str) -> Value:
    """A product of tensors whose dimensions have letters, summed over the letters that the output does not have."""
    values = [operand(o) for o in operands]
    axis_of: dict[str, Axis] = {}
    renamed: list[Operand] = []
    for value, letters in zip(values, labels, strict=True):
        axes = axes_of(value)
        for letter, axis in zip(letters, axes, strict=True):
            axis_of[letter] = _shared(axis_of, letter, axis)
    for value, letters in zip(values, labels, strict=True):
        renamed.append(rename(value, renaming(axes_of(value), [axis_of[letter] for letter in letters])))
    product = renamed[0]
    for factor in renamed[1:]:
        product = Value(Pointwise("mul"), (product, factor))
    kept = tuple(axis_of[letter] for letter in output)
    summed = tuple(a for c, a in axis_of.items() if c not in output and a is not None)
    if not summed:
        return view(product, kept)
    return Value(Fold("sum", summed), (product,), ranks=without(free(product), summed), axes=kept)


def _shared(known: Mapping[str, Axis], letter: str, axis: Axis) -> Axis:
    """The axis of a letter, the first that is longer than 1, and a copy of it where another letter has it already."""
    if (before := known.get(letter)) is not None:
        if axis is not None:
            same_extent(before, axis, f"{letter!r} of the product")
        return before
    if axis is None:
        return None
    if not axis.named and letter.islower():
        return RankVariable(letter, axis.size, example=axis.example)
    taken = {other.key for other in known.values() if other is not None}
    return copy_axis(axis) if axis.key in taken else axis


def matmul(a: object, b: object) -> Value:
    """`a @ b`, with torch's rules for vectors and batches."""
    shapes = [len(axes_of(operand(o))) for o in (a, b)]
    if 0 in shapes:
        raise fail("C427", "a scalar has no matrix product", "multiply with *")
    upper = "ABCDEFGHI"  # letters for dimensions that have no names: lower case ones would become their names
    batch = [upper[: max(0, count - 2)] for count in shapes]
    longest = max(batch, key=len)
    batch = [longest[len(longest) - len(letters) :] for letters in batch]
    first = batch[0] + ("MK" if shapes[0] > 1 else "K")
    second = batch[1] + ("KN" if shapes[1] > 1 else "K")
    output = longest + ("M" if shapes[0] > 1 else "") + ("N" if shapes[1] > 1 else "")
    return contract((a, b), (first, second), output)


def einsum(equation: str, operands: Sequence[object]) -> Value:
    """`torch.einsum`; the letters of the equation become the names of the ranks."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    if not all(letters.isalpha() for letters in labels if letters) or len(set(output)) != len(output):
        help = "one letter a dimension, no ellipsis, no letter twice in the output"
        raise fail("C427", f"this equation of einsum is not supported: {equation}", help)
    counts = [len(axes_of(operand(o))) for o in operands]
    if counts != [len(letters) for letters in labels]:
        help = f"the tensors have {', '.join(map(str, counts))} dimensions"
        raise fail("C427", f"the equation of einsum does not fit its tensors: {equation}", help)
    if unknown := sorted(set(output) - set(inputs)):
        raise fail(
            "C427",
            f"einsum's output has {unknown[0]!r}, which no input has: {equation}",
            "letters of the output stand in an input",
        )
    return contract(operands, labels, output)


# --- views -----------------------------------------------------------------------------------------------------------


def permute(x: object, order: Sequence[object]) -> Value:
    value = operand(x)
    axes = axes_of(value)
    dims = [dimension(axes, dim) for dim in order]
    if sorted(dims) != list(range(len(axes))):
        raise fail("C427", f"{tuple(order)} is no order of {len(axes)} dimensions", "name every dimension once")
    return view(value, [axes[dim] for dim in dims])


def transpose(x: object, first: object, second: object) -> Value:
    axes = axes_of(operand(x))
    order = list(range(len(axes)))
    i, j = dimension(axes, first), dimension(axes, second)
    order[i], order[j] = j, i
    return permute(x, order)


def unsqueeze(x: object, dim: object) -> Value:
    value = operand(x)
    axes = list(axes_of(value))
    axes.insert(dimension(axes, dim, extra=1), None)
    return view(value, axes)


def squeeze(x: object, dim: object = None) -> Value:
    value = operand(x)
    axes = axes_of(value)
    dims = dimensions(axes, dim)
    return view(value, [axis for i, axis in enumerate(axes) if axis is not None or i not in dims])


def subscript(value: Value, items: Sequence[object]) -> Value:
    """`x[:, None]`, `x[..., 0]`, `x[ids]`: full slices, new dimensions, single elements, and a tensor that indexes."""
    given = sum(item is not None and item is not Ellipsis for item in items)
    if sum(item is Ellipsis for item in items) == 0:
        items = [*items, Ellipsis]
    axes = iter(axes_of(value))
    missing = len(axes_of(value)) - given
    if missing < 0:
        raise fail("C404", f"{given} indices for a tensor of {given + missing} dimensions", "at most one a dimension")
    kept: list[Axis] = []
    chosen: dict[int, Operand] = {}
    for item in items:
        if item is None:
            kept.append(None)
        elif item is Ellipsis:
            kept.extend(next(axes) for _ in range(missing))
        elif isinstance(item, slice):
            if not (item.start is None and item.stop is None and item.step is None):
                help = "keep part of a rank by a predicate, x[t, d].where(t < 4), or shift it, x[t + 1, d]"
                raise fail("C427", "a slice that drops elements has no form in the language", help)
            kept.append(next(axes))
        else:
            kept.extend(_select(next(axes), item, chosen))
    if not chosen:
        return view(value, kept)
    read = at(value, value.ranks, [chosen.get(rank.key, rank) for rank in value.ranks])
    return view(read, kept)


def _select(axis: Axis, item: object, chosen: dict[int, Operand]) -> Axes:
    """One element of an axis, or those that a tensor lists; gives the axes that stand in its place."""
    if isinstance(item, int) and not isinstance(item, bool):
        if axis is not None:
            chosen[axis.key] = Value(Literal(item)) if item >= 0 else extent(axis) - -item
        return ()
    index = operand(item)
    if axis is not None:
        chosen[axis.key] = index
    return axes_of(index)


def gather_rows(table: object, index: object) -> Value:
    """`table[index]`: the rows of a table that an integer tensor lists."""
    value = operand(table)
    if not isinstance(value, Value):
        raise fail("C427", "a coordinate is no table", "F.embedding(ids, table)")
    return subscript(value, [index])


def repeat_interleave(x: object, repeats: object, dim: object) -> Value:
    """Every element of a dimension `repeats` times in a row: K[b, h // 4, n, e]."""
    value = operand(x)
    axes = list(axes_of(value))
    i = dimension(axes, dim)
    axis = axes[i]
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not isinstance(value, Value):
        raise fail("C427", "repeat_interleave needs a number of repeats", "k.repeat_interleave(4, dim=1)")
    if axis is None:
        raise fail("C422", "repeat_interleave repeats a dimension of extent 1 here", "broadcasting does the same")
    if axis.example is None:
        raise fail("C427", "repeat_interleave needs the extent of its dimension", "give example shapes as numbers")
    longer = new_axis(axis.example * repeats, axis.example * repeats)
    axes[i] = longer
    new: list[Operand] = [longer // repeats if rank is axis else rank for rank in value.ranks]
    return view(at(value, value.ranks, new, [(axis, axis.example)]), axes)


def reshape(x: object, shape: Sequence[object]) -> Value:
    """Dimensions split into parts of given sizes, or merged; the sizes become numbers of the cascade."""
    value = operand(x)
    axes = axes_of(value)
    sizes = [1 if axis is None else axis.example for axis in axes]
    known = [size for size in sizes if size is not None]
    wanted = [_number(item) for item in shape]
    if len(known) != len(sizes) or not isinstance(value, Value) or None in wanted or wanted.count(-1) > 1:
        raise fail("C427", "this reshape needs sizes that are known while tracing", "give numbers, and example shapes")
    numbers = [size for size in wanted if size is not None]
    total = math.prod(known)
    rest = math.prod(size for size in numbers if size != -1)
    numbers = [total // rest if size == -1 and rest else size for size in numbers]
    if math.prod(numbers) != total:
        raise fail("C412", f"{known} cannot be reshaped to {numbers}", "the products of the sizes are equal")
    index: dict[int, Operand] = {}
    new: list[Axis] = []
    for old_part, new_part in _groups(list(zip(axes, known, strict=True)), numbers):
        new.extend(_regroup(old_part, new_part, index))
    if not index:
        return view(value, new)
    moved = [index.get(rank.key, rank) for rank in value.ranks]
    relied = [(rank, size) for rank in value.ranks if rank.key in index and (size := rank.example) is not None]
    return view(at(value, value.ranks, moved, relied), new)


def _number(item: object) -> int | None:
    """A size in a shape: a number, or an extent of which an example is known."""
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    match item:
        case Value(form=Literal(value=int() as number)):
            return number
        case Value(form=SizeOf(rank=RankVariable(example=example))):
            return example
        case Value(form=SizeOf(tensor=Tensor(sizes=tuple() as sizes), position=i)):
            return size if isinstance(size := sizes[i], int) else None
        case Value(form=Pointwise(op=op), operands=(a, b)) if (x := _number(a)) is not None and (y := _number(b)):
            return {"mul": x * y, "floordiv": x // y, "add": x + y, "sub": x - y}.get(op)
    return None


def _groups(old: list[tuple[Axis, int]], new: list[int]) -> Iterable[tuple[list[tuple[Axis, int]], list[int]]]:
    """The shortest runs of old and new dimensions of equal size."""
    while old or new:
        a, b = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while (x := math.prod(size for _, size in a)) != (y := math.prod(b)):
            if x < y:
                a.append(old.pop(0))
            else:
                b.append(new.pop(0))
        yield a, b


def _regroup(old: list[tuple[Axis, int]], new: list[int], index: dict[int, Operand]) -> Axes:
    """New axes for a run of dimensions, and where each old one is found in them."""
    long_old, long_new = [(a, n) for a, n in old if a is not None], [n for n in new if n != 1]
    if len(long_old) == 1 == len(long_new):
        return tuple(None if size == 1 else long_old[0][0] for size in new)
    axes: list[Axis] = [None if size == 1 else new_axis(size, size) for size in new]
    flat: Operand = Value(Literal(0))
    long_axes = [axis for axis in axes if axis is not None]
    for position, axis in enumerate(long_axes):
        flat = axis if position == 0 else flat * long_new[position] + axis
    stride = 1
    for place, (rank, size) in enumerate(reversed(long_old)):
        assert rank is not None
        found: Operand = flat if stride == 1 else flat // stride
        index[rank.key] = found % size if place < len(long_old) - 1 else found
        stride *= size
    return tuple(axes)


# --- along a dimension -----------------------------------------------------------------------------------------------


def triangle(x: object, lower: bool, diagonal: object = 0) -> Value:
    """`tril` and `triu`: zero above, or below, a diagonal of the last two dimensions."""
    value = operand(x)
    axes = axes_of(value)
    row, column = axes[-2:] if len(axes) > 1 else (None, None)
    if row is None or column is None:
        help = "x.tril() of a matrix; the sizes come from the example shapes"
        raise fail("C422", "a triangle needs two dimensions longer than 1", help)
    test = (column - row <= diagonal) if lower else (column - row >= diagonal)
    return pointwise("select", view(test, (row, column)), value, 0)


def cumulative(op: str, start: object, x: object, dim: object) -> Value:
    """A running fold along a dimension, as an iterative statement."""
    value = operand(x)
    axes = axes_of(value)
    axis = axes[dimension(axes, dim)]
    if axis is None:
        return view(value, axes)
    order = tuple(rank for rank in axes if rank is not None)
    loop = Loop(axis, order)
    previous = Value(Previous(loop), ranks=order, axes=axes)
    body = Value(Pointwise(op), (previous, value), ranks=order, axes=axes)
    loop.value = Value(Scan(loop, 1, False), (body, operand(start)), ranks=order, axes=axes)
    return loop.value
