"""Text and IR are two forms of one thing: the laws of printing and parsing, spans, limits, and what parsing costs."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cascade.compiled import specialise
from cascade.errors import CascadeError, ParseError, Span
from cascade.frontend.build import decode, library_uses, parse_cascade, parse_program
from cascade.frontend.library import library_names, library_source
from cascade.frontend.parser import grammar
from cascade.frontend.resolve import MAX_DEPTH
from cascade.frontend.uses import needs, ordered_uses, reachable
from cascade.interp import Precision, run
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Definition, Directive, DType, Einsum, Expr, Extent, Fold, FoldInit, FoldMerge,
    Function, Fuse, GroupBy, Init, Local, Mesh, Param, Part, Rank, Read, Reduce, Result, Shard, Split, Stmt, Stream, Target,
    Tile, TopK, Use, Wait,
)  # fmt: skip
from cascade.ops import LIBRARY_REDUCTIONS, OPS, REDUCERS
from cascade.text import render, render_expr
from cascade.verify import verify
from cascade.walk import expressions, fold_expressions, names, targets, walk
from tests.timing import least, within

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.cascade"))
HEAD = "cascade f(A[M,K], B[K,N]) -> Z[M,N] {\n"
MINIMAL = "cascade f() -> Z[] {\n    Z = 1\n}\n"


# --- random IR -------------------------------------------------------------------------------------------------------

RANKS = ("i", "j", "k", "over", "t")
NUMBERS = (
    0,
    1,
    -3,
    0.5,
    -0.25,
    1e-6,
    1e30,
    float("inf"),
    float("-inf"),
    float("nan"),
    True,
    False,
    -0.0,
    2**63,
    -(2**63),
)
SCHEDULE: tuple[Directive, ...] = (
    Mesh("tp", 8), Mesh("mesh", "N"), Shard("over", "tp"), Split("t", 2), Split("at", None, (1, 5)), Split("t", "N"),
    Fuse(("Z0",), "over"), Fuse(("Z0", "over"), "t"), GroupBy(("Z0", "by"), Read("by", (Rank("t"), Rank("over"))), "N"),
    GroupBy(("group",), Read("A", (Rank("by"),)), 4), Tile((("over", 3), ("t", 4))),
    Stream("at", (Part("Z0", 1), Part("into"))), Wait(Part("on", 1), Part("on")), Wait(Part("on"), Part("Z0", 0)),
)  # fmt: skip


class Generator:
    """Random IR that means nothing: every form inside every other, to be printed and read back."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def leaf(self, formal: tuple[str, ...]) -> Expr:
        choice = self.rng.choice
        forms: list[Expr] = [Const(choice(NUMBERS)), Rank(choice(formal or RANKS))]
        if formal:
            return choice([*forms, Local("x")])
        index = (Apply("sub", (Rank("t"), Const(1))), Const(-2), Rank(choice(RANKS)), Read("A", (Rank("i"),)))
        return choice([*forms, Extent(choice("NM")), Read("s", ()), Read("A", (choice(index), choice(index)))])

    def expr(self, depth: int, formal: tuple[str, ...] = ()) -> Expr:
        """`formal` are the ranks of the `def` whose body this is."""
        roll, choice = self.rng.random(), self.rng.choice
        if depth == 0 or roll < 0.1:
            return self.leaf(formal)
        ranks = tuple(self.rng.sample(formal or RANKS, 1 if formal else self.rng.randint(1, 2)))
        first, second = self.expr(depth - 1, formal), self.expr(depth - 1, formal)
        if roll < 0.5:
            op = choice(list(OPS.values()))
            return Apply(op.name, tuple(self.expr(depth - 1, formal) for _ in range(op.arity)))
        if roll < 0.75:
            return Reduce(choice(list(REDUCERS)), ranks, first)
        forms: list[Expr] = [Apply("mul", (first, second)), Apply("neg", (first,)), Cast(choice(list(DType)), first)]
        forms += [Use("point", (), (first,)), Use("mean", ranks, (first,))]
        if not formal:
            forms += [Use("softmax", ranks, (first,)), Use("own", ranks, (first,)), Use("two", ranks, (first, second))]
            forms.append(Read("A", (first, second)))
        return choice(forms)

    def statement(self, name: str) -> Stmt:
        where = self.expr(2) if self.rng.random() < 0.4 else None
        roll = self.rng.random()
        if roll < 0.1:
            return Call((name,), "inner", ("A",))
        if roll < 0.3:
            return TopK(
                Target(name, RANKS), Target(f"{name}_at", RANKS), "k", self.rng.choice((2, "N")), self.expr(3), where
            )
        inits = tuple(Init("i", -1 - at, self.expr(1)) for at in range(self.rng.choice((0, 0, 1, 2))))
        return Einsum(Target(name, RANKS), self.expr(self.rng.randint(0, 5)), where, inits)

    def fold(self) -> Fold:
        """A fold with any of its parts left out, and the words of its own lines for names."""
        names = ("Z0", "state", "init_0", "fold", "merge", "empty")

        def some() -> tuple[str, ...]:
            return tuple(self.rng.sample(names, self.rng.randint(0, 3)))

        def left() -> Target:
            return Target(self.rng.choice(names), tuple(self.rng.sample(RANKS, self.rng.randint(0, 2))))

        def right() -> Expr:
            partial = Read(f"{self.rng.choice(names)}'", self.rng.choice(((), (Rank("i"),))))
            return self.rng.choice((partial, Read("empty", ()), Apply("mul", (partial, self.plain(2))), self.plain(3)))

        inits = tuple(FoldInit(left(), self.rng.choice((None, right()))) for _ in range(self.rng.randint(0, 3)))
        merges = tuple(FoldMerge(left(), right()) for _ in range(self.rng.randint(0, 3)))
        return Fold(self.rng.choice(RANKS), some(), inits, some(), merges, some())

    def plain(self, depth: int) -> Expr:
        """An expression without functions of the program."""
        found = self.expr(depth)
        return found if not any(isinstance(node, Use) for node in walk(found)) else self.leaf(())

    def cascade(self) -> Cascade:
        inner = Cascade(
            "inner",
            (Param("X", None, ("T",)),),
            (Result("Y", DType.F16, ("T",)),),
            (Einsum(Target("Y", ("t",)), Use("point", (), (Read("X", (Rank("t"),)),))),),
        )
        found: list[Definition] = [
            Function("point", (), ("x",), Apply("mul", (Local("x"), Const(-2)))),
            Function("mean", ("n",), ("x",), Reduce("sum", ("n",), Local("x"))),
            Function("softmax", ("n",), ("x",), self.expr(2, ("n",))),
            Function("own", ("n",), ("x",), self.expr(3, ("n",))),
            Function("two", ("d",), ("x", "y"), Apply("sub", (self.expr(2, ("d",)), Local("y")))),
        ]
        found.append(dataclasses.replace(inner, uses=(found[0],)))
        body = tuple(self.statement(f"Z{number}") for number in range(self.rng.randint(1, 4)))
        params = (Param("A", DType.BF16, ("N", 3)), Param("B", None, ("M",)), Param("s", None, ()))
        results = (Result("Z0", None, ("N",), Const(self.rng.choice(NUMBERS))), Result("Z0", DType.BOOL, ()))
        schedule = tuple(self.rng.sample(SCHEDULE, self.rng.randint(0, 5)))
        if any(targets(stmt) for stmt in body):  # else a bare name in a fold is no rank variable
            schedule += tuple(self.fold() for _ in range(2))
        cascade = Cascade("random", params, results, body, schedule)
        graph = {**{d.name: needs(d) for d in found}, "random": needs(cascade)}
        used = [d for d in found if d.name in reachable("random", graph)]
        return dataclasses.replace(cascade, uses=ordered_uses(used))


