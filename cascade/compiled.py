"""What `compile` and `parse` return: a cascade that is called with tensors.

A cascade from text is parsed and verified when it is made; one from a Python function is traced at its first use. The
pipeline runs once per cascade. Every call checks its tensors against the declaration before anything is computed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from cascade.arguments import (
    Parameter, bind, check_constant, check_in_place, check_memory, check_structures, declaration, fits, frozen,
    is_plain, is_symbolic, leaves, match, outline, plural, split_options, types_of,
    widened,
)  # fmt: skip
from cascade.errors import CallError, CommandError, Diagnostic, TraceError
from cascade.frontend.build import parse_cascade
from cascade.frontend.tokens import decode
from cascade.inference import bind_sizes, infer_shapes
from cascade.ir import Cascade, Const, Directive, DType, Expr, Extent, Fold, GroupBy, Mesh, Size, Split, Stmt, TopK
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.group_rows import GroupRows, judged
from cascade.passes.lift import Lift, lift_reductions
from cascade.passes.report import report, report_text
from cascade.pipeline import Trace, run_pipeline
from cascade.text import render, render_expr
from cascade.verify import verify
from cascade.walk import map_expressions, map_fold, rewrite
from cascade.wording import suggest

SHAPE_NEEDED = "C410"  # the trace of a function that computes with whole tensors, whose rank count only a call tells
TYPE_NEEDED = "C426"  # that of one with a mask, which is a filter where it has truths
BACKENDS = ("auto", "triton", "interp")  # auto: kernels for tensors on a GPU, else the interpreter
EFFORTS = ("none", "quick", "full")  # of tuning: the model alone, a few candidates timed, all of them
EXTENT_ONE = ("C422", "C423")  # a dimension is 1 in this call, and was taken for one to broadcast


class Compiled:
    """A cascade as a function of torch tensors.

    Tensors are given by position or by the names of the declaration; sizes of shape symbols that no tensor has, by
    keyword. One result is one tensor, several are a tuple in declared order. A Python function is traced once for all
    shapes, and again for other values of its plain parameters; where it computes with whole tensors, as torch does,
    once per rank count. Inside another traced function a call becomes a call in that function's cascade.
    """

    def __init__(
        self,
        source: Cascade | Callable[..., Any],
        without: Collection[str] = (),
        backend: str = "auto",
        effort: str = "none",
        in_place: Mapping[str, str] | None = None,
        constant: Collection[str] = (),
    ) -> None:
        self.source = source
        self.without = tuple(without)
        self.backend = one_of("backend", backend, BACKENDS)
        self.effort = one_of("effort", effort, EFFORTS)
        self.in_place = dict(in_place or {})
        self.constant = (constant,) if isinstance(constant, str) else tuple(constant)
        self._launchers: dict[int, Any] = {}  # by trace
        self._plans: dict[Any, Callable[..., tuple[Any, ...]]] = {}  # by kind of call: what it runs, without asking
        self._traces: dict[Any, Trace] = {}
        self._last: Trace | None = None
        self._by_shape = False  # whether tracing needs the shapes of the tensors
        self._by_type = False  # and their types
        if isinstance(source, Cascade):
            check_in_place(source, self.in_place)
            check_constant(source, self.constant, self.in_place)
        else:
            functools.update_wrapper(self, source)

    @property
    def trace(self) -> Trace:
        """The pipeline's run, every step of it; of a function with several traces the one used last."""
        if self._last is None:
            self._last = self._run((None, ()), {}, None)
        return self._last

    @property
    def cascade(self) -> Cascade:
        """The cascade as written or traced, before any pass."""
        if isinstance(self.source, Cascade):
            return self.source
        return self._last.source if self._last else self._traced({}, None)

    def __call__(self, *tensors: Any, **named: Any) -> Any:
        """The results for these tensors, on the device they live on."""
        if (plan := self._plans.get(kind(tensors, named))) is not None:
            known = plan((*tensors, *named.values()))
            return known[0] if len(known) == 1 else known
        parameters = self._parameters()
        given, sizes = match(self._title(), parameters, tensors, named)
        values, options = split_options(given, parameters)
        if is_symbolic(values):
            return self._invoked(values, options)
        text = isinstance(self.source, Cascade)
        arrays = list(values.values()) if text else [leaf for value in values.values() for leaf in leaves(value)]
        launch = self._kernels(arrays)
        trace = self._specialised(values, options)
        inputs = bind(trace.source, arrays, sizes)
        if self.in_place:
            check_in_place(trace.source, self.in_place)
            check_memory(trace.source, inputs, self.in_place)
        if self.constant:
            check_constant(trace.source, self.constant, self.in_place)
        self._last = trace
        results = None if launch is None else self._run_kernels(launch, trace, inputs, sizes)
        if results is not None and not sizes and not options:
            self._remember(trace, tensors, named, inputs)
        if results is None:
            interp = importlib.import_module("cascade.interp")  # lazily: it needs torch
            found = interp.run(fitting(trace, inputs, sizes), inputs, sizes)
            found |= {result: inputs[param].copy_(found[result]) for result, param in self.in_place.items()}
            results = tuple(found.values())
        return results[0] if len(results) == 1 else results

    def _kernels(self, arrays: Collection[Any]) -> Any:
        """The module that runs kernels, beginning to make ready; None where the interpreter is to run instead.

        That is by choice, or on a device without kernels.
        """
        on_gpu = any(getattr(array, "is_cuda", False) for array in arrays)
        if self.backend == "interp" or (self.backend == "auto" and not on_gpu):
            return None
        launch = importlib.import_module("cascade.backends.triton.launch")  # lazily: it needs Triton
        launch.driver()
        return launch

    def _run_kernels(
        self, launch: Any, trace: Trace, inputs: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> tuple[Any, ...] | None:
        """The results by kernels; None where there is nothing to launch."""
        if not all(launch.runs_on(tensor.device) for tensor in inputs.values()):
            raise CallError(
                Diagnostic(
                    "C342",
                    "kernels do not run on tensors of this device",
                    help="move the tensors to a GPU, or set TRITON_INTERPRET=1 before Triton is imported",
                )
            )
        if id(trace) not in self._launchers:
            self._launchers[id(trace)] = self._launcher(trace, launch)
        found: tuple[Any, ...] | None = self._launchers[id(trace)](inputs, sizes)
        return found

    def _launcher(self, trace: Trace, launch: Any) -> Any:
        """What launches the kernels of a trace."""
        if not self.constant:
            return launch.Launcher(trace.final, self.effort, trace.source, self.in_place)
        kept = importlib.import_module("cascade.backends.triton.kept")  # lazily, as all that needs Triton
        return kept.KeepingLauncher(trace.final, self.effort, trace.source, self.in_place, self.constant)

    def _remember(
        self, trace: Trace, tensors: tuple[Any, ...], named: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> None:
        """Keeps the plan of this kind of call, where tensors went in as they were given: the next goes straight to it.

        Everything that binding checks is part of the kind: shapes, strides, types, devices, alignment, gradients.
        """
        given = (*tensors, *named.values())
        names = [*list(inputs)[: len(tensors)], *named]
        if set(names) != set(inputs) or any(inputs[name] is not one for name, one in zip(names, given, strict=True)):
            return  # something was converted on the way
        plan = self._launchers[id(trace)].direct(inputs, names)
        if plan is not None:
            self._plans[kind(tensors, named)] = plan

    def explain(self) -> str:
        """What the compiler knows and did: the report, every pass, what it changed, and the cascade that runs.

        After a call that ran kernels, also these: their tiles, what is predicted of them, and why they were chosen.
        """
        lines = [f"cascade {self.cascade.name}: {plural(len(self.cascade.body), 'statement')}"]
        for step in self.trace.steps:
            changed = plural(len(step.after.body), "statement")
            lines.append(f"  {step.name}: {'nothing to do' if step.after is step.before else changed}")
            lines += [f"    {line}" for line in rows_told(step.after)] if step.name == GroupRows.name else []
        launcher = self._launchers.get(id(self.trace))
        kernels = "" if launcher is None else "\n" + launcher.explain()
        return self._report() + "\n" + "\n".join(lines) + "\n\n" + render(self.trace.final) + kernels

    def sources(self) -> dict[str, str]:
        """The Triton text of the kernels that the last call ran, by name; empty where the interpreter ran it."""
        launcher = self._launchers.get(id(self.trace))
        found: dict[str, str] = {} if launcher is None else launcher.sources()
        return found

    def inspect(self, **asked: Any) -> Any:
        """The page of the inspector: `.save(path)` writes it, a notebook shows it, `.html` is its text.

        `asked` are the fields of `cascade.inspector.Asked`: `sizes` of shape symbols, `dtype`, `machines` by name (a
        GPU, a spatial machine, several devices), `mapping`, `as_published`, `compiled`. After a call that ran kernels
        on a GPU it shows these, with what was measured of them. CommandError (C605) for an unknown machine.
        """
        inspector = importlib.import_module("cascade.inspector")  # lazily: a call needs none of it
        trace = self.trace
        launcher = self._launchers.get(id(trace))
        ran = None
        if launcher is not None and launcher.machine is not None:
            ran = inspector.Ran(launcher.ran(), launcher.sources(), launcher.machine)
        return inspector.inspect(trace, inspector.Asked(**asked), ran)

    def _report(self) -> str:
        """What is known about the cascade in canonical form; nothing is lifted where that pass is left out."""
        reached = [step.after for step in self.trace.steps if step.name == Canonicalize.name]
        canonical = reached[0] if reached else run_pipeline(self.trace.source, Canonicalize.name).final
        lifting = None if Lift.name in self.without else lift_reductions(canonical)
        return report_text(report(canonical, lifting))

    def __repr__(self) -> str:
        return f"<cascade.Compiled {self._title()}>"

    def _title(self) -> str:
        """What is called, as its declaration reads."""
        if isinstance(self.source, Cascade):
            return f"{self.source.name}({', '.join(map(declaration, self.source.params))})"
        return f"{self.source.__name__}({', '.join(inspect.signature(self.source).parameters)})"

    def _parameters(self) -> dict[str, Parameter]:
        """What a call may give, by name: a declared tensor has no default, a Python parameter may have one."""
        if isinstance(self.source, Cascade):
            return {param.name: Parameter(span=param.span) for param in self.source.params}
        found = inspect.signature(self.source).parameters
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
            self._traced({}, None)  # refuses such a function
        return {
            name: Parameter(p.default is not p.empty, p.kind is p.KEYWORD_ONLY, p.default) for name, p in found.items()
        }

    def _traced(
        self, options: Mapping[str, Any], shapes: Mapping[str, Any] | None, types: Mapping[str, Any] | None = None
    ) -> Cascade:
        """The cascade of the function, for these values of its plain parameters."""
        if isinstance(self.source, Cascade):
            return self.source
        tracing = importlib.import_module("cascade.frontend.trace")  # lazily: text needs none of it
        traced: Cascade = tracing.trace(self.source, shapes, types, options)
        return traced

    def _run(
        self,
        key: Any,
        options: Mapping[str, Any],
        shapes: Mapping[str, Any] | None,
        types: Mapping[str, Any] | None = None,
    ) -> Trace:
        """The pipeline's run over the cascade, kept under the key."""
        if key not in self._traces:
            self._traces[key] = run_pipeline(self._traced(options, shapes, types), without=self.without)
        return self._traces[key]

    def _specialised(self, values: Mapping[str, Any], options: Mapping[str, Any]) -> Trace:
        """The compiled cascade that fits these arguments; without looking at their shapes where that will do."""
        chosen = frozen(options)
        if not self._by_shape and (isinstance(self.source, Cascade) or is_plain(values, self._parameters())):
            try:
                return self._run((None, chosen), options, None)
            except TraceError as error:
                if error.diagnostics[0].code not in (SHAPE_NEEDED, TYPE_NEEDED):
                    raise
                self._by_shape = True
        check_structures(values)
        types = dict(one for name, value in values.items() for one in types_of(name, value)) if self._by_type else {}
        known = tuple(types.items())
        pattern = frozen(outline(values, pattern=True)), chosen, known
        if pattern in self._traces and fits(self._traces[pattern].source, values):
            return self._traces[pattern]
        shapes = outline(values)
        try:
            trace = self._run((frozen(shapes), chosen, known), options, shapes, types)
        except TraceError as error:
            code = error.diagnostics[0].code
            if code == TYPE_NEEDED and not self._by_type:
                self._by_type = True
                return self._specialised(values, options)
            if code not in EXTENT_ONE:
                raise
            trace = self._run((frozen(shapes), chosen, known), options, widened(shapes), types)
        self._traces[pattern] = trace
        return trace

    def _invoked(self, values: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """A call inside a traced function: a call of this cascade, or its body where only the call tells the shapes."""
        functions = importlib.import_module("cascade.frontend.functions")
        if isinstance(self.source, Cascade) or is_plain(values, self._parameters()):
            try:
                callee = self._run((None, frozen(options)), options, None).source
                return functions.invoke(callee, *values.values())
            except TraceError as error:
                if isinstance(self.source, Cascade) or error.diagnostics[0].code not in (SHAPE_NEEDED, TYPE_NEEDED):
                    raise
        assert not isinstance(self.source, Cascade)
        return self.source(**values, **options)


def kind(tensors: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What a plan depends on of the tensors of a call; None where some are no tensors."""
    given = (*tensors, *named.values()) if named else tensors
    try:
        known = ((t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.data_ptr() & 15) for t in given)
        return (*named, *known)
    except (AttributeError, RuntimeError):  # no tensors, or none with strides and storage
        return None


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """An option's value, refused where it is not one of those allowed."""
    if value in allowed:
        return value
    raise CallError(
        Diagnostic("C341", f"{option} is {value!r}", help=suggest(value, allowed, f"the values of {option}"))
    )


def fitting(trace: Trace, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> Cascade:
    """What the pipeline made of the cascade or, where a rank that it folds is empty, what that was made of.

    A trip without an element has no state to be read out: 0/0 where the sum over nothing is 0.
    """
    before = [trace.source, *(step.after for step in trace.steps)]
    folds = [item for item in trace.final.schedule if isinstance(item, Fold) and item not in trace.source.schedule]
    if not folds:
        return trace.final
    extents = bind_sizes(trace.final, {name: tuple(given.shape) for name, given in inputs.items()}, sizes)
    ranks = infer_shapes(trace.final).ranks
    if all(size if isinstance(size := ranks[fold.rank], int) else extents[size] for fold in folds):
        return trace.final
    written = trace.source.schedule
    return next(c for c in reversed(before) if all(item in written for item in c.schedule))


def rows_told(cascade: Cascade) -> list[str]:
    """What is known of products with an operand that data chooses: by which index they are grouped, or why not."""
    return [
        f"rows of {one.name} by {render_expr(one.key)}: {f'not grouped, {one.reason}' if one.reason else 'grouped'}"
        for one in judged(cascade)
    ]


# --- entry points ----------------------------------------------------------------------------------------------------


def parse(text: str, name: str | None = None) -> Compiled:
    """The cascade that the text defines: the last one, or the one called `name`."""
    return from_text(text, "<text>", name)


@overload
def compile(
    source: None = None,
    /,
    *,
    without: Collection[str] = (),
    backend: str = "auto",
    effort: str = "none",
    in_place: Mapping[str, str] | None = None,
    constant: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Compiled]: ...


@overload
def compile(
    source: Callable[..., Any] | Cascade | str | os.PathLike[str],
    /,
    name: str | None = None,
    *,
    without: Collection[str] = (),
    backend: str = "auto",
    effort: str = "none",
    in_place: Mapping[str, str] | None = None,
    constant: Collection[str] = (),
) -> Compiled: ...


def compile(
    source: Any = None,
    /,
    name: str | None = None,
    *,
    without: Collection[str] = (),
    backend: str = "auto",
    effort: str = "none",
    in_place: Mapping[str, str] | None = None,
    constant: Collection[str] = (),
) -> Compiled | Callable[[Callable[..., Any]], Compiled]:
    """Makes a callable of a Python function (also as a decorator, with or without parentheses) or of a program.

    A string is the path of a `.cascade` file, `path:name` for one of its cascades, or program text where it has a brace
    or a line break. `name` picks a cascade as well; `without` names passes that are left out. `backend` is `auto`
    (kernels for tensors on a GPU, else the interpreter), `triton` or `interp`; `effort` is how much is tuned at the
    first call of each kind: `none` (the machine model chooses), `quick` (a few candidates are timed) or `full`.

    `in_place` says which results take the memory of which parameters, as a cache that grows: `{"C": "K"}` writes C into
    the tensor given for K, and returns that. Where C is K with other values at coordinates that equations tell,
    `C[b,n,e] = select(n == len[b], R[b,e], K[b,n,e])`, only these are written; else C is computed and copied.

    `constant` are parameters whose tensors seldom change, as weights: what can be computed from them alone, a gain
    times a weight or the sum of its columns, is computed once for each version of them and kept, where that has no
    more bytes than they have. Changes in place are seen, those made through `tensor.data` are not; a CUDA graph goes on
    with what was kept when it was captured.
    """
    if source is None:
        return lambda function: Compiled(function, without, backend, effort, in_place, constant)
    if isinstance(source, str) and ("{" in source or "\n" in source):
        return from_text(source, "<text>", name, without, backend, effort, in_place, constant)
    if isinstance(source, str | os.PathLike):
        path, found = split_name(os.fspath(source))
        return from_text(read_program(path), path, name or found, without, backend, effort, in_place, constant)
    if isinstance(source, Cascade):
        verify(source)
    elif not callable(source):
        message = f"cannot compile a {type(source).__name__}"
        raise CallError(Diagnostic("C330", message, help="give a Python function, a path, program text or a Cascade"))
    return Compiled(source, without, backend, effort, in_place, constant)


def from_text(
    text: str,
    origin: str,
    name: str | None = None,
    without: Collection[str] = (),
    backend: str = "auto",
    effort: str = "none",
    in_place: Mapping[str, str] | None = None,
    constant: Collection[str] = (),
) -> Compiled:
    """The callable for program text that came from `origin`."""
    cascade = parse_cascade(text, origin, name)
    verify(cascade)
    return Compiled(cascade, without, backend, effort, in_place, constant)


def read_program(path: str) -> str:
    """The text of a program file."""
    try:
        return decode(Path(path).read_bytes(), path)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise CommandError(Diagnostic("C610", message, help=nearest_file(path))) from None


def nearest_file(path: str) -> str | None:
    """The program beside a missing one whose name is most like it."""
    folder = Path(path).parent
    names = [p.name for p in folder.iterdir() if p.suffix in (".cascade", ".py")] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"did you mean {str(folder / close[0])!r}?" if close and close[0] != Path(path).name else None


def split_name(file: str) -> tuple[str, str | None]:
    """The path and, after a colon, the name of one cascade in the file."""
    path, colon, name = file.rpartition(":")
    if colon and re.fullmatch(r"[A-Za-z_]\w*", name) and not Path(file).exists():
        return path, name
    return file, None


def specialise(cascade: Cascade, sizes: Mapping[str, int], dtype: DType | None = None) -> Cascade:
    """The cascade with shape symbols replaced by numbers, and untyped parameters given a type.

    softmax(X[B,N]) ... / sqrt(N)   with N = 8   -->   softmax(X[B,8]) ... / sqrt(8)
    """

    def number(size: Size) -> Size:
        return sizes.get(size, size) if isinstance(size, str) else size

    def shaped(decl: Any) -> Any:
        return dataclasses.replace(decl, shape=tuple(number(size) for size in decl.shape))

    def constant(expr: Expr) -> Expr:
        known = isinstance(expr, Extent) and expr.name in sizes
        return Const(sizes[expr.name], span=expr.span) if isinstance(expr, Extent) and known else expr

    def statement(stmt: Stmt) -> Stmt:
        stmt = map_expressions(stmt, lambda expr: rewrite(expr, constant))
        return dataclasses.replace(stmt, k=number(stmt.k)) if isinstance(stmt, TopK) else stmt

    def directive(item: Directive) -> Directive:
        if isinstance(item, Fold):
            return map_fold(item, lambda expr: rewrite(expr, constant))
        if isinstance(item, Mesh | GroupBy):
            return dataclasses.replace(item, size=number(item.size))
        return dataclasses.replace(item, parts=number(item.parts)) if isinstance(item, Split) and item.parts else item

    params = tuple(shaped(p if p.dtype else dataclasses.replace(p, dtype=dtype)) for p in cascade.params)
    results = tuple(shaped(result) for result in cascade.results)
    given = tuple(dataclasses.replace(extent, size=number(extent.size)) for extent in cascade.given)
    body, schedule = tuple(map(statement, cascade.body)), tuple(map(directive, cascade.schedule))
    return dataclasses.replace(cascade, params=params, results=results, body=body, schedule=schedule, given=given)
