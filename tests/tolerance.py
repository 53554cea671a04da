"""The tolerance rule of the project, spelled out: what a kernel's result may be, given the gold and the eager run.

*Gold* is the reference in float64 on inputs that were rounded to the working type. *Eager* is the cascade as written,
each result rounded to the working type. With u the unit roundoff of the result's type, a result passes if

* NaN, inf and -inf stand where gold, rounded to the result's type, has them;
* the largest error is at most 2 times eager's (3 for gradients) plus 2u times the largest magnitude of gold;
* the root mean square error is at most 1.1 times eager's for 16 bits, 3 times for f32, plus u times gold's;
* so is, per row along the last rank, 2 times (3 in f32) the larger of eager's row and eager's median row, exact ones
  aside, plus 2u times the row's;
* integers and truth values, and whatever is exact in integer-valued floats, are equal bit for bit.

To each of these bounds the smallest normal number of f32 is added: exponentials below it are 0 on a GPU.

Elements of gold within a few roundings of the overflow threshold may be finite or not. Where eager itself overflows,
only finiteness is judged: there is no error to compare with. `trial.agree` is the compiler's own statement of the rule;
this one shares no code with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade.errors import CallError, CascadeError
from cascade.interp import Precision, run
from cascade.ir import Cascade
from tests.kernel_programs import RECIPES, Program, Sizes, Tensors

NARROW = 2.0**-20  # unit roundoffs above this one are those of 16-bit types
FLUSHED = 2.0**-126  # what is smaller than any normal number of f32 may be 0 in kernels: hardware flushes it
BRINK = 8  # unit roundoffs around the overflow threshold in which a value may go either way


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule says: the clause that failed, "" for a pass; what was found and allowed; is it about rounding?"""

    clause: str = ""
    found: float = 0.0
    allowed: float = 0.0
    detail: str = ""

    rounding: bool = False

    @property
    def ok(self) -> bool:
        """Whether the result passes."""
        return not self.clause

    def __str__(self) -> str:
        if self.ok:
            return "passes"
        excess = f": {self.found:.3g}, allowed {self.allowed:.3g}" if self.found or self.allowed else ""
        return f"{self.clause}{excess}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True, slots=True)
class Standard:
    """What results are judged by: gold and eager, by name in declared order; whether every float is exact."""

    gold: Mapping[str, Tensor]
    eager: Mapping[str, Tensor]
    exact: bool = False


def standard(cascade: Cascade, inputs: Mapping[str, Tensor], sizes: Mapping[str, int], exact: bool = False) -> Standard:
    """Gold and eager of the cascade as written, on inputs that have the working type."""
    gold = run(cascade, inputs, sizes, Precision.REFERENCE)
    return Standard(gold, run(cascade, inputs, sizes, Precision.EAGER), exact)


def judge_all(ours: Tensor | Sequence[Tensor], by: Standard) -> Verdict:
    """The verdict on all results of a call, one tensor or a tuple in declared order: that on the first that fails."""
    results = [ours] if isinstance(ours, Tensor) else list(ours)
    if len(results) != len(by.gold):
        return Verdict("number of results", len(results), len(by.gold))
    for result, (name, gold) in zip(results, by.gold.items(), strict=True):
        verdict = judge(result, gold, by.eager[name], exact=by.exact)
        if not verdict.ok:
            return replace(verdict, clause=f"{name}: {verdict.clause}")
    return Verdict()


def judge(ours: Tensor, gold: Tensor, eager: Tensor, *, exact: bool = False, gradient: bool = False) -> Verdict:
    """The verdict on one result; `exact` asks for gold rounded once, `gradient` triples eager's largest error."""
    if ours.shape != gold.shape:
        return Verdict("shape", detail=f"{tuple(ours.shape)}, wanted {tuple(gold.shape)}")
    if ours.dtype != eager.dtype:
        return Verdict("type", detail=f"{ours.dtype}, wanted {eager.dtype}")
    if not ours.numel():
        return Verdict()
    if not ours.dtype.is_floating_point:
        return _equal(ours, gold, "integers differ")
    verdict = _same_strangers(ours, gold)
    if verdict.ok and exact:
        rounded = gold.to(ours.dtype)
        strange = ~rounded.isfinite() | ~ours.isfinite()
        verdict = _equal(ours.masked_fill(strange, 0), rounded.masked_fill(strange, 0), "exact values differ")
    return verdict if not verdict.ok else _within(ours, gold, eager, gradient)


def _equal(ours: Tensor, gold: Tensor, clause: str) -> Verdict:
    wrong = ours != gold.to(ours.dtype)
    return Verdict(clause, detail=_places(wrong, ours, gold)) if bool(wrong.any()) else Verdict()


def _same_strangers(ours: Tensor, gold: Tensor) -> Verdict:
    """Whether NaN, inf and -inf stand where gold has them."""
    rounded = gold.to(ours.dtype)
    limits = torch.finfo(ours.dtype)
    brink = gold.isfinite() & ((gold.abs() / limits.max - 1).abs() <= BRINK * limits.eps)
    same = (ours == rounded) | (ours.isnan() & rounded.isnan()) | (ours.isfinite() & rounded.isfinite())
    wrong = ~same & ~brink
    if not bool(wrong.any()):
        return Verdict()
    return Verdict("values that are not finite stand elsewhere", detail=_places(wrong, ours, gold))