@pytest.mark.parametrize("block", range(8))
def test_what_is_printed_is_read_back(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        cascade = Generator(seed).cascade()
        text = render(cascade)
        again = parse_cascade(text)
        assert again == cascade, text
        assert render(again) == text


def test_every_form_has_a_text() -> None:
    nodes = [
        node
        for seed in range(100)
        for stmt in Generator(seed).cascade().body
        for expr in expressions(stmt)
        for node in walk(expr)
    ]
    assert {type(node) for node in nodes} == {Const, Rank, Extent, Read, Apply, Cast, Reduce, Use}
    assert {node.op for node in nodes if isinstance(node, Apply)} == set(OPS)


# --- canonical text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_canonical_text_of_an_example_is_its_own(path: Path) -> None:
    for cascade in parse_program(path.read_text(encoding="utf-8"), path.name):
        verify(cascade)
        assert parse_cascade(str(cascade)) == cascade
        assert str(parse_cascade(str(cascade))) == str(cascade)


def test_spans_take_no_part_in_equality() -> None:
    assert parse_cascade(MINIMAL) == parse_cascade("# elsewhere\n\n" + MINIMAL.replace("    ", "  "))


@pytest.mark.parametrize(
    "text",
    [
        "a * (b + c)", "a - (b - c)", "a / (b * c)", "-(2)", "--a", "-(a * b)", "-sum[n] a * b", "a * -sum[n] b",
        "a * (sum[n] b) * c", "(-sum[n] a) * b", "sum[n] (a + b)", "not a == b and not (a or b)", "(a == b) == c",
        "a ?? b ?? c", "a ?? (b ?? c)", "a[t-1,2*t+1,(t+1)//2,-1]", "mean[n] (not a)", "a - -2", "a[b-(t-1)]",
        "softmax[n] -a", "select(a < b, -inf, nan)", "cast(a + b, bf16)", "sum[n] max[k] a * min[n] b", "a[not b or c]",
    ],
)  # fmt: skip
def test_expressions_print_as_they_are_written(text: str) -> None:
    cascade = parse_cascade(f"cascade f(a[N], b[], c[]) -> z[N] {{ z[n,k,t] = {text} }}")
    stmt = cascade.body[0]
    assert isinstance(stmt, Einsum)
    assert render_expr(stmt.expr) == text


def test_rendering_does_not_recurse() -> None:
    expr: Expr = Read("a", ())
    for _ in range(3_000):
        expr = Apply("add", (Read("b", ()), expr))
    assert render_expr(expr).count("b") == 3_000


# --- names -----------------------------------------------------------------------------------------------------------


def test_grammar_knows_every_reducer() -> None:
    pattern = re.escape("|".join((*REDUCERS, *LIBRARY_REDUCTIONS))).replace(r"\|", "|")
    assert f"({pattern})" in grammar().get_terminal("REDUCER").pattern.value


def test_a_bare_name_is_what_the_cascade_makes_of_it() -> None:
    cascade = parse_cascade("cascade f(x[N], s[]) -> z[N] { z[n] = x[n] * s + n * N + q + Q where n < N }")
    stmt = cascade.body[0]
    assert isinstance(stmt, Einsum)
    leaves = [
        node for node in walk(stmt.expr) if isinstance(node, (Rank, Extent, Read)) and node != Read("x", (Rank("n"),))
    ]
    assert leaves[1:] == [Read("s", ()), Rank("n"), Extent("N"), Read("q", ()), Read("Q", ())]


def test_what_a_cascade_uses_travels_with_it() -> None:
    text = "def g(x) = h(x)\ndef h(x) = x\ncascade a(X[N]) -> Y[N] { Y[n] = g(X[n]) }\n"
    text += "cascade b(X[N]) -> Y[N] { Z = a(X); Y[n] = softmax[n] Z[n] }\n"
    first, second = parse_program(text)
    assert [d.name for d in first.uses] == ["h", "g"]
    assert [d.name for d in second.uses] == ["h", "g", "a", "softmax"]
    assert second.uses[2] == first
    assert parse_cascade(text, pick="a") == first


def test_a_name_of_the_file_goes_before_the_library() -> None:
    own = parse_cascade("def rmsnorm[d](x, g) = x\ncascade f(X[D]) -> Y[D] { Y[d] = rmsnorm[d](X[d], X[d]) }")
    assert own.uses[0] != library_uses(["rmsnorm"])[-1]


def test_library_definitions_come_with_what_they_use() -> None:
    assert [d.name for d in library_uses(["layernorm"])] == ["mean", "layernorm_eps", "layernorm"]
    assert {d.name for d in library_uses(list(library_names()))} == set(library_names())


FOLD = """\
cascade f(S[M,N], s[M]) -> O[M] {
    R[m] = max[n] S[m,n]
    D[m] = sum[n] exp(S[m,n] - R[m])
    O[m] = D[m] / N
} schedule {
    fold n {
        state R, D
        init R[m] = s[m] + N
        init D[m] = empty
        update R, D
        merge R[m] = R'[m]
        merge D[m] = D'[m] * exp(R'[m] - R[m]) * N
        finalize O
    }
}
"""


def test_names_in_a_fold_are_resolved() -> None:
    cascade = parse_cascade(FOLD)
    (fold,) = cascade.schedule
    assert isinstance(fold, Fold)
    m = (Rank("m"),)
    assert fold.init[0].expr == Apply("add", (Read("s", m), Extent("N"))) and fold.init[1].expr is None
    assert fold.merge[0].expr == Read("R'", m)
    assert names(cascade) == {*"fSMNsORDmn"}
    assert all(node.span for expr in fold_expressions(fold) for node in walk(expr))
    assert place(fold.span) == (6, 5, 13, 19)
    assert place(fold.init[1].span) == (9, 14, 9, 26) and place(fold.merge[0].span) == (11, 9, 11, 27)


def test_a_fold_is_specialised() -> None:
    text = render(specialise(parse_cascade(FOLD), {"N": 8}))
    assert "init R[m] = s[m] + 8" in text and "exp(R'[m] - R[m]) * 8" in text and "N" not in text


# --- spans -----------------------------------------------------------------------------------------------------------


def test_every_node_knows_its_place() -> None:
    text = library_source().text or ""
    for cascade in parse_program(text):
        for stmt in cascade.body:
            assert stmt.span and all(target.span for target in targets(stmt))
            for expr in expressions(stmt):
                assert all(node.span for node in walk(expr)), render(cascade)


def test_spans_are_exact() -> None:
    cascade = parse_cascade(f"# comment\n{HEAD}\tZ[m,n] = sum[k] (A[m,k] +\n  1) * B[k,n] where n <= m\n}}\n", "x")
    stmt = cascade.body[0]
    assert isinstance(stmt, Einsum) and stmt.where and isinstance(stmt.expr, Reduce)
    product = stmt.expr.body
    assert isinstance(product, Apply)
    spans = (
        cascade.params[1].span,
        stmt.span,
        stmt.target.span,
        stmt.expr.span,
        *(a.span for a in product.args),
        stmt.where.span,
    )
    expected = (
        (2, 19, 2, 25),
        (3, 2, 4, 27),
        (3, 2, 3, 8),
        (3, 11, 4, 14),
        (3, 18, 4, 5),
        (4, 8, 4, 14),
        (4, 21, 4, 27),
    )
    assert tuple(place(span) for span in spans) == expected


def place(span: Span | None) -> tuple[int, int, int, int] | None:
    """A span as four numbers."""
    return None if span is None else (span.line, span.column, span.end_line, span.end_column)


# --- mistakes (those that fit a file are in cases/parse) ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message", "at"),
    [
        (b"\xff\xfec\x00a\x00", "UTF-16, not UTF-8: it starts with the byte order mark FF FE", (1, 1)),
        (b"\xff\xfe\x00\x00c\x00", "UTF-32, not UTF-8", (1, 1)),
        (b"cas\x00cade", "NUL (byte 0x00) at offset 3", (1, 4)),
        (b"c\x00a\x00s\x00c\x00", "NUL (byte 0x00) at offset 1; the text looks like UTF-16", (1, 2)),
        (b"# \xc3\xa9\n# \xe9\n", "byte 0xE9 at offset 7 is not UTF-8", (2, 3)),
    ],
)
def test_bytes_that_are_no_text(data: bytes, message: str, at: tuple[int, int]) -> None:
    with pytest.raises(ParseError) as caught:
        decode(data, "x.cascade")
    found = caught.value.diagnostics[0]
    assert found.code == "C101" and message in found.message
    assert found.span and (found.span.line, found.span.column) == at


