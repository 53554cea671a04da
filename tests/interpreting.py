"""Triton's interpreter without what it does again and again: its kernels run as before, several times sooner.

It replaces the language for each launch, and once more for each function that a kernel calls; it makes the same types,
shapes and tables of types for every operation; and it tests integers for overflow by seven operations of its own
language. Here the language is replaced once a launch, by what was found at the first; what is made of equal parts is
made once; and the test is two comparisons. Every operation of a kernel is still executed.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import numpy as np

WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def hasten() -> None:
    """Puts all of it in place, once for a process that interprets kernels."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    replace_language_once(interpreter, language)
    make_types_once(interpreter, language.core)
    ask_less_of_equals(interpreter, language.core)
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = functools.partial(refuse_overflow, interpreter)


class Replaced:
    """The language as the interpreter has it, from a launch to its end; functions that a kernel calls find it so."""

    def __init__(self, interpreter: types.ModuleType, language: types.ModuleType) -> None:
        scope = type(self).found(interpreter, language)
        firsts = {(id(place), name): old for place, name, old in reversed(scope._changes)}
        self.members = [
            (place, name, firsts[id(place), name], getattr(place, name))
            for place, name in {(id(place), name): (place, name) for place, name, _ in scope._changes}.values()
        ]
        scope.restore()
        self.missing = interpreter._MISSING
        self.depth = 0
        self.inner = interpreter._LangPatchScope()

    @staticmethod
    def found(interpreter: types.ModuleType, language: types.ModuleType) -> Any:
        """What the interpreter itself replaces for a kernel that sees all of the language."""
        seen = {"tl": language, "core": language.core}
        return interpreter._patch_lang(types.SimpleNamespace(__globals__=seen))

    def enter(self) -> Any:
        """The language replaced; what takes it back is `restore`, where this is not inside another launch."""
        if self.depth:
            return self.inner  # empty: taken back by the launch
        self.depth = 1
        for place, name, _, new in self.members:
            setattr(place, name, new)
        return self

    def restore(self) -> None:
        """The language as it was."""
        self.depth = 0
        for place, name, old, _ in self.members:
            if old is self.missing:
                delattr(place, name)
            else:
                setattr(place, name, old)


def replace_language_once(interpreter: types.ModuleType, language: types.ModuleType) -> None:
    """A launch replaces the language by what was found for the first; the functions that it calls need not."""
    semantic = interpreter.interpreter_semantic

    def patch_attr(place: object, name: str, member: Any, builder: object, scope: Any) -> None:
        called = getattr(member, "__wrapped__", member)  # around it, Triton asks only whether `_semantic` is given

        def replaced(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return called(*args, **kwargs)

        scope.set_attr(place, name, replaced)

    interpreter._patch_attr = patch_attr
    replaced = Replaced(interpreter, language)
    interpreter._patch_lang = lambda fn: replaced.enter()


def make_types_once(interpreter: types.ModuleType, core: types.ModuleType) -> None:
    """Types of numpy by types of Triton, types of tiles, and the shapes that a tile carries: made once each."""
    by_name: dict[str, np.dtype[Any]] = {}
    slow_type, slow_block = interpreter._get_np_dtype, core.block_type.__init__

    def numpy_type(kind: Any) -> np.dtype[Any]:
        scalar = kind.scalar
        if type(scalar) is not core.dtype:
            return slow_type(kind)
        if scalar.name not in by_name:
            by_name[scalar.name] = slow_type(scalar)
        return by_name[scalar.name]

    @functools.cache
    def attributes(element: str, shape: tuple[int, ...]) -> dict[str, Any]:
        made = core.block_type.__new__(core.block_type)
        slow_block(made, core.dtype(element), list(shape))
        return vars(made)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not core.dtype:
            slow_block(self, element_ty, shape)
            return
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        vars(self).update(attributes(element_ty.name, sizes))
        self.element_ty = element_ty

    @functools.cache
    def carried(shape: tuple[int, ...]) -> tuple[Any, Any]:
        numel = 1
        for size in shape:
            numel *= size
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(numel)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = carried(tuple(type.shape.values) if type.is_block() else ())

    interpreter._get_np_dtype = numpy_type
    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def ask_less_of_equals(interpreter: types.ModuleType, core: types.ModuleType) -> None:
    """Operands of one type and shape meet as they are; a number that meets a tile becomes one tile for all times.

    In which type two others meet is found once for each pair of types.
    """
    semantic, slow_unwrap, slow_equal = interpreter.interpreter_semantic, core._unwrap_if_constexpr, core.dtype.__eq__
    check, broadcast, cast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, semantic.cast
    together = semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)

    def both(
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if type(lhs) is core.tensor and type(lhs.dtype) is core.dtype:
            kind = lhs.dtype
            if type(rhs) is core.tensor and rhs.dtype is kind and not (div_or_mod and kind.is_floating()):
                return shaped(lhs, rhs)
            if (
                type(rhs) in (int, float)
                and together(kind, False, semantic.to_tensor_type(rhs), True, div_or_mod) is kind
            ):
                return lhs, number(repr(rhs), type(rhs), kind, sizes(lhs))
        elif type(lhs) in (int, float) and type(rhs) is core.tensor and type(rhs.dtype) is core.dtype:
            kind = rhs.dtype
            if together(semantic.to_tensor_type(lhs), True, kind, False, div_or_mod) is kind:
                return number(repr(lhs), type(lhs), kind, sizes(rhs)), rhs
        return check(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def sizes(value: Any) -> tuple[int, ...] | None:
        return value.handle.data.shape if value.type.is_block() else None

    @functools.lru_cache(4096)
    def number(text: str, python: type, kind: Any, shape: tuple[int, ...] | None) -> Any:
        made = semantic._cast_to_computation_type(python(text), kind)
        if shape is not None:
            made = spread(made, shape)
        made.handle.data.flags.writeable = False  # many share it
        return made

    def spread(scalar: Any, shape: tuple[int, ...]) -> Any:
        data = np.empty(shape, scalar.handle.data.dtype)
        data[...] = scalar.handle.data
        return core.tensor(interpreter.TensorHandle(data, scalar.dtype), core.block_type(scalar.dtype, list(shape)))

    def shaped(lhs: Any, rhs: Any) -> Any:
        left, right = sizes(lhs), sizes(rhs)
        if left == right:
            return lhs, rhs
        if left is None or right is None:
            return (lhs, spread(rhs, left)) if left is not None else (spread(lhs, right or ()), rhs)
        return broadcast(lhs, rhs)

    def converted(value: Any, kind: Any, rounding: str | None = None) -> Any:
        return value if value.dtype is kind.scalar else cast(value, kind, rounding)

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, semantic.cast = both, shaped, converted
    core._unwrap_if_constexpr = lambda value: value if type(value) is core.tensor else slow_unwrap(value)
    core.dtype.__eq__ = lambda self, other: self is other or slow_equal(self, other)


def refuse_overflow(interpreter: types.ModuleType, lhs: Any, rhs: Any, operation: Any) -> None:
    """The test that a sum, difference or product of integers fits their type, as Triton states it."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not interpreter.interpreter_builder.options.sanitize_overflow:
        return
    assert kind == rhs.type.scalar and kind.is_int(), f"operands of types {kind} and {rhs.type.scalar}"
    wide = WIDE[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if wide.min() < kind.get_int_min_value() or wide.max() > kind.get_int_max_value():
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")