def _places(wrong: Tensor, ours: Tensor, gold: Tensor) -> str:
    """How many elements are wrong, and the first of them."""
    place = tuple(wrong.nonzero()[0].tolist())
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()}, first at {list(place)}: {ours[place].item()}, gold {gold[place].item()}"


def _within(ours: Tensor, gold: Tensor, eager: Tensor, gradient: bool) -> Verdict:
    """The three clauses about errors."""
    unit = torch.finfo(ours.dtype).eps / 2
    ours, gold, eager = ours.double(), gold.double(), eager.double()
    known = ours.isfinite() & gold.isfinite() & eager.isfinite()
    error, plain, size = (data.masked_fill(~known, 0.0) for data in (ours - gold, eager - gold, gold))
    largest = float(error.abs().max())
    allowed = (3 if gradient else 2) * float(plain.abs().max()) + 2 * unit * float(size.abs().max()) + FLUSHED
    if largest > allowed:
        place = torch.unravel_index(error.abs().argmax(), error.shape)
        detail = f"at {[int(i) for i in place]}: {ours[place].item():.6g}, gold {gold[place].item():.6g}"
        return Verdict("largest error", largest, allowed, detail, rounding=True)
    whole, whole_plain, whole_size = (_rms(data.flatten()) for data in (error, plain, size))
    allowed = float((1.1 if unit > NARROW else 3.0) * whole_plain + unit * whole_size) + FLUSHED
    if float(whole) > allowed:
        return Verdict("root mean square error", float(whole), allowed, rounding=True)
    rows, rows_plain, rows_size = (
        _rms(data.reshape(-1, data.shape[-1] if data.dim() else 1)) for data in (error, plain, size)
    )
    inexact = rows_plain[rows_plain > 0]  # rows that are exactly right, as those without a key are, say nothing
    typical = inexact.median() if inexact.numel() else rows_plain.new_zeros(())
    factor = 2 if unit > NARROW else 3  # in f32 a row of a few elements is one draw of noise, eager's as well as ours
    bounds = factor * torch.maximum(rows_plain, typical) + 2 * unit * rows_size + FLUSHED
    worst = int((rows - bounds).argmax())
    if float(rows[worst]) > float(bounds[worst]):
        detail = f"row {worst} of {rows.numel()}"
        return Verdict("error of a row", float(rows[worst]), float(bounds[worst]), detail, rounding=True)
    return Verdict()


def _rms(data: Tensor) -> Tensor:
    """The root mean square along the last rank; scaled, so that no square overflows."""
    scale = data.abs().amax(-1, keepdim=True)
    scaled = data / torch.where(scale > 0, scale, 1.0)
    return scaled.square().mean(-1).sqrt() * scale.squeeze(-1)


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """While this holds, memory that torch hands out is full of NaN (integers: their maximum)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.utils.deterministic` fills unless told not to
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def stored(tensor: Tensor) -> Tensor:
    """All bytes of the memory behind a tensor, those around a view of it included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@dataclass(frozen=True, slots=True)
class Draw:
    """What a program is run on: sizes, recipe, working type, device, and how its inputs lie in memory."""

    program: Program
    sizes: Sizes
    recipe: str = "normal"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    laid: Callable[[Tensors], Tensors] = dict

    def inputs(self, seed: int) -> Tensors:
        """The tensors of one draw."""
        program, sizes = self.program, self.program.complete(self.sizes)
        return self.laid(RECIPES[self.recipe](program, sizes, seed, self.dtype, self.device))

    def given(self) -> dict[str, int]:
        """The sizes that a call passes by keyword."""
        return self.program.given(self.program.complete(self.sizes))


def verdict_on(call: Callable[..., Any], cascade: Cascade, draw: Draw, seed: int = 0) -> Verdict:
    """The verdict on `call` for one draw of inputs; where these have no meaning, a CascadeError is what passes.

    Inputs must come out as they went in, and every element of the results is written: memory is full of NaN before.
    """
    inputs, given = draw.inputs(seed), draw.given()
    try:
        by = standard(cascade, inputs, given, draw.program.exact and draw.recipe == "integers")
    except CallError as error:
        return _refused(call, inputs, given, error)
    before = {name: stored(tensor).clone() for name, tensor in inputs.items()}
    with filled_with_nan():
        ours = call(**inputs, **given)
    for name, tensor in inputs.items():
        if not torch.equal(stored(tensor), before[name]):
            return Verdict("an input was written", detail=name)
    return judge_all(ours, by)


def _refused(call: Callable[..., Any], inputs: Tensors, given: Sizes, reason: CallError) -> Verdict:
    try:
        call(**inputs, **given)
    except CascadeError:
        return Verdict()
    return Verdict("not refused", detail=str(reason).splitlines()[0])


def confirmed(call: Callable[..., Any], cascade: Cascade, draw: Draw, seed: int = 0) -> Verdict:
    """The verdict, where one about rounding is repeated on fresh draws: it fails if it does on six of them.

    The bounds compare one sample of rounding errors with another. On a few elements one draw says little; a wrong
    kernel is wrong on every draw.
    """
    verdict = verdict_on(call, cascade, draw, seed)
    for again in range(1, 6):
        if verdict.rounding:
            verdict = verdict_on(call, cascade, draw, seed + 1000 * again)
    return verdict
