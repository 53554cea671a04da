"""Kernels run: plans by kind of call, sources made into functions, arguments put together, launched.

What a call may differ in without planning again is nothing but the addresses of its tensors; what it may differ in
without compiling again is every extent that no tile holds whole, as long as tiles fit or do not fit as they did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import linecache
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError, TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from cascade import __version__, interp
from cascade.backends.placing import place_of
from cascade.backends.share import at_most
from cascade.backends.triton.ahead import Wanted, compile_beside
from cascade.backends.triton.apart import elsewhere, parts
from cascade.backends.triton.emit import Argument, Source, emit, permutation
from cascade.backends.triton.joined import Joined
from cascade.backends.triton.library import Multiplied, multiplied
from cascade.backends.triton.machine import Machine, machine_for
from cascade.backends.triton.explain import Launch, describe
from cascade.backends.triton.partition import Group, Rest, power_of_two, reduced_ranks
from cascade.backends.triton.plan import Blocks, Dot, Kernel, every_op
from cascade.backends.triton.plan import Tensor as PlannedTensor
from cascade.backends.triton.planner import Layout, Planner, Tiling, contiguous, gaps
from cascade.backends.triton.relaunch import Relaunch, relaunch
from cascade.backends.triton.restate import restated
from cascade.backends.triton.rows import BLOCKS, SORTED
from cascade.backends.triton.updates import Update, update_of
from cascade.backends.triton.tune import Choice, Shortlist, Timer, shortlist, timed
from cascade.errors import Diagnostic, UnsupportedError
from cascade.inference import bind_sizes, infer_dtypes, infer_shapes
from cascade.ir import Cascade, DType
from cascade.settings import settings
from cascade.values import FROM_TORCH, TORCH_TYPES, Precision

Groups: TypeAlias = Sequence[Group | Rest]


INTERPRETED = 4  # multiprocessors that the interpreter stands for: fewer than most grids have tiles
SETTLED = 1  # different values of a shape symbol up to which each may have a kernel that is made for it
ROOM = 32  # times an extent that changes, to a power of two: up to there the kernels serve that are made for it
ROOM_ALONG = 8  # the same where something is reduced along it: tiles that are too wide cost more there
ALIGNED = 16  # elements: what Triton asks strides for
LONG = 4096  # extent that one is supposed to reach along which something is reduced: a stream loses little by that
MANY = 4  # tilings that cannot be launched, from which on a line says what takes so long
SILENT = 1.0  # seconds of tuning, after which it is said what takes so long
NOWHERE = torch.device("meta")  # where tensors have a shape and no memory
TOLD = 200  # characters of the compiler's words in an error


@functools.cache
def driver() -> threading.Thread:
    """Has Triton make ready what is the same for all kernels, once and beside planning.

    That is what it talks to the device with, in C where its cache is empty, and the digest of its own files, which
    goes into the name of whatever it compiles.
    """

    def build() -> None:
        with contextlib.suppress(Exception):  # whoever launches is told
            digest = threading.Thread(target=triton.runtime.cache.triton_key, daemon=True)
            digest.start()
            triton.runtime.driver.active.get_current_device()
            digest.join()

    thread = threading.Thread(target=build if torch.cuda.is_available() and not interpreted() else None, daemon=True)
    thread.start()
    return thread


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device."""
    return device.type == "cuda" or interpreted()