def test_a_byte_order_mark_of_utf8_is_no_part_of_the_text() -> None:
    assert parse_cascade(decode(b"\xef\xbb\xbf" + MINIMAL.encode())) == parse_cascade("\ufeff" + MINIMAL)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", ";;\n", "def f(x) = x"])
def test_no_cascade(text: str) -> None:
    assert codes(text) == ["C103"]
    with pytest.raises(ParseError, match=r"(?s)write one, such as\n(.*)") as caught:
        parse_program(text)
    parse_program(str(caught.value).partition("such as\n")[2])  # the example is one


def codes(text: str) -> list[str]:
    """The codes of what is wrong with a text, which must be found within a second."""
    start = time.perf_counter()
    try:
        parse_program(text)
    except ParseError as error:
        assert all(d.span for d in error.diagnostics)
        return [d.code for d in error.diagnostics]
    finally:
        taken = time.perf_counter() - start
        assert within(taken, 1), text[:80]
    return []


def in_statement(expr: str) -> str:
    """A cascade with one statement."""
    return f"cascade f(A[M], I[M]) -> Z[M] {{\n    Z[m] = {expr}\n}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_statement("(" * 5_000 + "A[m]" + ")" * 5_000), []),
        (in_statement("(" * 5_000 + "A[m]"), ["C104"]),
        (in_statement("exp(" * 5_000 + "A[m]" + ")" * 5_000), ["C106"]),
        (in_statement("I[" * 300 + "m" + "]" * 300), ["C106"]),
        (in_statement("-" * 5_000 + "A[m]"), ["C106"]),
        (in_statement("not " * 5_000 + "A[m]"), ["C106"]),
        (in_statement("A[m]" + " + A[m]" * 100_000), ["C106"]),
        (in_statement("A[m]" + " + A[m]" * (MAX_DEPTH - 3)), []),
        (in_statement("A[m]" + " + A[m]" * MAX_DEPTH), ["C106"]),
        (in_statement("1" * 100_000), ["C106"]),
        (in_statement("A[m] *\n" * 3_000), ["C105"]),
        ("x" * (2**24 + 1), ["C106"]),
        ("(" * 100_000, ["C106"]),
        ("}" * 15_000, ["C104"] * 20),
        ("cascade " * 15_000, ["C105"] * 20),
        ("\n" * 200_000, ["C103"]),
    ],
    ids=lambda value: None if isinstance(value, list) else f"{len(value)}{re.sub(r'[^a-z(-]', '', value[45:55])}",
)
def test_limits_are_named(text: str, expected: list[str]) -> None:
    assert codes(text) == expected


