"""The inspector without a browser: maths says what the text says, columns are trips, lines belong to statements.

Witnesses: a tree of MathML is written as text and parsed again; columns are compared with brute pass counts; the lines
of a statement are looked for by the words in them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import cascade
from cascade.backends.triton.explain import Launch
from cascade.backends.triton.forecast import launches
from cascade.backends.triton.machine import machine
from cascade.errors import CommandError
from cascade.frontend.build import parse_cascade
from cascade.inspector import Asked, Ran, inspect
from cascade.inspector.graph import graph
from cascade.inspector.links import line_names, owner
from cascade.inspector.maths import LARGEST, typeset
from cascade.inspector.page import Page, embedded
from cascade.inspector.panels import critical
from cascade.ir import Call, Cascade, DType
from cascade.passes.pass_count import all_passes
from cascade.pipeline import run_pipeline
from cascade.text import render_stmt
from cascade.walk import defines
from tests.generate import random_cascade
from tests.kernel_programs import PROGRAMS

EXAMPLES = Path(__file__).parent.parent / "examples"
ATTENTION = (EXAMPLES / "attention.cascade").read_text(encoding="utf-8")
WORDS = {
    "⋅": "*", "≤": "<=", "≥": ">=", "≠": "!=", "−": "-", "∧": " and ", "∨": " or ", "div": "//", "mod": "%", "∞": "inf",
    "∑": "sum", "∏": "prod", "not": "not ", "??": " ?? ",
}  # fmt: skip


def canonical(text: str) -> Cascade:
    return run_pipeline(parse_cascade(text), "canonicalize").final


# --- maths -----------------------------------------------------------------------------------------------------------


def written(tree: Any, equals: bool = True) -> str:
    """A tree as the language would write it. Only the first equals sign is an assignment, which `equals` tells."""
    if isinstance(tree, str):
        return tree
    tag, _, *inner = tree
    match tag:
        case "mfrac":
            return f"(({written(inner[0])}) / ({written(inner[1])}))"
        case "msqrt":
            return f"sqrt({written(inner[0])})"
        case "msup":
            return f"pow({written(inner[0])}, {written(inner[1])})"
        case "msub" | "munder":
            return f"{written(inner[0])}[{written(inner[1])}]"
        case "mspace":
            return " "
        case "mtext":
            return f" {inner[0]} "
        case "mo" | "mn" | "mi":
            return re.sub("|".join(map(re.escape, WORDS)), lambda found: WORDS[found.group()], inner[0])
        case "mrow" if is_cast(inner):
            return f"cast({written(inner[1])[1:-1]}, {inner[0][2]})"
        case _:
            return "".join(written(part) for part in inner)


def is_cast(inner: list[Any]) -> bool:
    names = ("bf16", "f16", "f32", "f64", "i8", "i32", "i64", "f8e4m3", "f8e5m2")
    return len(inner) == 2 and inner[0][0] == "mi" and inner[0][2] in names


def parsed_again(found: Cascade) -> Cascade:
    """The cascade with every statement that is typeset taken from its tree, comparisons and the assignment apart."""
    text = str(found)
    for stmt in found.body:
        tree = typeset(stmt)
        assert tree is not None, render_stmt(stmt)
        assignments = 1 + (len(stmt.inits) if hasattr(stmt, "inits") else 0)
        pieces = re.split(r"(?<![<>=!])=(?!=)", written(tree))
        text = text.replace(f"    {render_stmt(stmt)}\n", f"    {joined(pieces, assignments, written(tree))}\n", 1)
    return parse_cascade(text, name=found.name)


def joined(pieces: list[str], assignments: int, whole: str) -> str:
    """The text with `==` for every equals sign that assigns nothing: the first assigns, and one behind each `init`."""
    head, *rest = pieces
    assert len(rest) >= 1, whole
    before, *after = " = ".join([head, "==".join(rest)]).split(" init ")
    return " init ".join([before, *(part.replace("==", " = ", 1) for part in after)])


SHORT = [name for name, program in PROGRAMS.items()]


@pytest.mark.parametrize("name", SHORT)
def test_maths_of_programs_reads_as_their_text(name: str) -> None:
    found = parse_cascade(PROGRAMS[name].text)
    assert parsed_again(found) == found


@pytest.mark.parametrize("seed", range(60))
def test_maths_of_random_cascades_reads_as_their_text(seed: int) -> None:
    found = random_cascade(seed)
    assert parsed_again(found) == found


def test_maths_after_every_pass_reads_as_its_text() -> None:
    for step in run_pipeline(parse_cascade(ATTENTION)).steps:
        assert parsed_again(step.after) == step.after


def test_what_is_too_long_stays_text() -> None:
    long = " + ".join(f"X[m,{number}] * X[m,{number + 1}]" for number in range(LARGEST // 4))
    (stmt,) = parse_cascade(f"cascade c(X[M,N]) -> Y[M] {{ Y[m] = {long} }}").body
    assert typeset(stmt) is None
    deep = "(" * 45 + "X[m]" + " + 1)" * 45
    (stmt,) = parse_cascade(f"cascade c(X[M]) -> Y[M] {{ Y[m] = {deep} }}").body
    assert typeset(stmt) is None


def test_a_call_is_typeset() -> None:
    text = "cascade a(X[M]) -> Y[M] { Y[m] = X[m] }\ncascade b(X[M]) -> Z[M] { Z = a(X) }"
    (stmt,) = parse_cascade(text, name="b").body
    assert isinstance(stmt, Call) and written(typeset(stmt)) == "Z=a(X)"


# --- the graph -------------------------------------------------------------------------------------------------------


def columns(found: Cascade) -> dict[str, int]:
    return {place.name: place.column for place in graph(found).places}


def test_columns_are_trips() -> None:
    found = columns(canonical(ATTENTION))
    assert found == {"Q": 0, "K": 0, "V": 0, "S": 1, "R": 1, "P": 2, "D": 2, "O": 3}
    assert max(columns(run_pipeline(parse_cascade(ATTENTION)).final).values()) == 1, "one trip after lifting"


@pytest.mark.parametrize("name", SHORT)
def test_a_graph_has_as_many_columns_as_its_longest_chain_of_passes(name: str) -> None:
    """Every edge stays or goes to the right; a chain that forces p passes over a rank spans p columns at least."""
    found = canonical(PROGRAMS[name].text)
    drawn, at = graph(found), columns(found)
    assert all(at[a] <= at[b] for a, b in drawn.edges)
    first = {n: defines(stmt)[0] for stmt in found.body for n in defines(stmt)}
    for passes in all_passes(found).values():
        chain = [at[first[name]] for name in passes.witness if name in first]
        assert passes.count <= 1 or chain == sorted(set(chain)), (passes.rank, passes.witness)
    assert len({(place.column, place.row) for place in drawn.places}) == len(drawn.places), "no two in one place"


# --- links -----------------------------------------------------------------------------------------------------------


def shown(text: str, **asked: Any) -> Page:
    return inspect(run_pipeline(parse_cascade(text)), Asked(compiled=False, **asked))


def only_kernel(text: str, **asked: Any) -> dict[str, Any]:
    (found,) = shown(text, **asked).data["kernels"]
    (kernel,) = found["kernels"]
    return dict(kernel)


def test_lines_of_a_kernel_belong_to_what_they_compute() -> None:
    kernel = only_kernel(ATTENTION)
    lines = {kernel["text"][number - 1].strip(): names for number, names in kernel["lines"]}
    assert lines["S = tl.dot(q, k.T)"] == ["S"]
    assert lines["D = D * R_shift + D_1"] == ["D"]
    assert lines["P_bf16 = P.to(BF16)" if "P_bf16 = P.to(BF16)" in lines else "P_bf16 = P.to(tl.bfloat16)"] == ["P"]
    assert lines["O_sum = tl.dot(P_bf16, v, O_sum)"] == ["O_sum"]
    assert lines["R = R_next"] == ["R"]
    helpers = [number for number, text in enumerate(kernel["text"], 1) if text.startswith("def quotient")]
    assert helpers and not any(0 < number - helpers[0] < 5 for number, _ in kernel["lines"])


@pytest.mark.parametrize("name", ["causal", "softmax", "layernorm", "gemm", "with_entropy", "norm_gemm", "gated"])
def test_every_statement_has_lines_and_every_line_has_its_word(name: str) -> None:
    (found,) = shown(PROGRAMS[name].text).data["kernels"]
    linked = {word for kernel in found["kernels"] for _, names in kernel["lines"] for word in names}
    by_library = {
        n for one in found["kernels"] if one["programs"] is None for s in one["statements"] for n in s["names"]
    }
    assert {result.name for result in parse_cascade(PROGRAMS[name].text).results} <= linked | by_library
    for kernel in found["kernels"]:
        for number, names in kernel["lines"]:
            words = re.findall(r"[A-Za-z_]\w*", " ".join(kernel["text"][number - 3 : number + 2]))
            for one in names:
                assert any(word == one or word.lower().startswith(one.lower()) for word in words), (one, words)


def test_owners_of_variables() -> None:
    known = {"S", "R", "R_frame", "O_sum", "Q", "K"}
    pairs = {
        "R_next": "R",
        "R_frame_1": "R_frame",
        "O_sum": "O_sum",
        "q": "Q",
        "k_place": "K",
        "m_first": None,
        "live": None,
    }
    assert {word: owner(word, known) for word in pairs} == pairs
    assert owner("x", {"X", "x_"}) == "X" and line_names("def other():\n    S = 1\n", "k", known) == {}


def test_statements_know_their_line_and_their_author() -> None:
    program = shown(ATTENTION).data["program"]
    lines = ATTENTION.split("\n")
    for one in program["written"]:
        assert lines[one["line"] - 1].strip().startswith(one["names"][0])
    assert {one["names"][0]: one["origin"] for one in program["final"]}["O_sum"] == "O"


# --- what a page has -------------------------------------------------------------------------------------------------


def test_panels_are_those_of_the_machines() -> None:
    sizes = {"B": 1, "H": 8, "M": 1024, "N": 1024, "E": 64, "F": 64}
    data = shown(ATTENTION, machines=("a100", "fusemax"), sizes=sizes).data
    assert [found["machine"] for found in data["kernels"]] == ["a100"]
    assert [found["machine"] for found in data["costs"]] == ["fusemax"] and data["plans"] == []
    assert data["costs"][0]["searched"] and data["costs"][0]["utilisation"]
    assert data["analysis"]["ranks"]["n"]["plain"] == 3 and data["analysis"]["ranks"]["n"]["lifted"] == 1
    names = [step["name"] for step in data["steps"]]
    assert names == ["source", *(step.name for step in run_pipeline(parse_cascade(ATTENTION)).steps)]


def test_steps_say_what_is_gone_and_what_has_come() -> None:
    trace = run_pipeline(parse_cascade(ATTENTION))
    for shown_step, step in zip(shown(ATTENTION).data["steps"][1:], trace.steps, strict=True):
        after = [line for mark, line in shown_step["lines"] if mark != "-"]
        before = [line for mark, line in shown_step["lines"] if mark != "+"]
        if shown_step["changed"]:
            assert "\n".join(after) == str(step.after) and "\n".join(before) == str(step.before)


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(CommandError) as error:
        shown(ATTENTION, machines=("h20",))
    assert error.value.diagnostics[0].code == "C605" and "h200" in str(error.value)


def test_what_no_kernel_holds_is_told_on_the_page() -> None:
    found = shown("cascade c(X[M,N]) -> Y[] { Y = sum[m,n] X[m,n] }").data["kernels"][0]
    assert found.get("refused") or all("text" in one or one["reason"] for one in found["kernels"])


LIBRARY = "# no kernel of its own: PyTorch's library of matrix products multiplies, on a GPU cuBLAS"


def test_what_a_library_does_has_no_text_but_that() -> None:
    """Planned and run: a gated product at a size at which one of its two products is the library's."""
    text, sizes = PROGRAMS["gated"].text, {"M": 8192, "N": 8192, "K": 4096}
    trace = run_pipeline(parse_cascade(text))
    (planned,) = inspect(trace, Asked(compiled=True, sizes=sizes)).data["kernels"]
    gpu = machine("h200")
    found = launches(trace.final, sizes, dict.fromkeys(("A", "B", "G"), DType.BF16), gpu)
    own = [one for one in found if isinstance(one, Launch) and not one.by_library]
    ran = Ran(found, {one.kernel.name: "def kernel(): ..." for one in own}, gpu)
    (after,) = inspect(trace, Asked(compiled=False), ran).data["kernels"]
    assert len(found) == 2 and len(own) == 1
    for shown_kernels, other in ((planned, "import triton"), (after, "def kernel(): ...")):
        library, rest = shown_kernels["kernels"]
        assert library["text"] == [LIBRARY] and library["programs"] is None and library["static"] is None
        assert other in rest["text"] and rest["programs"] > 0
    assert planned["kernels"][1]["static"]["wgmma"] > 0