@dataclass(slots=True, eq=False)
class Launcher:
    """A cascade that has been through the pipeline, as kernels; plans are kept by kind of call."""

    cascade: Cascade
    effort: str = "none"
    source: Cascade | None = None  # as it was written: what passes made of it may have finer types
    in_place: Mapping[str, str] = field(default_factory=dict)  # results that take the memory of a parameter
    plans: dict[Any, CallPlan | None] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)  # by kernel, of the last plan
    refused: dict[str, set[Tiling]] = field(default_factory=dict)  # by kernel: what cannot be launched
    failed: dict[str, set[Tiling]] = field(default_factory=dict)  # by kernel: what could not be when it was timed
    extents: dict[str, set[int]] = field(default_factory=dict)  # that calls had, by shape symbol
    tilings: dict[Any, Tiling] = field(default_factory=dict)  # by what a choice depends on
    assumed: dict[str, list[int]] = field(default_factory=dict)  # by shape symbol: extents that kernels were made for
    copied: dict[str, str] = field(default_factory=dict)  # results that are computed apart and copied: why
    reduced: frozenset[str] = field(init=False)  # the shape symbols of ranks along which something is reduced

    def __post_init__(self) -> None:
        sizes = infer_shapes(self.cascade).ranks
        found = (sizes[rank] for stmt in self.cascade.body for rank in reduced_ranks(stmt))
        self.reduced = frozenset(size for size in found if isinstance(size, str))
        driver()

    def __call__(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...] | None:
        """The results for these tensors, all of them on one device that kernels run on.

        None where a rank has no coordinates: nothing is launched then.
        """
        key = kind(inputs, sizes)
        while True:
            try:
                if key not in self.plans:
                    self.plans[key] = self.plan(inputs, sizes)
                plan = self.plans[key]
                return None if plan is None else plan(inputs)
            except Unlaunched as error:
                self.refuse(error)
                self.plans.pop(key, None)

    def explain(self) -> str:
        """What the kind of call that was planned last runs: kernels with their tiles, and why these."""
        if self.last is None:
            return ""
        told = [f"{n} is computed apart and copied into {self.in_place[n]}: {why}\n" for n, why in self.copied.items()]
        return "".join(told) + describe(*self.ran())

    @property
    def last(self) -> CallPlan | None:
        """The plan of the kind of call that was planned last; None where nothing was launched."""
        return next((plan for plan in reversed(self.plans.values()) if plan is not None), None)

    def ran(self) -> list[Launch | Rest]:
        """What that call runs, in order, views left out."""
        steps = () if self.last is None else self.last.steps
        shown = (step for step in steps if isinstance(step, RestStep | KernelStep | LibraryStep))
        return [step.group if isinstance(step, RestStep) else self.launch(step) for step in shown]

    @property
    def machine(self) -> Machine | None:
        """What is known of the GPU on which that call ran; None in Triton's interpreter."""
        device = None if self.last is None else self.last.device
        return machine_of(device) if device is not None and device.type == "cuda" else None

    def launch(self, step: KernelStep | LibraryStep) -> Launch:
        """A kernel with why it has its tiles."""
        return Launch(step.kernel, step.extents, self.choices.get(step.kernel.name))

    def sources(self) -> dict[str, str]:
        """The text of every kernel of the kind of call that was planned last."""
        steps = () if self.last is None else self.last.steps
        return {step.source.kernel: step.source.text for step in steps if isinstance(step, KernelStep)}

    def direct(
        self, inputs: Mapping[str, Tensor], names: Sequence[str]
    ) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What a call with tensors of this kind runs, given in the order of `names`; None where nothing was planned."""
        plan = self.plans.get(kind(inputs, {}))
        if plan is None or any(isinstance(step, RestStep) for step in plan.steps):
            return None
        return lambda tensors: plan(dict(zip(names, tensors, strict=True)))

    def refuse(self, error: Unlaunched) -> None:
        """Remembers that a kernel needs other tiles; UnsupportedError where there are none that were not tried."""
        name = error.kernel.name
        choice, known = self.choices.get(name), self.refused.setdefault(name, set())
        tried = known | self.failed.get(name, set())
        if choice is None or choice.tiling in tried:
            raise UnsupportedError(unlaunchable(error, max(len(tried), 1))) from None
        known.add(choice.tiling)
        if len(known) >= MANY:
            sys.stderr.write(f"cascade: {name} could not be launched with {len(known)} tilings; trying others\n")

    def plan(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> CallPlan | None:
        """What a call with such tensors runs; None where some extent is 0."""
        extents = bind_sizes(self.cascade, {name: tuple(t.shape) for name, t in inputs.items()}, sizes)
        if 0 in extents.values() or any(0 in t.shape for t in inputs.values()):
            return None
        layouts = {name: layout(tensor) for name, tensor in inputs.items()}
        planner = self.planner(extents, layouts, has_descriptors(inputs))
        device = next((t.device for t in inputs.values()), torch.device("cpu" if interpreted() else "cuda"))
        results = tuple(result.name for result in self.cascade.results)
        tensors = dict(inputs) | {result: inputs[update.of] for result, update in planner.updates.items()}
        bench = None if interpreted() else Bench(device, self.effort, tensors, results)
        steps: list[Step] = []
        for step in self.steps(planner, self.cascade.name, bench):
            if step in steps:  # rows that another kernel has in the same order
                continue
            steps.append(step)
            if bench is not None:
                bench.advance(step)
        if bench is not None and bench.effort == "none":
            bench.compile(bench.wanted(steps, bench.tensors))
        copied = {result: self.in_place[result] for result in self.copied}
        return CallPlan(results, tuple(steps), device, self.in_place, copied)

    def planner(self, extents: Mapping[str, int], layouts: Mapping[str, Layout], descriptors: bool) -> Planner:
        """The planner of a call, which knows what earlier calls had otherwise.

        An extent is not supposed to be larger where a tile of a product holds its rank whole: it is a number there.
        """
        moving = self.moving(extents)
        dtypes = {name: layout.dtype for name, layout in layouts.items()}
        apart = {name: gaps(layout) for name, layout in layouts.items()}
        cascade = typed(self.cascade, self.source, dtypes)

        def supposing(symbols: Collection[str]) -> tuple[Planner, Joined]:
            supposed = {symbol: self.supposed(symbol, extents[symbol]) for symbol in sorted(symbols)}
            certain = {symbol: extent for symbol, extent in extents.items() if symbol not in supposed}
            found = restated(cascade, {**extents, **supposed}, dtypes, certain, apart, extents)
            joined, updates = found.joined, self.updates(found.cascade)
            sizes = {**joined.extents(extents), **supposed}
            return Planner(
                found.cascade, joined.extents(extents), layouts, descriptors, joined.with_parts(moving),
                {s: n for s, n in joined.extents(sizes).items() if s in joined.with_parts(symbols)},
                why=found.why, views=joined.views, updates=updates, joined=joined.sizes, in_order=found.in_order,
            ), joined  # fmt: skip

        larger, changing = frozenset[str](), moving
        planner, joined = supposing(larger)
        while (changing := changing - joined.parts(planner.numbers_of_kernels())) != larger:
            larger = changing  # a plan for larger extents may have others as numbers
            planner, joined = supposing(larger)
        return planner

    def updates(self, cascade: Cascade) -> dict[str, Update]:
        """What is written of results that take the memory of a parameter; why it is all of some is remembered."""
        found = {result: update_of(cascade, result, param) for result, param in self.in_place.items()}
        self.copied = {result: update for result, update in found.items() if isinstance(update, str)}
        return {result: update for result, update in found.items() if isinstance(update, Update)}

    def moving(self, extents: Mapping[str, int]) -> frozenset[str]:
        """The shape symbols that change from call to call: kernels then hold for all their values."""
        for symbol, extent in extents.items():
            self.extents.setdefault(symbol, set()).add(extent)
        return frozenset(symbol for symbol, seen in self.extents.items() if len(seen) > SETTLED)

    def supposed(self, symbol: str, extent: int) -> int:
        """What is planned for where an extent changes: one that it does not exceed, the same for many calls.

        Not for far fewer coordinates, unless they are a stream: tiles of a product would be nearly empty.
        """
        known = self.assumed.setdefault(symbol, [])
        reduced = symbol in self.reduced
        fits = [each for each in known if extent <= each and (reduced or each <= extent * ROOM * ROOM)]
        if not fits:
            most = power_of_two(extent)
            fits = [max(LONG, ROOM_ALONG * most) if reduced else ROOM * most]
            known.extend(fits)
        return min(fits)

    def steps(self, planner: Planner, name: str, bench: Bench | None) -> Iterator[Step]:
        """What computes a cascade, in order."""
        groups = planner.groups()
        labels = [name if len(groups) == 1 else f"{name}_{number}" for number in range(len(groups))]
        if bench is not None and bench.effort != "none":
            self.look_ahead(planner, labels, groups, bench)
        for label, group in zip(labels, groups, strict=True):
            if isinstance(group, Rest):
                yield outside(planner, group)
                continue
            try:
                tiling = self.tiling(planner, label, group, groups, bench)
                known = None if bench is None else bench.built.pop((label, tiling), None)
                made = tuple(self.built(planner, label, group, groups, tiling, bench)) if known is None else known
            except UnsupportedError as error:
                made = (outside(planner, Rest(group.plain, error.diagnostics[0].message)),)
            yield from made

    def look_ahead(self, planner: Planner, labels: Sequence[str], groups: Groups, bench: Bench) -> None:
        """Compiles what is about to be timed, beside each other: what that is, is known before any of it runs."""
        tensors, wanted = dict(bench.tensors), list[Wanted]()
        for label, group in zip(labels, groups, strict=True):
            if isinstance(group, Group):
                for tiling in self.considered(planner, label, group, groups, bench):
                    with contextlib.suppress(UnsupportedError):
                        found = bench.built[label, tiling] = tuple(
                            self.built(planner, label, group, groups, tiling, bench)
                        )
                        wanted += bench.wanted(found, tensors)
            elif group.names[0] in planner.views:
                bench.wanted([outside(planner, group)], tensors)
            for name in planner.stored(group, groups):
                lies = place(planner.written(name, groups), planner)
                tensors.setdefault(name, allocated(name, *lies, NOWHERE, bench.results))
        bench.compile(wanted)

    def considered(
        self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench
    ) -> tuple[Tiling, ...]:
        """The tilings of a kernel of which one will be chosen, or has been."""
        known = self.tilings.get(self.bucket(planner, label, group))
        if known is not None:
            return (known,)
        try:
            found = bench.shortlists[label] = self.shortlist(planner, label, group, groups, bench)
        except UnsupportedError:
            return ()
        if isinstance(found, Choice):
            self.choices[label] = found
            return (found.tiling,)
        return tuple(one.tiling for one in found.few)

    def built(
        self, planner: Planner, label: str, group: Group, groups: Groups, tiling: Tiling, bench: Bench | None
    ) -> Iterator[Step]:
        """The kernel of a group; a stream that is shared takes a kernel more, which merges."""
        by_model = None if bench is None else dataclasses.replace(bench, effort="none")
        if tiling.apart:
            yield from self.in_parts(planner, label, group, groups, tiling, by_model)
            return
        shared, tiling = None, planner.in_more_parts(group, tiling)
        if tiling.shared:
            with contextlib.suppress(UnsupportedError):  # then one program has the whole stream
                shared = planner.split(label, group, groups, tiling)
        if shared is not None:
            kernel, merger, _ = shared
            yield from self.before(planner, kernel, label, groups, by_model)
            made = tuple((item.tensor.name, *place(item.tensor, merger)) for item in kernel.partial)
            yield KernelStep(kernel, emit(kernel, portable=interpreted()), merger.extents, made)
            yield from self.steps(merger, f"{label}_merge", by_model)
            return
        kernel = planner.kernel(label, group, groups, dataclasses.replace(tiling, parts=1))
        yield from self.before(planner, kernel, label, groups, by_model)
        stored = (name for name in planner.stored(group, groups) if name not in planner.updates)
        tensors = (planner.written(name, groups) for name in stored)
        made = tuple((tensor.name, *place(tensor, planner)) for tensor in tensors)
        if tiling.library and (product := multiplied(planner, group, groups)) is not None:
            yield LibraryStep(kernel, product, planner.extents, made)
            return
        extents = {**planner.extents, **planner.padded(kernel.rows)}
        yield KernelStep(kernel, emit(kernel, portable=interpreted()), extents, made)

    def in_parts(
        self, planner: Planner, label: str, group: Group, groups: Groups, tiling: Tiling, bench: Bench | None
    ) -> Iterator[Step]:
        """Several kernels in the place of one, some of them a library's."""
        for one in parts(planner, label, group, groups, tiling.apart):
            if one.product is None:
                own = self.tiling(one.planner, one.label, one.group, one.groups, bench)
            else:
                own = one.tiling
                if bench is not None:
                    self.choices[one.label] = one.choice(bench.machine, self.choices.get(label))
            yield from self.built(one.planner, one.label, one.group, one.groups, own, bench)

    def before(
        self, planner: Planner, kernel: Kernel, label: str, groups: Groups, bench: Bench | None
    ) -> Iterator[Step]:
        """What a kernel needs computed first: bounds of its loops that depend on data, the order of its rows."""
        if kernel.rows is not None:
            sort = SortStep(kernel.rows.index.name, planner.number(kernel.rows.values))
            yield sort
            yield TableStep(sort, kernel.rows, planner.padded(kernel.rows)[kernel.rows.symbol])
        if kernel.index is not None:
            yield from self.steps(planner.indexer(kernel.index, groups), f"{label}_bounds", bench)

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        """The tiles of a group's kernel: the planner's own in the interpreter, else by the model or by timing."""
        if bench is None:
            return planner.default_tiling(group)
        bucket = self.bucket(planner, label, group)
        if bucket not in self.tilings:
            self.tilings[bucket] = self.chosen(planner, label, group, groups, bench)
        return self.tilings[bucket]

    def bucket(self, planner: Planner, label: str, group: Group) -> tuple[object, ...]:
        """What the choice of a kernel's tiles depends on."""
        return (label, self.refused_of(label), *planner.bucket(group))

    def refused_of(self, label: str) -> frozenset[Tiling]:
        """The tilings of a kernel that could not be launched."""
        return frozenset(self.refused.get(label, ()))

    def chosen(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench) -> Tiling:
        """The tiles by the model or by timing: once for all extents of about the same size."""
        results, failed = planner.stored(group, groups), self.failed.setdefault(label, set())

        def steps(tiling: Tiling) -> Sequence[Step]:
            known = bench.built.pop((label, tiling), None)
            return tuple(self.built(planner, label, group, groups, tiling, bench)) if known is None else known

        found = bench.shortlists.pop(label, None) or self.shortlist(planner, label, group, groups, bench)
        timer = bench.timer(label, steps, results, failed)
        self.choices[label] = found if isinstance(found, Choice) else timed(found, timer)
        return self.choices[label].tiling

    def shortlist(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench) -> Shortlist | Choice:
        """What is to be timed of a kernel; the choice where nothing is."""
        return shortlist(
            planner, label, group, groups, bench.machine, bench.effort, settings().cache_dir / "tuned",
            (triton.__version__, __version__), self.refused_of(label) | self.failed.get(label, set()),
            elsewhere(planner, label, group, groups, bench.machine),
        )  # fmt: skip