def test_an_unknown_cascade_is_answered_with_the_closest() -> None:
    with pytest.raises(ParseError, match=r"C111.*no cascade 'attentoin'[^?]*did you mean 'attention'\?"):
        parse_cascade(library_source().text or "", "x", pick="attentoin")


PIECES = """cascade schedule def where init fill topk and or not cast true inf sum[ max softmax exp( split mesh over at on into
wait stream fuse fold state update merge finalize empty R' [ ] ( ) { } = == ; , . : -> ?? < * // - + 1 2.5 1e9 A B x y n m # @ & $"""
WORDS = [*PIECES.split(), "\n", "\r", "\t", "\0", "é", "\u202e"]


def mutated(rng: random.Random, text: str) -> str:
    """The text with a few pieces deleted, repeated or replaced."""
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.randint(0, 20))
        other = rng.randrange(len(text) + 1)
        new = rng.choice(("", rng.choice(WORDS), text[other : other + 40]))
        text = text[:start] + new + text[stop if rng.random() < 0.6 else start :]
    return text


@pytest.mark.parametrize("block", range(4))
def test_random_texts_are_mistakes_or_programs(block: int) -> None:
    sources = [library_source().text or "", *(path.read_text(encoding="utf-8") for path in EXAMPLES)]
    sources += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("cases/*/*.case"))]
    for seed in range(block * 150, block * 150 + 150):
        rng = random.Random(seed)
        if seed % 4 == 0:
            text = "".join(rng.choice(WORDS) + rng.choice(("", " ")) for _ in range(rng.randint(1, 300)))
        else:
            text = mutated(rng, rng.choice(sources))
        if not codes(text):
            for cascade in parse_program(text):
                assert parse_cascade(render(cascade)) == cascade


