"""Kernels as programs of their own: files that import torch and Triton, launch a kernel and check it.

    rows.py         the text of the kernel, `run(X)`, and under `__main__` a check against plain torch
    block_0.py ...  where there are several kernels, one each; block.py calls them in order and checks the whole

What was planned for some sizes runs for others as well, as far as nothing of them was compiled in: `run` says what was
with a `ValueError`. Pure text: neither torch nor Triton is imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade.backends.triton.emit import Argument, Source, emit, wrapped
from cascade.backends.triton.offline import Request
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.plan import Axis, Kernel, Role
from cascade.backends.triton.machine import MACHINES
from cascade.backends.triton.planner import Layout, Planner, Tiling
from cascade.backends.triton.tune import candidates, ranked
from cascade.backends.triton.reference import TORCH, Lines, interval, python_names, reference_lines
from cascade.backends.triton.spell import HELPERS
from cascade.backends.triton.static import request
from cascade.errors import Diagnostic, UnsupportedError, quoted_list
from cascade.inference import FLOATS, declared_sizes, infer_shapes
from cascade.ir import Cascade, DType, Rank, Read, Size
from cascade.text import render
from cascade.walk import expressions, free_ranks, targets, walk

LONG, WHOLE, FEW = 4096, 128, (2, 4)  # extents that nobody gave: of long ranks, of one whole in a tile, of batches
GUESS = 256  # the extent of every rank when it is asked how the ranks lie
MOST = 2**28  # elements of a tensor that default sizes lead to: the check is to run at once
TOLERANCE = {DType.F8E4M3: 2.0**-1, DType.F8E5M2: 1.0, DType.BF16: 2.0**-5, DType.F16: 2.0**-8}  # eight roundings
FINEST = 1e-4  # the tolerance from float32 on

TAKEN = (
    "torch", "triton", "tl", "math", "TensorDescriptor", "run", "reference", "main", "accept", "descriptor",
    "largest_error", "sizes", "grid", "device", "tensor", "there", "body", "ordered", "key", "name", "ours", "wanted",
    "error", "wrong", "zip", "print", "int", "min", "programs", "ValueError", "SystemExit",
)  # fmt: skip
"""What a file itself calls things; a tensor, rank or symbol of that name is written with a line behind it."""

ACCEPT = '''
def accept(name, tensor, dtype, shape, units, sizes):
    """Learns the sizes of a tensor; ValueError where it is not what the kernel was compiled for."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, compiled for {dtype}")
    if tensor.dim() != len(shape):
        raise ValueError(f"{name} has {tensor.dim()} dimensions, compiled for {len(shape)}")
    for d, (size, extent) in enumerate(zip(shape, tensor.shape)):
        known = sizes.setdefault(size, extent) if isinstance(size, str) else size
        if extent != known or extent == 0:
            what = f"where {size} is {known}" if isinstance(size, str) else f"compiled for {known}"
            raise ValueError(f"{name} has extent {extent} in dimension {d}, {what if extent else 'nothing to compute'}")
        if d in units and extent > 1 and tensor.stride(d) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(d)} in dimension {d}, compiled for 1")
'''

DESCRIPTOR = '''
def descriptor(name, tensor, block):
    """The TMA descriptor of a tensor for such blocks; dimensions of one coordinate stand in front."""
    order = sorted(range(len(block)), key=lambda d: block[d] > 1)
    unit = 16 // tensor.element_size()  # strides are multiples of 16 bytes
    strides = [tensor.stride(d) if tensor.shape[d] > 1 or d == order[-1] else unit for d in order]
    if tensor.data_ptr() % 16 or any(stride % unit for stride in strides[:-1]):
        raise ValueError(f"{name} does not lie on multiples of 16 bytes, as its descriptor needs: strides {strides}")
    return TensorDescriptor(tensor, [tensor.shape[d] for d in order], strides, [block[d] for d in order])
'''

LARGEST_ERROR = '''
def largest_error(ours, wanted):
    """The largest error, in parts of the element or, where that is more, of the root mean square of its row."""
    if not ours.is_floating_point():
        return float((ours != wanted).any())
    ours, wanted = ours.double(), wanted.double()
    finite = wanted.where(wanted.isfinite(), 0)
    scale = finite.abs().maximum(finite.square().mean(-1, keepdim=True).sqrt())
    same = (ours == wanted) | (ours.isnan() & wanted.isnan())
    error = ((ours - wanted).abs() / scale).masked_fill(same, 0)
    return float(error.nan_to_num(nan=math.inf).max())