def test_a_compiled_cascade_shows_itself() -> None:
    page = cascade.parse(ATTENTION).inspect(compiled=False)
    assert page.data["program"]["cascade"] == "attention" and page.data["kernels"][0]["ran"] is False
    frame = page._repr_html_()
    assert frame.startswith("<iframe") and "<script>" not in frame.partition("srcdoc=")[2].replace("&lt;", "")


def test_a_critical_path_is_a_chain() -> None:
    tasks = [
        {"name": "a", "start": 0.0, "end": 2.0, "resource": "sms", "waits": []},
        {"name": "b", "start": 2.0, "end": 5.0, "resource": "links", "waits": ["a"]},
        {"name": "c", "start": 2.0, "end": 4.0, "resource": "sms", "waits": []},
        {"name": "d", "start": 5.0, "end": 6.0, "resource": "sms", "waits": ["b"]},
    ]
    assert critical(tasks) == ["a", "b", "d"] and critical([]) == []
    late = {"name": "e", "start": 3.0, "end": 6.0, "resource": "copies", "waits": []}
    after = {"name": "f", "start": 6.0, "end": 7.0, "resource": "links", "waits": ["e"]}
    assert critical([*tasks, late, after]) == ["a", "b", "d", "f"], "what began late decides nothing"


def test_the_page_is_one_file_that_says_the_same_each_time(tmp_path: Path) -> None:
    page = shown(ATTENTION)
    path = page.save(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text == shown(ATTENTION).html and "http" not in re.sub(r"http://www\.w3\.org/[\w/]+|http-equiv", "", text)
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data == json.loads(json.dumps(page.data))


@pytest.mark.parametrize("text", ["</script><b>", "<!--", "]]>", "&lt;", "\u2028", '"\\', "@@DATA@@"])
def test_data_cannot_end_its_element(text: str) -> None:
    found = embedded({"x": text})
    assert not set("<>&\u2028") & set(found) and json.loads(found) == {"x": text}
    page = Page(text, {"program": text})
    assert page.html.count("</script>") == 2 and page.html.count("<script") == 2