def test_random_bytes_are_mistakes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        try:
            parse_program(decode(bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))))
        except CascadeError as error:
            assert str(error).isprintable() or "\n" in str(error)


# --- cost --------------------------------------------------------------------------------------------------------------


def test_a_long_cascade_is_read_in_linear_time() -> None:
    def text(count: int) -> str:
        lines = "".join(f"    Z{i}[m,n] = sum[k] A[m,k] * B[k,n] / sqrt(K) where n <= m\n" for i in range(count))
        return HEAD.replace("Z[", "Z0[") + lines + "}\n"

    def read(text: str) -> None:
        assert render(parse_cascade(text)) == text

    read(text(10))
    short, long = (least(read, 3 * [text(count)]) for count in (500, 2_000))
    assert within(long, 4) and long < 8 * short + 0.5


def test_the_library_is_parsed_only_when_it_is_needed() -> None:
    program = (
        "import sys\n"
        "from cascade.frontend import build\n"
        f"build.parse_cascade({MINIMAL!r})\n"
        "assert build.library.cache_info().currsize == 0 and not {'torch', 'triton'} & sys.modules.keys()\n"
        "build.parse_cascade('cascade f(A[N]) -> Z[] { Z = mean[n] A[n] }')\n"
        "assert build.library.cache_info().currsize == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


# --- the library -------------------------------------------------------------------------------------------------------


def value(text: str, **tensors: torch.Tensor) -> torch.Tensor:
    """The only result of a cascade in float64."""
    cascade = parse_cascade(text) if "{" in text else library_uses([text])[-1]
    assert isinstance(cascade, Cascade)
    verify(cascade)
    (result,) = run(cascade, tensors, precision=Precision.REFERENCE).values()
    return result


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


X, SCALE, SHIFT = normal(3, 8), normal(8), normal(1, 8)[0]


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ("softmax[d] X[t,d]", (300 * X).softmax(-1)),
        ("logsoftmax[d] X[t,d]", (300 * X).log_softmax(-1)),
        ("X[t,d] - logsumexp[d] X[t,d]", 300 * X - (300 * X).logsumexp(-1, keepdim=True)),
        ("X[t,d] - mean[d] X[t,d]", 300 * X - (300 * X).mean(-1, keepdim=True)),
        ("rmsnorm[d](X[t,d], g[d])", torch.nn.functional.rms_norm(300 * X, (8,), SCALE, 1e-6)),
        ("rmsnorm_eps[d](X[t,d], g[d], 10)", torch.nn.functional.rms_norm(300 * X, (8,), SCALE, 10)),
        ("layernorm[d](X[t,d], g[d], b[d])", torch.nn.functional.layer_norm(300 * X, (8,), SCALE, SHIFT, 1e-5)),
        ("layernorm_eps[d](X[t,d], g[d], b[d], 9)", torch.nn.functional.layer_norm(300 * X, (8,), SCALE, SHIFT, 9)),
        ("softplus(X[t,d])", torch.logaddexp(300 * X, torch.zeros_like(X))),
        ("gelu_tanh(X[t,d] / 300)", torch.nn.functional.gelu(X, approximate="tanh")),
        ("softcap(X[t,d], 30)", 30 * torch.tanh(10 * X)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_functions_of_the_library(expr: str, expected: torch.Tensor) -> None:
    uses = ", g[D]" * ("g[d]" in expr) + ", b[D]" * ("b[d]" in expr)
    tensors = {name: tensor for name, tensor in (("g", SCALE), ("b", SHIFT)) if f", {name}[D]" in uses}
    close(value(f"cascade f(X[T,D]{uses}) -> Y[T,D] {{ Y[t,d] = {expr} }}", X=300 * X, **tensors), expected)


def test_attention_of_the_library() -> None:
    Q, K, V, N = normal(2, 3, 5, 4), normal(2, 3, 7, 4), normal(2, 3, 7, 6), normal(2, 3, 5, 6)
    attend = torch.nn.functional.scaled_dot_product_attention
    close(value("attention", Q=Q, K=K, V=V), attend(Q, K, V))
    close(value("causal_attention", Q=Q, K=2 * Q, V=N), attend(Q, 2 * Q, N, is_causal=True))


def test_layers_of_the_library() -> None:
    gate, up, down = normal(8, 5), normal(5, 8).T, normal(5, 8)
    close(value("swiglu", X=X, Wg=gate, Wu=up, Wd=down), (torch.nn.functional.silu(X @ gate) * (X @ up)) @ down)
    router, first, second = normal(8, 4), normal(4, 8, 5), normal(4, 5, 8)
    weights, experts = (X @ router).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden = torch.nn.functional.silu(torch.einsum("td,tjdf->tjf", X, first[experts]))
    close(
        value("moe", X=X, Wr=router, W1=first, W2=second),
        torch.einsum("tj,tjf,tjfd->td", weights, hidden, second[experts]),
    )


def test_rotary_embedding_of_the_library() -> None:
    tensor, positions = normal(2, 3, 9, 8), torch.arange(18).reshape(2, 9) * 7
    close(value("rope", X=tensor), rotated(tensor, torch.arange(9)))
    close(value("rope_at", X=tensor, P=positions), rotated(tensor, positions[:, None]))


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The half-split convention as model code has it."""
    size = x.shape[-1]
    angles = positions[..., None] * 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.cat((angles, angles), -1)
    return x * angles.cos() + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1) * angles.sin()
