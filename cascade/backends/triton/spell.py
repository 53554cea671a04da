"""How each operation is written in Triton: one row an operation, no decisions.

`{0}`, `{1}`, ... are the operands. A row that needs a helper function names it; `HELPERS` has its text. Where
something faster is exact enough for results of 16 bits, `FAST` has a row for it.
"""

from __future__ import annotations

import math

from dataclasses import dataclass

from cascade.ir import DType

TYPES = {
    DType.BF16: "tl.bfloat16", DType.F16: "tl.float16", DType.F32: "tl.float32", DType.F64: "tl.float64",
    DType.F8E4M3: "tl.float8e4nv", DType.F8E5M2: "tl.float8e5", DType.I8: "tl.int8", DType.I32: "tl.int32",
    DType.I64: "tl.int64", DType.BOOL: "tl.int1",
}  # fmt: skip

POINTERS = {
    DType.BF16: "bf16", DType.F16: "fp16", DType.F32: "fp32", DType.F64: "fp64", DType.F8E4M3: "fp8e4nv",
    DType.F8E5M2: "fp8e5", DType.I8: "i8", DType.I32: "i32", DType.I64: "i64", DType.BOOL: "i1",
}  # fmt: skip
"""Element types as Triton's signatures write them."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A template; `infix` ones bind as Python's operator of that name does and get parentheses where needed."""

    text: str
    infix: int = 0  # Python's precedence of the operator; 0: a call, or something in brackets of its own
    helper: str | None = None
    assembly: bool = False  # whether the helper has instructions that Triton's interpreter does not know
    scale: float = 0.0  # times which the operand is written; 0: as it is


COMPARE, OR, XOR, AND, SUM, PRODUCT, UNARY, ATOM = 1, 2, 3, 4, 5, 6, 7, 9

