"""The pipeline and its driver: what is checked at which level, how a broken pass is reported, how passes are spelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from cascade import pipeline, settings
from cascade.errors import CascadeError, CommandError, InternalError, VerifyError
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade, Const, Einsum, Expr, Result
from cascade.passes import PASSES
from cascade.passes.base import parse_pass, pass_name, spelling
from cascade.pipeline import PIPELINE, run_pipeline
from cascade.verify import Invariant, inlined
from cascade.walk import map_expressions, rewrite

SOFTMAX = """cascade probabilities(X[B,N]) -> Y[B,N] {
    Y[b,n] = exp(X[b,n] - max[n] X[b,n]) / (sum[n] exp(X[b,n] - max[n] X[b,n]))
}
"""
LINEAR = "cascade linear(X[N]) -> Y[N] { Y[n] = 2 * X[n] + 1 }"


def cascade(text: str) -> Cascade:
    return parse_cascade(text)


# --- passes that do wrong --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A pass that does what its field says."""

    name: ClassVar[str] = "wrong"
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    change: Callable[[Cascade], Cascade]

    def __call__(self, cascade: Cascade) -> Cascade:
        return self.change(cascade)


def on_expressions(change: Callable[[Expr], Expr]) -> Callable[[Cascade], Cascade]:
    """A change of every expression node, as a change of the cascade."""
    return lambda c: dataclasses.replace(
        c, body=tuple(map_expressions(s, lambda e: rewrite(e, change)) for s in c.body)
    )


def lose_definition(c: Cascade) -> Cascade:
    """Drops every statement."""
    return dataclasses.replace(c, body=())


def double_constants(expr: Expr) -> Expr:
    """Changes the numbers, and so the meaning."""
    return Const(expr.value * 2) if isinstance(expr, Const) else expr


def crash(c: Cascade) -> Cascade:
    """Fails as a programming mistake does."""
    return {}["nothing"]


def add_result(c: Cascade) -> Cascade:
    """Gives more results than before."""
    return dataclasses.replace(c, results=(*c.results, Result("Z", None, ("N",))), body=(*c.body, copy(c.body[0])))


def copy(stmt: object) -> Einsum:
    assert isinstance(stmt, Einsum)
    return dataclasses.replace(stmt, target=dataclasses.replace(stmt.target, name="Z"))


@pytest.mark.parametrize(
    ("change", "level", "says"),
    [
        (crash, 0, "raised KeyError: 'nothing'"),
        (lose_definition, 1, "made an invalid cascade"),
        (on_expressions(double_constants), 2, "changed the meaning: 'Y': the largest difference is"),
        (add_result, 2, "changed the meaning: the results are Y, Z, were Y"),
    ],
)
def test_broken_pass_is_an_internal_error(change: Callable[[Cascade], Cascade], level: int, says: str) -> None:
    with pytest.raises(InternalError) as caught:
        run_pipeline(cascade(LINEAR), check=level, passes=[Wrong(change)])
    message = str(caught.value)
    assert message.startswith("internal error: pass 'wrong")
    assert says in message
    assert "reproduce: CASCADE_CHECK=2 cascadec show " in message


@pytest.mark.parametrize("level", [0, 1])
def test_lower_levels_do_not_execute(level: int) -> None:
    run_pipeline(cascade(LINEAR), check=level, passes=[Wrong(on_expressions(double_constants))])


def test_text_that_parses_to_another_cascade_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "parse_cascade", lambda text, name, pick: cascade(LINEAR))
    with pytest.raises(InternalError, match=r"text parses to another\n(?s:.*)-    Y\[n\] = 4 "):
        run_pipeline(cascade(LINEAR), check=2, passes=[Wrong(on_expressions(double_constants))])


def test_level_0_verifies_on_exit() -> None:
    with pytest.raises(VerifyError):
        run_pipeline(cascade(LINEAR), check=0, passes=[Wrong(lose_definition)])