def typed(cascade: Cascade, source: Cascade | None, inputs: Mapping[str, DType]) -> Cascade:
    """The cascade with results of the types that they have in the `source`, as it was written."""
    if source is None:
        return cascade
    wanted, found = infer_dtypes(source, inputs), infer_dtypes(cascade, inputs)
    changed = {r.name: wanted[r.name] for r in cascade.results if wanted[r.name] is not found[r.name]}
    if not changed:
        return cascade
    results = (dataclasses.replace(r, dtype=changed.get(r.name, r.dtype)) for r in cascade.results)
    return dataclasses.replace(cascade, results=tuple(results))


def kind(inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[object, ...]:
    """What a plan depends on of the tensors and sizes of a call."""
    tensors = ((t.shape, t.stride(), t.dtype, t.data_ptr() & 15, t.device) for t in inputs.values())
    return (*tensors, *sizes.items())


def place(tensor: PlannedTensor, planner: Planner) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and type of a tensor that a kernel writes."""
    return tuple(planner.number(size) for size in tensor.shape), TORCH_TYPES[tensor.dtype]


def layout(tensor: Tensor) -> Layout:
    """Where a tensor lies."""
    return Layout(tuple(tensor.shape), tensor.stride(), FROM_TORCH[tensor.dtype], tensor.data_ptr() % 16 == 0)


def has_descriptors(inputs: Mapping[str, Tensor]) -> bool:
    """Whether the device copies boxes by descriptor: from compute capability 9.0 on, and the interpreter."""
    devices = {tensor.device for tensor in inputs.values() if tensor.is_cuda}
    return all(torch.cuda.get_device_capability(device) >= (9, 0) for device in devices)


@dataclass(slots=True, eq=False)
class CallPlan:
    """The steps of one kind of call, and the names of its results."""

    results: tuple[str, ...]
    steps: tuple[Step, ...]
    device: torch.device
    in_place: Mapping[str, str] = field(default_factory=dict)  # results that take the memory of a parameter
    copied: Mapping[str, str] = field(default_factory=dict)  # of these, which are computed apart before

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs every step in order on the current stream."""
        tensors = dict(inputs)
        device = self.device
        for result, param in self.in_place.items():
            tensors[result] = inputs[param]
        for step in self.steps:
            for name, shape, dtype in step.made:
                place = place_of(name, (shape, dtype, contiguous(shape))) if name in self.results else None
                tensors[name] = allocated(name, shape, dtype, device, self.results) if place is None else place
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.run(tensors)
        else:
            self.run(tensors)
        for result, param in self.copied.items():
            inputs[param].copy_(tensors[result])
            tensors[result] = inputs[param]
        return tuple(tensors[name] for name in self.results)

    def run(self, tensors: dict[str, Tensor]) -> None:
        for step in self.steps:
            step(tensors)


def allocated(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, results: Collection[str]
) -> Tensor:
    """A tensor that a kernel writes. Its strides are part of every launch: it lies the same wherever it is made.

    Results are contiguous. Of a tensor between kernels rows begin at multiples of 16 elements, whatever its extents:
    Triton compiles anew where a stride is such a multiple and was none before.
    """
    if name in results or len(shape) < 2 or shape[-1] == 1 or not shape[-1] % ALIGNED:
        return torch.empty(shape, dtype=dtype, device=device)  # of rows of one element kernels know the stride
    row = -(-shape[-1] // ALIGNED) * ALIGNED
    return torch.empty((*shape[:-1], row), dtype=dtype, device=device)[..., : shape[-1]]


@dataclass(slots=True, eq=False)
class RestStep:
    """Statements that no kernel computes, run by the interpreter on whole tensors.

    `part` is them as a cascade, with the statements before them that it has to run again.
    """

    group: Rest
    part: Cascade
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        given = {param.name: tensors[param.name] for param in self.part.params}
        tensors.update(interp.run(self.part, given, {}, Precision.COMPUTE))


@dataclass(slots=True, eq=False)
class ViewStep:
    """A tensor in another shape, which is no work unless rows between kernels have gaps; a result has none.

    Of a tensor that is `given` it is the same memory, with the gaps that are elsewhere.
    """

    name: str
    of: str
    shape: tuple[int, ...]
    given: bool
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        of = tensors[self.of]
        tensors[self.name] = of.view(self.shape) if self.given else of.reshape(self.shape).contiguous()


def outside(planner: Planner, group: Rest) -> RestStep | ViewStep:
    """The step that runs statements outside kernels."""
    if group.names[0] in planner.views:
        name, of = planner.view(group)
        return ViewStep(name, of, planner.numbers(name), planner.same_memory(of)[0] in planner.layouts)
    return RestStep(group, planner.outside(group))


@dataclass(slots=True, eq=False)
class KernelStep:
    """One launch: the arguments that stay, and the tensors that each call puts in."""

    kernel: Kernel
    source: Source
    extents: Mapping[str, int]
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # what it writes: name, shape, type
    function: Any = field(init=False)
    grid: tuple[int, int, int] = field(init=False)
    again: Relaunch | None = None  # launches after the first

    def __post_init__(self) -> None:
        self.function = getattr(module(self.source.text, self.source.kernel), self.source.kernel)
        count = 1
        for extent, tile in self.source.grid:
            count *= -(-self.number(extent) // tile)
        self.grid = (count, 1, 1)

    def number(self, extent: str | int) -> int:
        return extent if isinstance(extent, int) else self.extents[extent]

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launches on the current stream of the current device."""
        if self.again is None:
            self.first(tensors)
        else:
            self.again(tensors, torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))

    def first(self, tensors: Mapping[str, Tensor]) -> None:
        """The first launch compiles, and finds what will be the same in every later one: all but addresses."""
        arguments, options = self.arguments(tensors)
        driver().join()
        try:
            compiled = self.function[self.grid](*arguments, **options)
        except (OutOfResources, PTXASError, RuntimeError) as error:
            if not refused(error):
                raise
            raise Unlaunched(self.kernel, error) from error
        if not interpreted():
            kinds = enumerate(self.source.arguments)
            names = {position: one.tensor for position, one in kinds if one.kind in ("pointer", "descriptor")}
            self.again = relaunch(compiled, self.grid, arguments, names)

    def arguments(self, tensors: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, int]]:
        """What the kernel is called with, and Triton's options; a kernel whose programs stay has its grid then."""
        found: list[Any] = []
        for argument in self.source.arguments:
            if argument.kind in ("pointer", "descriptor"):
                tensor = tensors[argument.tensor]
                found.append(tensor if argument.kind == "pointer" else descriptor(tensor, argument.box))
            else:
                found.append(self.fixed(argument, tensors))
        if self.source.resident:
            device = next(iter(tensors.values())).device
            self.grid = (min(self.grid[0], self.source.resident * multiprocessors(device)), 1, 1)
        fused = {"enable_fp_fusion": True}  # as up to Triton 3.9, which warns where nobody says so
        return found, {"num_warps": self.source.num_warps, "num_stages": self.source.num_stages, **fused}

    def fixed(self, argument: Argument, tensors: Mapping[str, Tensor]) -> int:
        """What is the same in every call of this kind."""
        if argument.kind == "size":
            return self.extents[argument.symbol]
        if argument.kind == "stride":
            return tensors[argument.tensor].stride(argument.position)
        return argument.value


@dataclass(frozen=True, slots=True)
class LibraryStep:
    """A product that PyTorch's library multiplies, in the place of the kernel that it would have."""

    kernel: Kernel
    product: Multiplied
    extents: Mapping[str, int]
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        left, right = (tensors[side.name].permute(side.dims) for side in (self.product.left, self.product.right))
        multiply = torch.bmm if left.dim() == 3 else torch.mm
        with torch.no_grad():
            multiply(left, right, out=tensors[self.product.result])


@dataclass(frozen=True, slots=True)
class SortStep:
    """The values of an index in order, and which rows have them; kernels of all tiles share it."""

    index: str
    values: int
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()

    @property
    def names(self) -> tuple[str, str]:
        """The values in order and their rows; no tensor of a cascade is called so."""
        return f"{self.index} in order", f"{self.index} by row"

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        sort = module(SORTED, "sorted_rows").sorted_rows
        tensors.update(zip(self.names, sort(tensors[self.index], self.values), strict=True))


@dataclass(frozen=True, slots=True)
class TableStep:
    """Which rows and which value each tile of a kernel has: one launch, and the host waits for nothing."""

    sort: SortStep
    blocks: Blocks
    padded: int

    @property
    def made(self) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
        """The tables."""
        shapes = ((self.padded,), (self.padded // self.blocks.tile,), (2,))
        return tuple((name, shape, torch.int32) for name, shape in zip(self.blocks.tables, shapes, strict=True))

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        given = [tensors[name] for name in (*self.sort.names, *self.blocks.tables)]
        module(BLOCKS, "rows_by_value").tiles_of_rows(*given, self.sort.values, self.blocks.tile)


Step: TypeAlias = "KernelStep | LibraryStep | RestStep | ViewStep | SortStep | TableStep"


class Unlaunched(RuntimeError):
    """A kernel could not be launched with the tiles that it has."""

    def __init__(self, kernel: Kernel, error: Exception) -> None:
        self.kernel = kernel
        super().__init__(f"{kernel.name} cannot be launched: {error}")


def refused(error: Exception) -> bool:
    """Whether a kernel could not be launched with its tiles: no room for them, or a pass of the compiler fails.

    Triton 3.6 gives two layouts to the operands of a comparison in some kernels, and says so as below.
    """
    return isinstance(error, (OutOfResources, PTXASError)) or "PassManager::run failed" in str(error)


def unlaunchable(error: Unlaunched, tried: int) -> Diagnostic:
    """What is told of a kernel that no tiles can be launched of, and what would work."""
    words = next(iter(str(error.__cause__).splitlines()), "")
    message = f"kernel {error.kernel.name} cannot be launched with any of {tried} tilings: {words[:TOLD]}"
    help = (
        'backend="interp" computes it without kernels, slowly; '
        f"another version of Triton may compile it, here it is {triton.__version__}"
    )
    if any(isinstance(op, Dot) and op.exact for op in every_op(error.kernel.ops)):
        help += "; results declared with 16 bits, as `-> O: bf16[...]`, keep products of 16-bit tensors out of f64"
    return Diagnostic("C532", message, help=help)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has, or the interpreter stands for, of which kernels may count on all."""
    if device.type != "cuda":
        return at_most(INTERPRETED)
    return at_most(int(torch.cuda.get_device_properties(device).multi_processor_count))


def descriptor(tensor: Tensor, box: Sequence[int]) -> TensorDescriptor:
    """The descriptor of a tensor for boxes of this extent, dimensions in the order that the kernel expects."""
    order = permutation(box)
    shape, strides = tensor.shape, tensor.stride()
    inner = tensor.element_size()
    steps = [strides[d] if tensor.shape[d] > 1 or d == order[-1] else max(16 // inner, 1) for d in order]
    return TensorDescriptor(tensor, [shape[d] for d in order], steps, [box[d] for d in order])


# --- timing ----------------------------------------------------------------------------------------------------------

LAUNCHES = 10  # that are timed of each candidate
AHEAD = 4  # times the cache is swept for each launch to be timed: a slow host has enqueued it by then
LONGEST = 100.0  # milliseconds of one launch, from which on fewer are timed
LOOSE = 0.02  # difference from the first candidate's results, against their size: tiles round differently


@dataclass(slots=True, eq=False)
class Bench:
    """A device on which candidates are timed, and the tensors that kernels find there."""

    device: torch.device
    effort: str
    tensors: dict[str, Tensor]
    results: tuple[str, ...] = ()  # of the call
    shortlists: dict[str, Shortlist | Choice] = field(default_factory=dict)  # by kernel: what is to be timed
    built: dict[tuple[str, Tiling], tuple[Step, ...]] = field(default_factory=dict)  # and the steps of that

    def __post_init__(self) -> None:
        if self.effort != "none" and torch.cuda.is_current_stream_capturing():
            self.effort = "none"  # what is captured may not wait for the device

    @property
    def machine(self) -> Machine:
        """What is known of the device."""
        return machine_of(self.device)

    def unset(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that lies as it does in a call, in which it shows what was never written."""
        made = allocated(name, shape, dtype, self.device, self.results)
        return made.copy_(unset(shape, dtype, self.device))

    def advance(self, step: Step) -> None:
        """Runs a step where there may be something to time, so that later ones find what it makes."""
        if self.effort != "none":
            with torch.cuda.device(self.device):
                self.tensors |= {item[0]: self.unset(*item) for item in step.made}
                step(self.tensors)

    def wanted(self, steps: Iterable[Step], tensors: dict[str, Tensor]) -> list[Wanted]:
        """The launches of steps, with tensors that lie as theirs will; what they make is added to those there are."""
        found: list[Wanted] = []
        for step in steps:
            for item in step.made:
                tensors[item[0]] = allocated(*item, NOWHERE, self.results)
            with contextlib.suppress(KeyError):  # what no kernel makes, which another step reads
                if isinstance(step, ViewStep):
                    step(tensors)
                if isinstance(step, KernelStep) and step.again is None:
                    found.append(Wanted(step.function, step.grid, *step.arguments(tensors)))
        return found

    def compile(self, wanted: Sequence[Wanted]) -> None:
        """Compiles what launches want, where there are several and no graph is captured."""
        if len(wanted) < 2 or torch.cuda.is_current_stream_capturing():
            return
        told = threading.Timer(SILENT, sys.stderr.write, (f"cascade: compiling {len(wanted)} kernels\n",))
        if self.effort != "none":
            told.start()
        try:
            driver().join()
            with torch.cuda.device(self.device):
                compile_beside(wanted)
        finally:
            told.cancel()

    def timer(
        self, label: str, build: Callable[[Tiling], Sequence[Step]], results: Sequence[str], failed: set[Tiling]
    ) -> Timer:
        """Times the kernels of a tiling; None of one that cannot run or gives other results than the first did.

        What cannot be launched is added to those that `failed`: nobody compiles it again.
        """
        first: dict[str, Tensor] = {}
        began, tried = time.monotonic(), 0

        def timed(tiling: Tiling) -> float | None:
            nonlocal tried
            tried += 1
            if time.monotonic() - began > SILENT:
                sys.stderr.write(f"cascade: timing kernel {label}, candidate {tried}\n")
            try:
                with torch.cuda.device(self.device):
                    found, made = self.measured(build(tiling), results)
            except torch.AcceleratorError:
                raise  # the device is lost, for whatever comes as well
            except Unlaunched:
                failed.add(tiling)
                return None
            except (TritonError, triton.CompilationError, UnsupportedError, RuntimeError):
                return None
            if not first:
                first.update(made)
            return found if all(alike(made[name], first[name]) for name in results) else None

        return timed

    def measured(self, steps: Sequence[Step], results: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        """The median milliseconds of these steps, and their results, in tensors that held NaN before.

        Before each launch other memory goes through the cache: a program's other tensors do that, and what reads few
        bytes would be chosen for how it reads the cache. The device is busy with it while the launch is under way.
        """
        made = [item for step in steps for item in step.made]
        tensors = self.tensors | {item[0]: self.unset(*item) for item in made}
        for step in steps:
            step(tensors)  # compiles
        found = {name: tensors[name].clone() for name in results}
        times: list[float] = []
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        other = torch.empty(2 * cache, dtype=torch.uint8, device=self.device)
        for number in range(2 + LAUNCHES):
            for _ in range(AHEAD * len(steps)):
                other.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for step in steps:
                step(tensors)
            stop.record()
            stop.synchronize()
            if number >= 2 or start.elapsed_time(stop) > LONGEST:
                times.append(start.elapsed_time(stop))
            if sum(times) > 3 * LONGEST:
                break
        return statistics.median(times), found


def machine_of(device: torch.device) -> Machine:
    """What is known of a GPU that is there."""
    return machine_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def unset(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in which it shows what was never written: NaN, or the least integer."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), device=device).to(dtype)
    return torch.full(shape, 0 if dtype is torch.bool else torch.iinfo(dtype).min, dtype=dtype, device=device)


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ in nothing but rounding; of integers, which may turn on it, one in a hundred may."""
    if not found.dtype.is_floating_point:
        return bool((found != wanted).float().mean() <= 0.01) if found.numel() else True
    a, b = found.double(), wanted.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return False
    difference, size = (a - b)[finite].norm(), b[finite].norm()
    return bool(difference <= LOOSE * size + 1e-30)


MODULES: dict[str, types.ModuleType] = {}


def module(text: str, kernel: str) -> types.ModuleType:
    """The text of a kernel as a module; the same text is made into one only once."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if digest not in MODULES:
        name = f"cascade_kernel_{kernel}_{digest}"
        file = f"<{name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        made = types.ModuleType(name)
        made.__file__ = file
        exec(compile(text, file, "exec"), made.__dict__)
        MODULES[digest] = made
    return MODULES[digest]