SPELLINGS: dict[str, Spelling] = {
    "or": Spelling("{0} | {1}", OR),
    "and": Spelling("{0} & {1}", AND),
    "not": Spelling("~{0}", UNARY),
    "eq": Spelling("{0} == {1}", COMPARE),
    "ne": Spelling("{0} != {1}", COMPARE),
    "lt": Spelling("{0} < {1}", COMPARE),
    "le": Spelling("{0} <= {1}", COMPARE),
    "gt": Spelling("{0} > {1}", COMPARE),
    "ge": Spelling("{0} >= {1}", COMPARE),
    "add": Spelling("{0} + {1}", SUM),
    "sub": Spelling("{0} - {1}", SUM),
    "mul": Spelling("{0} * {1}", PRODUCT),
    "div": Spelling("{0} / {1}", PRODUCT),
    "floordiv": Spelling("float_divide({0}, {1})", helper="float_divide"),
    "mod": Spelling("float_modulo({0}, {1})", helper="float_modulo"),
    "neg": Spelling("-{0}", UNARY),
    "exp": Spelling("exponential({0})", helper="exponential"),
    "exp2": Spelling("tl.exp2({0})"),
    "log": Spelling("tl.log({0})"),
    "log2": Spelling("tl.log2({0})"),
    "sqrt": Spelling("tl.sqrt_rn({0})"),
    "rsqrt": Spelling("tl.rsqrt({0})"),
    "abs": Spelling("tl.abs({0})"),
    "sign": Spelling("sign({0})", helper="sign"),
    "floor": Spelling("tl.floor({0})"),
    "round": Spelling("round_even({0})", helper="round_even"),
    "sin": Spelling("tl.sin({0})"),
    "cos": Spelling("tl.cos({0})"),
    "tanh": Spelling("tanh({0})", helper="tanh"),
    "sigmoid": Spelling("tl.sigmoid({0})"),
    "silu": Spelling("silu({0})", helper="silu"),
    "gelu": Spelling("gelu({0})", helper="gelu"),
    "relu": Spelling("tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)"),
    "erf": Spelling("tl.erf({0})"),
    "min": Spelling("tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "max": Spelling("tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "select": Spelling("tl.where({0}, {1}, {2})"),
    "clamp": Spelling("clamped({0}, {1}, {2})", helper="clamped"),
    "pow": Spelling("power({0}, {1})", helper="power"),
}  # `default` is lowered to a select and has no row

ONCE_ROUNDED = Spelling("quotient({0}, {1})", helper="quotient")
"""A division whose result is rounded once; the other one may be off by two units."""

BY_COMMON = Spelling("divided({0}, {1})", helper="divided")
"""The same where many are divided by one number."""

MANTISSA = {DType.BF16: 7, DType.F16: 10}
"""The bits behind the first of a float that an integer of as few bits can be put into."""

NATURAL = {"floordiv": Spelling("{0} // {1}", PRODUCT), "mod": Spelling("{0} % {1}", PRODUCT)}
"""The same of integers that are never negative."""

INTEGER: dict[str, str] = {"min": "tl.minimum({0}, {1})", "max": "tl.maximum({0}, {1})", "relu": "tl.maximum({0}, 0)",
                           "floordiv": "floor_divide({0}, {1})", "mod": "floor_modulo({0}, {1})"}  # fmt: skip
"""The rows that are written in another way on integers; the last two where an operand may be negative."""

FAST: dict[str, Spelling] = {
    "tanh": Spelling("tanh({0})", helper="tanh_approx", assembly=True),
    "sigmoid": Spelling("sigmoid_base_two({0})", helper="sigmoid_base_two", assembly=True, scale=-1.0 / math.log(2.0)),
    "gelu": Spelling("gelu({0})", helper="gelu_approx"),
}
"""Rows for results of 16 bits: tanh has a relative error of about 2^-11, the reciprocal of a sigmoid one of 2^-23, gelu
one of 2^-11 above -5.5; below, where it is nearly 0, it is off by less than 2^-34."""

ROUGH: dict[str, Spelling] = {"exp": Spelling("tl.exp({0})")}
"""Rows for kernels with products of 16 bits, whose rounding is larger: it is off by 2^-24 times its argument."""

HELPERS: dict[str, str] = {
    "sign": """@triton.jit
def sign(x):
    return tl.where(x == x, (x > 0).to(tl.float32) - (x < 0).to(tl.float32), x)
""",
    "quotient": """@triton.jit
def quotient(a, b):
    # what the hardware's division leaves over is divided again; nothing is left of what is not finite
    q = a / b
    rest = tl.fma(-q, b, a)
    return tl.where(rest == rest, q + rest / b, q)
""",
    "divided": """@triton.jit
def divided(a, b):
    # one over what many are divided by is found once, and multiplied with what the product leaves over as well
    inverse = 1.0 / b
    q = a * inverse
    rest = tl.fma(-q, b, a)
    return tl.where(rest == rest, q + rest * inverse, q)
""",
    "round_even": """@triton.jit
def round_even(x):
    # adding 1.5 * 2^23 leaves no bit behind the point: the hardware rounds, ties to even
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
""",
    "exponential": """@triton.jit
def exponential(x):
    # 2^n e^r: the hardware's 2^y of x * log2(e) would show the rounding of a large product
    shifted = tl.minimum(tl.maximum(x * 1.4426950408889634, -127.0), 127.0) + 12582912.0  # whole, n in the low bits
    n = shifted - 12582912.0
    r = x - n * 0.693145751953125 - n * 1.4286068202862268e-06  # ln(2) in parts: n times the first is exact
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.exp2(r * 1.4426950408889634) * power
""",
    "tanh": """@triton.jit
def tanh(x):
    size, s = tl.abs(x), x * x
    far = 1.0 - 2.0 / (exponential(2.0 * size) + 1.0)  # has the exponential's error below 1: there a polynomial
    p = 0.021499411 + s * (-0.0079652272 + s * (0.0023154755 + s * -0.00036252569))
    near = x + x * (s * (-0.33333299 + s * (0.13332411 + s * (-0.053884107 + s * p))))
    return tl.where(size < 1.0, near, tl.where(x < 0, -far, far))
""",
    "tanh_approx": """@triton.jit
def tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
""",
    "clamped": """@triton.jit
def clamped(x, low, high):
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
""",
    "sigmoid_base_two": """@triton.jit
def sigmoid_base_two(x):
    # 1 / (1 + 2^x): what x is made of takes up the factor -log2(e)
    d = 1.0 + tl.exp2(x)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
""",
    "silu": """@triton.jit
def silu(x):
    return x * tl.sigmoid(x)
""",
    "gelu": """@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
""",
    "gelu_approx": """@triton.jit
def gelu(x):
    # the normal distribution left of -|x|: the logarithm of it is nearly a parabola
    a = tl.abs(x)
    p = a * (-0.46817797 + a * (-0.045241214 + a * (0.0049889367 + a * -0.00024125593)))
    tail = tl.exp2(-1.0 + a * (-1.1476765 + p))
    return x * tl.where(x < 0, tail, 1.0 - tail)
""",
    "floor_divide": """@triton.jit
def floor_divide(a, b):
    return (a - floor_modulo(a, b)) // b
""",
    "floor_modulo": """@triton.jit
def floor_modulo(a, b):
    return (a % b + b) % b
""",
    "float_divide": """@triton.jit
def float_divide(a, b):
    return tl.floor((a - float_modulo(a, b)) / b + 0.5)
""",
    "float_modulo": """@triton.jit
def float_modulo(a, b):
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    "short_bf16": """@triton.jit
def short_bf16(x, low: tl.constexpr):
    # integers as the last bits of 128 to 255, which are taken off again: no conversion
    return ((x.to(tl.int32) - low).to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 - low)
""",
    "short_f16": """@triton.jit
def short_f16(x, low: tl.constexpr):
    # integers as the last bits of 1024 to 2047, which are taken off again: no conversion
    return ((x.to(tl.int32) - low).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 - low)
""",
    "larger": """@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "smaller": """@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "dot_present": """@triton.jit
def dot_present(a, b, live, c):
    # c + a @ b where a is 0 for what is absent: 0 * NaN is NaN, so what is not finite is added one by one
    finite = tl.abs(b.to(tl.float32)) < float("inf")
    c = tl.dot(a, tl.where(finite, b, 0.0), c, out_dtype=c.dtype)
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        number = tl.arange(0, b.shape[0])
        for j in range(b.shape[0]):
            row = tl.sum(tl.where((number == j)[:, None] & ~finite, b.to(tl.float32), 0.0), 0)
            column = tl.sum(tl.where((number == j)[None, :], a.to(tl.float32), 0.0), 1)
            here = tl.max(tl.where((number == j)[None, :], live.to(tl.int32), 0), 1) > 0
            c += tl.where(here[:, None] & (row != 0)[None, :], column[:, None] * row[None, :], 0.0)
    return c
""",
    "settled": """@triton.jit
def settled(x):
    # x itself. Triton 3.6 lays out what a product reads for the narrowest load that it is computed from, and has no
    # such layout for f64; behind a sum, be it of one element, it does not look
    return tl.sum(x[None], 0)
""",
    "halves": """@triton.jit
def halves(x):
    # the columns left and right of the middle
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
""",
    "ordered": """@triton.jit
def ordered(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)
""",
    "neighbours": """@triton.jit
def neighbours(x):
    # the even columns and the odd ones
    return x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
""",
    "largest": """@triton.jit
def largest(key, best, place, COUNT: tl.constexpr, LEAST: tl.constexpr):
    # eight neighbours are sorted by a network of 19 comparisons, within a thread; then the next largest of a row is
    # the first of some eight, and the others of that eight move up
    a, b = neighbours(key)
    a, c = neighbours(a)
    b, d = neighbours(b)
    a, e = neighbours(a)
    b, f = neighbours(b)
    c, g = neighbours(c)
    d, h = neighbours(d)
    a, b = ordered(a, b)
    c, d = ordered(c, d)
    e, f = ordered(e, f)
    g, h = ordered(g, h)
    a, c = ordered(a, c)
    b, d = ordered(b, d)
    e, g = ordered(e, g)
    f, h = ordered(f, h)
    b, c = ordered(b, c)
    f, g = ordered(f, g)
    a, e = ordered(a, e)
    d, h = ordered(d, h)
    b, f = ordered(b, f)
    c, g = ordered(c, g)
    b, e = ordered(b, e)
    d, g = ordered(d, g)
    c, e = ordered(c, e)
    d, f = ordered(d, f)
    d, e = ordered(d, e)
    for i in tl.static_range(COUNT):
        top = tl.max(a, 1)
        best = tl.where(place == i, top[:, None], best)
        taken = a == top[:, None]
        a = tl.where(taken, b, a)
        b = tl.where(taken, c, b)
        c = tl.where(taken, d, c)
        d = tl.where(taken, e, d)
        e = tl.where(taken, f, e)
        f = tl.where(taken, g, f)
        g = tl.where(taken, h, g)
        h = tl.where(taken, LEAST, h)
    return best
""",
    "composed": """@triton.jit
def composed(a, b, later_a, later_b):
    # two steps as one: s becomes a * s + b, then later_a * (a * s + b) + later_b
    return later_a * a, later_a * b + later_b
""",
    "drifted": """@triton.jit
def drifted(a, b, rest, later_a, later_b, later_rest):
    # two steps as one: s becomes s + (a * s + b), then the same with what is later; rest is what sums of b leave over
    moved = b + later_a * b
    total = moved + later_b
    added = total - moved
    left = (moved - (total - added)) + (later_b - added)
    return a + (later_a * a + later_a), total, rest + (later_a * rest + later_rest) + left
""",
    "power": """@triton.jit
def power(x, y):
    # in float64, so that no rounding is seen in float32; a negative number has real powers of whole numbers only
    zero = tl.zeros_like(x + y + 0.0)
    x, y = zero + x, zero + y
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    size = tl.abs(x)
    bits = tl.where(size == 1.0, 0.0, y.to(tl.float64) * tl.log2(size.to(tl.float64)))
    found = tl.where(y == 0.0, 1.0, tl.exp2(bits).to(tl.float32))
    found = tl.where((x < 0.0) & ~whole, float("nan"), found)
    return tl.where((x.to(tl.int32, bitcast=True) < 0) & odd, -found, found)
""",
    "to_bf16": """@triton.jit
def to_bf16(x):
    # Triton's interpreter cuts bits off, where the hardware rounds, ties to even
    x = x.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
""",
    "times": """@triton.jit
def times(a, b):
    return a * b
""",
}

NEEDS = {
    "floor_divide": ("floor_modulo",), "float_divide": ("float_modulo",), "tanh": ("exponential",),
    "largest": ("ordered", "neighbours"),
}  # fmt: skip
"""The helpers that a helper calls."""

PORTABLE = {
    "quotient": """if triton.knobs.runtime.interpret:  # whose division is exact, and whose fma rounds twice

    @triton.jit
    def quotient(a, b):
        return a / b
""",
    "divided": """if triton.knobs.runtime.interpret:  # as above

    @triton.jit
    def divided(a, b):
        return a / b
""",
    "tanh_approx": """if triton.knobs.runtime.interpret:  # the interpreter knows no assembly

    @triton.jit
    def tanh(x):
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
""",
    "sigmoid_base_two": """if triton.knobs.runtime.interpret:  # the interpreter knows no assembly

    @triton.jit
    def sigmoid_base_two(x):
        return 1.0 / (1.0 + tl.exp2(x))
""",
    "short_bf16": """if triton.knobs.runtime.interpret:  # whose floats of 16 bits have 32

    @triton.jit
    def short_bf16(x, low: tl.constexpr):
        return x.to(tl.bfloat16)
""",
}
"""What takes the place of a helper where a file runs in Triton's interpreter."""
