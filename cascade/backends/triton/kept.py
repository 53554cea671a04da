"""Kernels of a cascade some of whose parameters are constant: what these come to is computed once for their values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade.backends.triton.constants import divided
from cascade.backends.triton.explain import Launch
from cascade.backends.triton.launch import Launcher, typed
from cascade.backends.triton.machine import Machine
from cascade.backends.triton.partition import Rest
from cascade.errors import CallError, Diagnostic
from cascade.inference import bind_sizes
from cascade.ir import Cascade
from cascade.values import FROM_TORCH


@dataclass(slots=True, eq=False)
class Made:
    """What some constants come to, at one version of each."""

    versions: list[int]
    tensors: dict[str, Tensor]
    stream: Any = None  # on which it was computed
    done: Any = None  # the event behind that

    def wait(self) -> None:
        """Lets another stream than that on which it was computed wait for it, and keeps its memory for that one."""
        if self.stream is None or is_captured(self.tensors):  # whoever captures has waited for the device
            return
        stream = torch.cuda.current_stream(self.stream.device)
        if stream != self.stream:
            stream.wait_event(self.done)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)


@dataclass(slots=True, eq=False)
class Kept:
    """What constants come to, for as long as the tensors live that are given for them.

    Values are told by the tensors themselves and by torch's count of the changes made to each in place; what goes
    around that count (`tensor.data`) is not seen. A CUDA graph goes on with what there was when it was captured.
    """

    launcher: Launcher
    made: dict[tuple[int, ...], Made] = field(default_factory=dict)  # by the identities of constants
    watched: dict[tuple[int, ...], list[weakref.ref[Tensor]]] = field(default_factory=dict)
    captured: list[dict[str, Tensor]] = field(default_factory=list)  # what graphs read, which may run at any time

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the constants among these tensors come to, complete before anything later on the current stream."""
        given = {param.name: inputs[param.name] for param in self.launcher.cascade.params}
        versions = list(map(version, given, given.values()))
        key = tuple(map(id, given.values()))
        found = self.made.get(key)
        if found is None or found.versions != versions:
            found = self.compute(given, versions)
            if not is_captured(found.tensors):  # there is nothing in them until the graph runs
                self.made[key] = found
                self.watched[key] = [weakref.ref(tensor, self.forget(key)) for tensor in given.values()]
        found.wait()
        if is_captured(found.tensors) and all(found.tensors is not one for one in self.captured):
            self.captured.append(found.tensors)
        return found.tensors

    def compute(self, given: Mapping[str, Tensor], versions: list[int]) -> Made:
        """Computes it on the current stream."""
        results = self.launcher(given, {})
        assert results is not None, "kernels of no elements are not launched"
        names = (result.name for result in self.launcher.cascade.results)
        found = Made(versions, dict(zip(names, results, strict=True)))
        if results[0].is_cuda and not is_captured(found.tensors):
            found.stream = torch.cuda.current_stream(results[0].device)
            found.done = found.stream.record_event()
        return found

    def forget(self, key: tuple[int, ...]) -> Callable[[object], None]:
        """What happens when a tensor given for a constant is gone: others may get its identity."""

        def gone(_: object) -> None:
            self.made.pop(key, None)
            self.watched.pop(key, None)

        return gone


def version(name: str, tensor: Tensor) -> int:
    """How often a tensor was changed in place; raises C344 where torch does not count that."""
    if tensor.is_inference():
        message = f"constant: the tensor given for {name} was made in inference mode, which counts no changes"
        raise CallError(Diagnostic("C344", message, help="make it outside of torch.inference_mode()"))
    return tensor._version


def is_captured(tensors: Mapping[str, Tensor]) -> bool:
    """Whether work on these tensors now goes into a CUDA graph."""
    return any(tensor.is_cuda for tensor in tensors.values()) and torch.cuda.is_current_stream_capturing()


@dataclass(slots=True, eq=False)
class KeepingLauncher:
    """A cascade that has been through the pipeline, as kernels, with parameters that seldom change.

    For every kind of constants and types it is divided in two; each part has a launcher of its own.
    """

    cascade: Cascade
    effort: str
    source: Cascade | None
    in_place: Mapping[str, str]
    constant: Sequence[str]
    parts: dict[Any, tuple[Launcher, Kept | None]] = field(default_factory=dict)
    last: tuple[Launcher, Kept | None] | None = None

    def __call__(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...] | None:
        """The results for these tensors, as of `Launcher`."""
        if any(0 in tensor.shape for tensor in inputs.values()):
            return None
        self.last = launcher, kept = self.part(inputs, sizes)
        return launcher({**inputs, **(kept(inputs) if kept else {})}, sizes)

    def part(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Launcher, Kept | None]:
        """The launchers for constants of these shapes, and tensors of these types."""
        shapes = tuple((name, inputs[name].shape, inputs[name].device) for name in self.constant)
        key = (shapes, tuple(tensor.dtype for tensor in inputs.values()))
        if key not in self.parts:
            self.parts[key] = self.made(inputs, sizes)
        return self.parts[key]

    def made(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Launcher, Kept | None]:
        """Launchers of the parts of the cascade."""
        dtypes = {name: FROM_TORCH[tensor.dtype] for name, tensor in inputs.items()}
        cascade = typed(self.cascade, self.source, dtypes)
        extents = bind_sizes(cascade, {name: tuple(t.shape) for name, t in inputs.items()}, sizes)
        found = divided(cascade, extents, dtypes, self.constant)
        if found is None:
            return Launcher(cascade, self.effort, None, self.in_place), None
        once = Launcher(found.once, self.effort)
        return Launcher(found.rest, self.effort, None, self.in_place), Kept(once)

    def direct(
        self, inputs: Mapping[str, Tensor], names: Sequence[str]
    ) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        """What a call with tensors of this kind runs, as of `Launcher`."""
        launcher, kept = self.part(inputs, {})
        if kept is None:
            return launcher.direct(inputs, names)
        there = kept(inputs)
        plan = launcher.direct({**inputs, **there}, (*names, *there))
        if plan is None:
            return None

        def run(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return plan((*tensors, *kept(dict(zip(names, tensors, strict=True))).values()))

        return run

    def explain(self) -> str:
        """What the kind of call that was planned last runs, in words, and what is kept from call to call."""
        if self.last is None:
            return ""
        launcher, kept = self.last
        if kept is None:
            return f"nothing is kept of {', '.join(self.constant)}: no less to compute\n" + launcher.explain()
        names = ", ".join(result.name for result in kept.launcher.cascade.results)
        of = ", ".join(param.name for param in kept.launcher.cascade.params)
        return f"{launcher.explain()}\n{names}: once for each version of {of}\n{kept.launcher.explain()}"

    def sources(self) -> dict[str, str]:
        """The text of every kernel of the kind of call that was planned last."""
        if self.last is None:
            return {}
        launcher, kept = self.last
        return ({} if kept is None else kept.launcher.sources()) | launcher.sources()

    def ran(self) -> list[Launch | Rest]:
        """What that call ran, and before it what is computed once for each version of the constants."""
        if self.last is None:
            return []
        launcher, kept = self.last
        return [*([] if kept is None else kept.launcher.ran()), *launcher.ran()]

    @property
    def machine(self) -> Machine | None:
        """What is known of the GPU on which that call ran, as of `Launcher`."""
        return None if self.last is None else self.last[0].machine