def test_internal_error_shows_the_change_and_leaves_a_reproducer() -> None:
    with pytest.raises(InternalError) as caught:
        run_pipeline(cascade(LINEAR), check=2, passes=[Wrong(on_expressions(double_constants))])
    message = str(caught.value)
    assert "-    Y[n] = 2 * X[n] + 1\n+    Y[n] = 4 * X[n] + 2" in message
    path = Path(message.rpartition("cascadec show ")[2])
    assert parse_cascade(path.read_text()) == cascade(LINEAR)


def test_reproducer_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    values = dataclasses.replace(settings.settings(), dump=None, cache_dir=blocked / "below")
    monkeypatch.setattr(pipeline, "settings", lambda: values)
    with pytest.raises(InternalError, match="no reproducer file"):
        run_pipeline(cascade(LINEAR), check=1, passes=[Wrong(crash)])


def test_unmet_requirement_names_the_invariant() -> None:
    @dataclass(frozen=True)
    class Needy(Wrong):
        requires: ClassVar[tuple[Invariant, ...]] = (inlined,)

    source = cascade("cascade c(X[B,N]) -> Y[B,N] { Y[b,n] = softmax[n] X[b,n] }")
    with pytest.raises(InternalError, match="needs 'inlined', which does not hold"):
        run_pipeline(source, check=1, passes=[Needy(lambda c: c)])


def test_unkept_promise_names_the_invariant() -> None:
    @dataclass(frozen=True)
    class Boastful(Wrong):
        ensures: ClassVar[tuple[Invariant, ...]] = (inlined,)

    source = cascade("cascade c(X[B,N]) -> Y[B,N] { Y[b,n] = softmax[n] X[b,n] }")
    with pytest.raises(InternalError, match="promises 'inlined', which does not hold"):
        run_pipeline(source, check=1, passes=[Boastful(lambda c: dataclasses.replace(c, name="d"))])


def test_users_mistake_is_not_ours() -> None:
    with pytest.raises(VerifyError):
        run_pipeline(cascade("cascade c(X[N]) -> Y[N] { Y[n] = Z[n] }"))


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
def test_trace_has_every_step(level: int) -> None:
    trace = run_pipeline(cascade(SOFTMAX), check=level)
    assert [step.name for step in trace.steps] == [step.name for step in PIPELINE]
    assert trace.steps[0].before is trace.source
    assert trace.steps[-1].after is trace.final


def test_nothing_to_do_gives_the_same_object() -> None:
    final = run_pipeline(cascade(SOFTMAX)).final
    assert all(step.after is step.before for step in run_pipeline(final).steps)


def test_until_stops_after_the_pass() -> None:
    assert [step.name for step in run_pipeline(cascade(SOFTMAX), until="inline").steps] == ["inline"]


@pytest.mark.parametrize("arguments", [{"until": "canonicalise"}, {"without": ["canonicalise"]}])
def test_unknown_pass_names_the_nearest(arguments: dict[str, str]) -> None:
    with pytest.raises(CommandError, match=r"C602.*\n.*did you mean 'canonicalize'"):
        run_pipeline(cascade(SOFTMAX), **arguments)


@pytest.mark.parametrize("name", [step.name for step in PIPELINE])
def test_any_pass_can_be_left_out(name: str) -> None:
    source = cascade("cascade c(X[B,N]) -> Y[B,N] { Y[b,n] = softmax[n] 2.0 * X[b,n] }")
    trace = run_pipeline(source, without=[name])
    assert name not in [step.name for step in trace.steps]
    assert not pipeline.meaning_difference(source, trace.final)


def test_refusal_of_a_pass_goes_to_the_user() -> None:
    def refuse(c: Cascade) -> Cascade:
        raise CascadeError(())

    with pytest.raises(CascadeError):
        run_pipeline(cascade(SOFTMAX), passes=[Wrong(refuse)])


# --- what CASCADE_DEBUG and CASCADE_DUMP show ------------------------------------------------------------------------