'''


@dataclass(frozen=True, slots=True)
class Emitted:
    """One kernel: the name of its file, its plan, its text, and what the offline compiler is asked."""

    file: str
    kernel: Kernel
    grid: dict[str, int]  # programs along each rank
    request: Request


@dataclass(frozen=True, slots=True)
class Emission:
    """The files, by name, and the kernels in them."""

    files: dict[str, str]
    kernels: tuple[Emitted, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is emitted: the cascade in canonical form and after the pipeline, sizes, types of the parameters.

    `highest` has the largest value of each integer parameter that indexes or is compared with a rank.
    """

    canonical: Cascade
    final: Cascade
    sizes: Mapping[str, int]
    types: Mapping[str, DType]
    highest: Mapping[str, int]

    def layouts(self, sizes: Mapping[str, int]) -> dict[str, Layout]:
        """The parameters, contiguous, at some sizes."""
        return {p.name: contiguous([_number(s, sizes) for s in p.shape], self.types[p.name]) for p in self.final.params}


def standalone(subject: Subject, descriptors: bool = True) -> Emission:
    """The files of a cascade; with `descriptors` for a device that has TMA.

    Raises `UnsupportedError` where statements run outside kernels.
    """
    planner = _Alone(subject.final, subject.sizes, subject.layouts(subject.sizes), descriptors)
    groups = planner.groups()
    refuse_rest(groups)
    return _Writer(subject, planner, groups).emission()


def refuse_rest(groups: Sequence[Group | Rest]) -> None:
    """Statements that run outside kernels have no file."""
    found = [outside(group, group.reason) for group in groups if isinstance(group, Rest)]
    if found:
        raise UnsupportedError(found)


def outside(group: Group | Rest, reason: str) -> Diagnostic:
    """What is told of statements that would run outside kernels."""
    message = f"{quoted_list(group.names)} would run outside kernels: {reason}"
    hint = "only what kernels compute can be emitted; call the compiled cascade instead"
    return Diagnostic("C531", message, group.statements[0].span, hint)


def contiguous(shape: Sequence[int], dtype: DType) -> Layout:
    """The layout of a tensor in row-major order on an aligned base."""
    strides = [1] * len(shape)
    for position in range(len(shape) - 2, -1, -1):
        strides[position] = strides[position + 1] * max(shape[position + 1], 1)
    return Layout(tuple(shape), tuple(strides), dtype, True)


def _number(size: Size, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[size]


# --- sizes -----------------------------------------------------------------------------------------------------------


def default_sizes(final: Cascade, types: Mapping[str, DType], given: Mapping[str, int]) -> dict[str, int]:
    """A size for every shape symbol: the given one, else by how its ranks lie in the kernels.

    In kernels with matrix products 128 for a rank that is whole in a tile and 2 or 4 for one of which a program has one
    coordinate; everything else is 4096, and less where a tensor would have more than 2^28 elements.
    """
    symbols = [size for size in dict.fromkeys(declared_sizes(final)) if isinstance(size, str)]
    guess = Subject(final, final, {s: given.get(s, GUESS) for s in symbols}, types, {})
    planner = Planner(final, guess.sizes, guess.layouts(guess.sizes))
    kinds: dict[str, set[str]] = {}
    packed: dict[str, int] = {}
    for group in planner.groups():
        if isinstance(group, Rest):
            continue
        products = planner.products(group)
        for rank, role in planner.roles(group).items():
            size = planner.sizes[rank]
            if isinstance(size, str):
                kinds.setdefault(size, set()).add(role.value if products else "rows")
                if rank in planner.grouped(group):
                    packed[size] = 2 * planner.grouped(group)[rank]
    few = iter(FEW * len(symbols))
    sizes: dict[str, int] = {}
    for symbol in symbols:
        lies = kinds.get(symbol, set())
        short = next(few) if symbol not in given and lies == {Role.POINT.value} else LONG
        sizes[symbol] = given.get(symbol, packed.get(symbol, WHOLE if Role.WHOLE.value in lies else short))
    for symbol in symbols:
        if symbol not in given and symbol not in kinds:
            sizes[symbol] = _reached(symbol, final, sizes) or LONG
    return _limited(final, sizes, [s for s in symbols if s not in given])


def _reached(symbol: str, cascade: Cascade, sizes: Mapping[str, int]) -> int:
    """The extent that the indices of a dimension reach; 0 where they are not known."""
    shapes = infer_shapes(cascade)
    ranks = {rank: _number(size, sizes) for rank, size in shapes.ranks.items()}
    found = 0
    for node in (node for stmt in cascade.body for expr in expressions(stmt) for node in walk(expr)):
        if isinstance(node, Read):
            for part, size in zip(node.index, shapes.tensors[node.tensor], strict=True):
                known = interval(part, ranks, sizes) if size == symbol else None
                found = max(found, known[1] + 1 if known else 0)
    return found


def _limited(cascade: Cascade, sizes: dict[str, int], free: Sequence[str]) -> dict[str, int]:
    """The sizes with the largest free ones halved until no tensor is absurdly large."""
    shapes = infer_shapes(cascade)
    spaces: list[tuple[Size, ...]] = [p.shape for p in cascade.params]
    for stmt in cascade.body:
        spaces += [tuple(shapes.ranks[rank] for rank in target.ranks) for target in targets(stmt)]
        for node in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
            if not all(isinstance(part, Rank) for part in node.index):  # the check gathers it
                spaces.append(tuple(shapes.ranks[rank] for rank in free_ranks(node)))
    for space in spaces:
        while (count := _elements(space, sizes)) > MOST:
            longest = max((s for s in space if s in free), key=lambda s: sizes[str(s)], default=None)
            if longest is None or sizes[str(longest)] <= GUESS:
                break
            assert count > 0
            sizes[str(longest)] //= 2
    return sizes


def _elements(space: Sequence[Size], sizes: Mapping[str, int]) -> int:
    count = 1
    for size in space:
        count *= _number(size, sizes)
    return count


# --- what of the sizes is compiled in --------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Alone(Planner):
    """A planner of kernels that need no other kernel before them; `lie` fixes how the ranks lie, whatever the sizes."""

    lie: Mapping[str, Role] | None = None

    def roles(self, group: Group) -> dict[str, Role]:
        return dict(self.lie) if self.lie is not None else Planner.roles(self, group)

    def index(self, group: Group, axes: Sequence[Axis]) -> None:
        """Bounds that depend on data take kernels of their own: every tile is tested instead."""
        return


@dataclass(frozen=True, slots=True)
class _Planned:
    """A kernel with what a launch has to know."""

    name: str
    group: Group
    kernel: Kernel
    source: Source
    static: Mapping[str, int]  # the symbols that are numbers in it
    multiples: Mapping[str, int]  # of what a symbol must be a multiple


def _multiples(kernel: Kernel) -> dict[str, int]:
    """The tiles that must fit: those of axes on which no test stands."""
    found: dict[str, int] = {}
    for axis in (*kernel.axes, *(kernel.careful.axes if kernel.careful else ())):
        if isinstance(axis.extent, str) and axis.exact and axis.tile > 1:
            found[axis.extent] = max(axis.tile, found.get(axis.extent, 1))
    return found


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Writer:
    subject: Subject
    planner: _Alone
    groups: Sequence[Group | Rest]
    names: dict[str, str] = field(init=False)
    program: str = field(init=False)  # the name of the file that checks everything

    def __post_init__(self) -> None:
        final, canonical = self.subject.final, self.subject.canonical
        self.program = python_names([final.name], {*TAKEN, *HELPERS})[final.name]
        words = [p.name for p in final.params] + [name for group in self.groups for name in group.names]
        words += [target.name for stmt in canonical.body for target in targets(stmt)]
        words += [*infer_shapes(canonical).ranks, *self.subject.sizes]
        modules = [self.program, *(f"{self.program}_{number}" for number in range(len(self.groups)))]
        self.names = python_names(words, {*TAKEN, *modules})

    def emission(self) -> Emission:
        """Every file."""
        plans = [self.plan(number, group) for number, group in enumerate(self.groups) if isinstance(group, Group)]
        checks = [*self.reference(), LARGEST_ERROR.strip("\n"), *self.main()]
        files: dict[str, str] = {}
        for plan in plans:
            inputs = self.inputs(plan)
            blocks = [self.head(plan), ACCEPT.strip("\n")]
            if any(argument.kind == "descriptor" for argument in plan.source.arguments):
                blocks.append(DESCRIPTOR.strip("\n"))
            blocks.append("\n".join(self.launcher(plan, inputs)))
            files[f"{plan.name}.py"] = _joined([*blocks, *(checks if len(plans) == 1 else ())])
        if len(plans) > 1:
            files[f"{self.program}.py"] = _joined([self.driver_head(plans), "\n".join(self.driver(plans)), *checks])
        return Emission(files, tuple(map(self.emitted, plans)))

    def emitted(self, plan: _Planned) -> Emitted:
        """What is told of a kernel."""
        count = {axis.rank: -(-_number(axis.extent, self.subject.sizes) // axis.advance) for axis in plan.kernel.grid}
        strides = {}
        for tensor in plan.kernel.tensors:
            shape = [_number(size, self.subject.sizes) for size in self.planner.shapes[tensor.name]]
            strides[tensor.name] = contiguous(shape, tensor.dtype).strides
        return Emitted(f"{plan.name}.py", plan.kernel, count, request(plan.kernel, plan.source, strides))

    # --- plans -------------------------------------------------------------------------------------------------------

    def tiling(self, name: str, group: Group) -> Tiling:
        """The tiles that the model prefers; a file holds one kernel, so nothing is shared by several programs."""
        machine = MACHINES["h100" if self.planner.descriptors else "a100"]
        considered = [dataclasses.replace(tiling, parts=1) for tiling in candidates(self.planner, group)]
        found = ranked(self.planner, name, group, self.groups, machine, considered)
        return found[0][0] if found else dataclasses.replace(self.planner.default_tiling(group), parts=1)

    def plan(self, number: int, group: Group) -> _Planned:
        """The kernel of a group, and what of the sizes is compiled into it."""
        name = self.program if len(self.groups) == 1 else f"{self.program}_{number}"
        tiling = self.tiling(name, group)
        before = dict(self.planner.lives), set(self.planner.hidden)
        try:
            kernel = self.planner.kernel(name, group, self.groups, tiling)
        except UnsupportedError as error:
            raise UnsupportedError(outside(group, error.diagnostics[0].message)) from error
        source = emit(kernel)

        def differs(changed: Mapping[str, int]) -> bool:
            return self.elsewhere(name, group, tiling, changed, before) != source.text

        static = dict(self.planner.static(group).numbers)
        multiples = _multiples(kernel)
        for tensor in kernel.tensors:  # a stride that no address has: the dimension has one coordinate
            for size, stride in zip(self.planner.shapes[tensor.name], tensor.strides, strict=True):
                if isinstance(size, str) and (stride == 0 or self.subject.sizes[size] == 1):
                    static[size] = 1
        larger: dict[str, int] = {}
        for symbol in [symbol for symbol in self.subject.sizes if symbol not in static]:
            size, tile = self.subject.sizes[symbol], max(128, multiples.get(symbol, 1))
            larger[symbol] = size + 16 * tile
            for other in (size % tile or tile, larger[symbol]):
                if differs({symbol: max(other, 2)}):
                    static[symbol] = size
        rest = {symbol: size for symbol, size in larger.items() if symbol not in static}
        if rest and differs(rest):
            static |= {symbol: self.subject.sizes[symbol] for symbol in rest}
        return _Planned(name, group, kernel, source, static, multiples)

    def elsewhere(
        self, name: str, group: Group, tiling: Tiling, changed: Mapping[str, int], before: tuple[Any, set[str]]
    ) -> str:
        """The text of a kernel that is planned at other sizes, where tiles fit as they do: "" where it cannot be.

        What a plan proves of its sizes it leaves out of the kernel. Where the text differs, something was proved that
        does not hold everywhere, or more could be: then the size is part of the kernel.
        """
        sizes = {**self.subject.sizes, **changed}
        layouts = self.subject.layouts(sizes)
        planner = _Alone(self.subject.final, sizes, layouts, self.planner.descriptors, lie=self.planner.roles(group))
        planner.lives, planner.hidden = dict(before[0]), set(before[1])  # what kernels before it have told
        try:
            return emit(planner.kernel(name, group, self.groups, tiling)).text
        except UnsupportedError:
            return ""

    def inputs(self, plan: _Planned) -> list[str]:
        """The tensors that a kernel reads, in the order of the declaration, then as they are made."""
        if len(self.groups) == 1:
            return [param.name for param in self.subject.final.params]
        stored = self.planner.stored(plan.group, self.groups)
        order = [p.name for p in self.subject.final.params] + [n for group in self.groups for n in group.names]
        used = {tensor.name for tensor in plan.kernel.tensors} - set(stored)
        return [name for name in order if name in used]

    # --- a kernel's file ---------------------------------------------------------------------------------------------

    def head(self, plan: _Planned) -> str:
        """The text of the kernel with what the rest of the file imports."""
        imports = ["import torch", "import triton", "import triton.language as tl"]
        if any(argument.kind == "descriptor" for argument in plan.source.arguments):
            imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
        if len(self.groups) == 1:
            imports = ["import math", "", *imports]
        plain = "\nimport triton\nimport triton.language as tl\n"
        return plan.source.text.replace(plain, "\n" + "\n".join(imports) + "\n", 1).rstrip("\n")

    def launcher(self, plan: _Planned, inputs: Sequence[str]) -> Iterator[str]:
        """`run`: checks, allocates, launches."""
        stored = self.planner.stored(plan.group, self.groups)
        results = [result.name for result in self.subject.final.results] if len(self.groups) == 1 else stored
        given = {size for name in inputs for size in self.planner.shapes[name]}
        needed = self.needed(plan, stored)
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]  # only a keyword tells them
        if len(self.groups) > 1:
            loose = [symbol for symbol in loose if symbol in needed and symbol not in plan.static]
        words = [self.names[name] for name in inputs]
        yield from wrapped("def run(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        yield f'    """{self.summary(inputs, results)}"""'
        known = [f'"{symbol}": {plan.static[symbol]}' for symbol in self.subject.sizes if symbol in plan.static]
        known += [f'"{symbol}": {self.names[symbol]}' for symbol in loose if symbol not in plan.static]
        yield f"    sizes = {{{', '.join(known)}}}{'  # compiled in' if plan.static else ''}"
        for symbol in loose:
            if symbol in plan.static:
                message = f"{symbol} is {{{self.name(symbol)}}}, compiled for {plan.static[symbol]}"
                yield f"    if {self.name(symbol)} != {plan.static[symbol]}:"
                yield f'        raise ValueError(f"{message}")'
        described = {tensor.name: tensor for tensor in plan.kernel.tensors}
        for name in inputs:
            shape = _tuple([f'"{s}"' if isinstance(s, str) else str(s) for s in self.planner.shapes[name]])
            strides = described[name].strides if name in described else ()
            units = _tuple([str(d) for d, stride in enumerate(strides) if stride == 1])
            kind = TORCH[self.subject.types[name] if name in self.subject.types else described[name].dtype]
            yield f'    accept("{name}", {self.names[name]}, {kind}, {shape}, {units}, sizes)'
        if len(inputs) > 1:
            yield f"    if any(tensor.device != {words[0]}.device for tensor in {_tuple(words[1:])}):"
            yield '        raise ValueError("the tensors are on different devices")'
        if needed:
            symbols = [f'"{symbol}"' for symbol in needed]
            left = ", ".join(map(self.name, needed)) + ("," if len(needed) == 1 else "")
            yield f"    {left} = (sizes[key] for key in {_tuple(symbols)})"
        for symbol, tile in plan.multiples.items():
            if symbol not in plan.static:
                yield f"    if {self.name(symbol)} % {tile}:"
                message = f"{symbol} is {{{self.name(symbol)}}}, compiled for multiples of {tile}"
                yield f'        raise ValueError(f"{message}")'
        yield from self.launch(plan, stored, f"{words[0]}.device" if words else '"cuda"')
        yield f"    return {', '.join(self.names[name] for name in results)}"

    def needed(self, plan: _Planned, stored: Sequence[str]) -> list[str]:
        """The symbols that a launch mentions."""
        used = {size for name in stored for size in self.planner.shapes[name]}
        used |= {extent for extent, _ in plan.source.grid} | set(plan.multiples)
        used |= {argument.symbol for argument in plan.source.arguments if argument.kind == "size"}
        return [symbol for symbol in self.subject.sizes if symbol in used]

    def launch(self, plan: _Planned, stored: Sequence[str], device: str) -> Iterator[str]:
        """The results allocated, the grid, and the call of the kernel."""
        for name in stored:
            dtype = self.planner.tensor(name, self.planner.feeds_product(name, self.groups)).dtype
            shape = ", ".join(map(self.name, self.planner.shapes[name]))
            yield f"    {self.names[name]} = torch.empty([{shape}], dtype={TORCH[dtype]}, device={device})"
        counts = [
            self.name(extent) if tile == 1 else f"triton.cdiv({self.name(extent)}, {tile})"
            for extent, tile in plan.source.grid
        ]
        where, tiles, resident = self.names[stored[0]], " * ".join(counts) or "1", plan.source.resident
        if resident:
            yield "    # as many programs as run at a time go through all tiles; without a GPU a few"
            found = f"torch.cuda.get_device_properties({where}.device).multi_processor_count"
            yield f"    programs = {resident} * ({found} if {where}.is_cuda else 4)"
        yield f"    grid = (min(programs, {tiles}),)" if resident else f"    grid = ({tiles},)"
        yield f"    with torch.cuda.device_of({where}):"
        yield f"        {plan.source.kernel}[grid]("
        line = ""
        for argument in plan.source.arguments:
            text = self.argument(argument)
            if argument.kind == "descriptor" or len(line) + len(text) > 90:
                if line:
                    yield f"            {line.rstrip()}"
                line = ""
            line += f"{text}, "
            if argument.kind == "descriptor":
                yield f"            {line.rstrip()}"
                line = ""
        if line:
            yield f"            {line.rstrip()}"
        yield f"            num_warps={plan.source.num_warps}, num_stages={plan.source.num_stages},"
        yield "        )"

    def argument(self, argument: Argument) -> str:
        """What a launch gives for an argument of the kernel."""
        tensor = self.names.get(argument.tensor, argument.tensor)
        match argument.kind:
            case "descriptor":
                return f'descriptor("{argument.tensor}", {tensor}, [{", ".join(map(str, argument.box))}])'
            case "pointer":
                return tensor
            case "stride":
                return f"{tensor}.stride({argument.position})"
            case "size":
                return self.name(argument.symbol)
            case _:
                return f"{argument.name}={argument.value}"

    def name(self, size: Size) -> str:
        """A size as it is written."""
        return str(size) if isinstance(size, int) else self.names[size]

    def summary(self, inputs: Sequence[str], results: Sequence[str]) -> str:
        """`O[B,M] of X[B,M], g[M]`."""

        def shaped(names: Sequence[str]) -> str:
            return ", ".join(f"{name}[{','.join(map(str, self.planner.shapes[name]))}]" for name in names)

        return f"{shaped(results)} of {shaped(inputs) or 'nothing'}."

    # --- several kernels ---------------------------------------------------------------------------------------------

    def driver_head(self, plans: Sequence[_Planned]) -> str:
        """The docstring and the imports of the file that runs several kernels."""
        text = [f"    {line}".rstrip() for line in render(self.subject.canonical).splitlines()]
        modules = [f"import {plan.name}" for plan in plans]
        imports = ["import math", "", "import torch", "import triton", "", *modules]
        title = f'"""{self.subject.final.name}, in {len(plans)} kernels: those in the files beside this one'
        return "\n".join([title, "", *text, '"""', "", *imports])

    def driver(self, plans: Sequence[_Planned]) -> Iterator[str]:
        """`run` of several kernels: each takes what those before it made."""
        params = [param.name for param in self.subject.final.params]
        results = [result.name for result in self.subject.final.results]
        given = [size for name in params for size in self.planner.shapes[name]]
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]
        words = [self.names[name] for name in params]
        yield from wrapped("def run(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        yield f'    """{self.summary(params, results)}"""'
        for plan in plans:
            stored, inputs = self.planner.stored(plan.group, self.groups), self.inputs(plan)
            known = {size for name in inputs for size in self.planner.shapes[name]} | set(plan.static)
            more = [f"{self.name(s)}={self.size_of(s, loose)}" for s in self.needed(plan, stored) if s not in known]
            left = ", ".join(self.names[name] for name in stored)
            yield f"    {left} = {plan.name}.run({', '.join([*(self.names[name] for name in inputs), *more])})"
        yield f"    return {', '.join(self.names[name] for name in results)}"

    def size_of(self, symbol: str, loose: Sequence[str]) -> str:
        """A size as the parameters tell it."""
        if symbol in loose:
            return self.name(symbol)
        places = ((p.name, p.shape.index(symbol)) for p in self.subject.final.params if symbol in p.shape)
        tensor, position = next(places)
        return f"{self.names[tensor]}.shape[{position}]"

    # --- the check ---------------------------------------------------------------------------------------------------

    def reference(self) -> Iterator[str]:
        """The function that says in plain torch what the cascade means."""
        canonical, types = self.subject.canonical, self.subject.types
        found: Lines = reference_lines(canonical, types, self.subject.sizes, self.names)
        params = canonical.params
        given = {size for param in params for size in param.shape}
        loose = [symbol for symbol in self.subject.sizes if symbol not in given]
        words = [self.names[param.name] for param in params]
        lines = wrapped("def reference(", [*words, *(["*"] if loose else []), *map(self.name, loose)], "):")
        lines.append('    """The same in float64, one equation after the other."""')
        floats = [self.names[p.name] for p in params if types[p.name] in FLOATS]
        if floats:
            lines.append(f"    {', '.join(floats)} = {', '.join(f'{name}.double()' for name in floats)}")
        known: set[str] = set(loose)
        for param in params:
            fresh = [s for s in param.shape if isinstance(s, str) and s in found.sizes and s not in known]
            if fresh:
                parts = [self.name(s) if s in fresh else "_" for s in param.shape]
                lines.append(f"    {', '.join(parts)}{',' if len(parts) == 1 else ''} = {self.names[param.name]}.shape")
                known |= set(fresh)
        lines += [f"    {line}" if line else "" for line in found.lines]
        lines += ["", f"    return {', '.join(found.results)}"]
        yield "\n".join(lines)

    def main(self) -> Iterator[str]:
        """The check: random inputs, the largest error of each result, the exit code."""
        final, sizes = self.subject.final, self.subject.sizes
        given = {size for param in final.params for size in param.shape}
        loose = [f"{self.name(symbol)}={sizes[symbol]}" for symbol in sizes if symbol not in given]
        lines = [
            "def main():",
            '    """Compares with the reference on random inputs; exits with 1 where they differ."""',
        ]
        lines += [
            "    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:",
            '        raise SystemExit("there is no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly")',
            '    device = "cuda" if torch.cuda.is_available() else "cpu"',
            "    torch.manual_seed(0)",
        ]
        lines += [f"    {self.names[param.name]} = {self.random(param.name)}" for param in final.params]
        words = ", ".join([*(self.names[param.name] for param in final.params), *loose])
        several = len(final.results) > 1
        calls = [f"{call}({words})" if several else f"({call}({words}),)" for call in ("run", "reference")]
        names = _tuple([f'"{result.name}"' for result in final.results])
        floats = [dtype for dtype in self.dtypes() if dtype in FLOATS]
        tolerance = max((TOLERANCE.get(dtype, FINEST) for dtype in floats), default=FINEST)
        lines += [
            "    wrong = False",
            f"    for name, ours, wanted in zip({names}, {calls[0]}, {calls[1]}):",
            "        error = largest_error(ours, wanted)",
            f"        wrong |= not error <= {tolerance}",
            f'        print(f"{{name}}: largest error {{error:.2e}}, at most {tolerance:.2e} allowed")',
            "    raise SystemExit(int(wrong))",
        ]
        yield "\n".join(lines)
        yield 'if __name__ == "__main__":\n    main()'

    def dtypes(self) -> Iterator[DType]:
        """The types of what goes in and out."""
        yield from self.subject.types.values()
        for result in self.subject.final.results:
            yield self.planner.dtypes[result.name]

    def random(self, name: str) -> str:
        """Random values for a parameter, of the sizes that were planned."""
        dtype = self.subject.types[name]
        shape = f"[{', '.join(str(_number(size, self.subject.sizes)) for size in self.planner.shapes[name])}]"
        if dtype is DType.BOOL:
            return f"torch.rand({shape}, device=device) < 0.7"
        if dtype in FLOATS:
            short = dtype in (DType.F8E4M3, DType.F8E5M2)
            made = f"torch.randn({shape}, device=device{'' if short else f', dtype={TORCH[dtype]}'})"
            return f"{made}.to({TORCH[dtype]})" if short else made
        high = min(self.subject.highest.get(name, 3), 127 if dtype is DType.I8 else 2**31 - 1)
        return f"torch.randint(0, {high + 1}, {shape}, dtype={TORCH[dtype]}, device=device)"


def _tuple(words: Sequence[str]) -> str:
    """The text of a tuple."""
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def _joined(blocks: Sequence[str]) -> str:
    """Blocks of a file, two lines apart."""
    return "\n\n\n".join(blocks) + "\n"