def test_dump_writes_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = dataclasses.replace(settings.settings(), dump=tmp_path / "new" / "folder")
    monkeypatch.setattr(pipeline, "settings", lambda: values)
    trace = run_pipeline(cascade(SOFTMAX))
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == [
        "probabilities.00.source.cascade",
        "probabilities.01.inline.cascade",
        "probabilities.02.canonicalize.cascade",
        "probabilities.03.lift.cascade",
        "probabilities.04.group-rows.cascade",
        "probabilities.05.fuse.cascade",
    ]
    last = (tmp_path / "new" / "folder" / files[-1]).read_text()
    assert parse_cascade(last) == trace.final


@pytest.mark.parametrize(("level", "lines"), [(0, 0), (1, 5), (2, 10), (3, 15)])
def test_debug_says_more_with_each_level(
    level: int, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = dataclasses.replace(settings.settings(), debug=level)
    monkeypatch.setattr(pipeline, "settings", lambda: values)
    run_pipeline(cascade(SOFTMAX))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == lines if level < 2 else len(shown.err.splitlines()) >= lines


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    found = settings.read({"HOME": "/home/me", "XDG_CACHE_HOME": "/home/me/caches"})
    assert (found.check, found.debug, found.dump) == (1, 0, None)
    assert found.cache_dir == Path("/home/me/caches/cascade")


def test_values_are_typed(tmp_path: Path) -> None:
    names = {"CASCADE_CHECK": "2", "CASCADE_DEBUG": " 4", "CASCADE_DUMP": str(tmp_path), "CASCADE_CACHE_DIR": "/x/y"}
    assert settings.read(names) == settings.Settings(2, 4, tmp_path, Path("/x/y"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("CASCADE_CHECK", "3"), ("CASCADE_CHECK", "yes"), ("CASCADE_DEBUG", "-1"), ("CASCADE_DEBUG", "²")],
)
def test_bad_level_is_an_error(name: str, value: str) -> None:
    with pytest.raises(
        CommandError, match=rf"error\[C601\]: environment variable {name} is '{value}'\nhelp: .* from 0 to"
    ):
        settings.read({name: value})


@pytest.mark.parametrize("name", ["CASCADE_DUMP", "CASCADE_CACHE_DIR"])
def test_folder_that_is_a_file_is_an_error(name: str) -> None:
    with pytest.raises(CommandError, match=r"C601.*\n.*this is a file"):
        settings.read({name: __file__})


# --- spelling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitTokens:
    """A pass with options of every kind."""

    name: ClassVar[str] = "split-tokens"
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()
    over: str
    parts: int = 2
    cuts: tuple[int, ...] = ()
    limit: float | None = None
    strict: bool = False

    def __call__(self, cascade: Cascade) -> Cascade:
        return cascade


KNOWN = {"split-tokens": SplitTokens, **PASSES}


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (SplitTokens("m"), "split-tokens{over=m}"),
        (SplitTokens("m", parts=4, strict=True), "split-tokens{over=m parts=4 strict=true}"),
        (SplitTokens("m", cuts=(4, 8), limit=0.5), "split-tokens{over=m cuts=4,8 limit=0.5}"),
        *((cls(), name) for name, cls in PASSES.items()),
    ],
)
def test_spelling_round_trips(step: pipeline.Pass, text: str) -> None:
    assert spelling(step) == text
    assert parse_pass(text, KNOWN) == step


def test_name_follows_from_the_class() -> None:
    assert pass_name(SplitTokens) == SplitTokens.name


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("canonicalise", "C602", "did you mean 'canonicalize'"),
        ("", "C603", "does not spell a pass"),
        ("split-tokens{over=m", "C603", "does not spell a pass"),
        ("split-tokens", "C603", "lacks an option"),
        ("split-tokens{ovr=m}", "C603", "did you mean 'over'"),
        ("split-tokens{over=m parts=many}", "C603", "write parts=<int>"),
        ("split-tokens{over=m strict=1}", "C603", "write strict=<bool>"),
        ("split-tokens{over=m strict}", "C603", "write strict=<bool>"),
        ("inline{over=m}", "C603", "it has no options"),
    ],
)
def test_misspelt_pass(text: str, code: str, says: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_pass(text, KNOWN)
    assert caught.value.diagnostics[0].code == code
    assert says in str(caught.value)
