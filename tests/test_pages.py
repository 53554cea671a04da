"""The inspector's pages in Chromium, from disk, without a network.

Skipped, and counted, where no browser is installed: `make test` installs Debian's.
"""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from cascade.cli import run_command
from cascade.frontend.build import parse_cascade
from cascade.inspector import Asked, inspect, panels
from cascade.inspector.page import Page
from cascade.pipeline import run_pipeline
from tests import pages
from tests.pages import opened, page_of
from tests.timing import within

pytestmark = pytest.mark.skipif(pages.executable() is None, reason="no Chromium: apt-get install chromium")
ALL = tuple(pages.SHOWN)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with pages.browser() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pages")
    return functools.cache(lambda name: page_of(name).save(folder / f"{name}.html"))


def text_of(tab: Any, place: str) -> str:
    """The text of a panel, which is made for it."""
    tab.evaluate("place => { location.hash = place; }", place)
    tab.wait_for_function("place => document.getElementById(place)?.childElementCount > 1", arg=place)
    return str(tab.text_content(f"#{place}"))


@pytest.mark.parametrize("name", ALL)
def test_every_panel_shows_its_data(name: str, chromium: Any, files: Any) -> None:
    data = page_of(name).data
    with opened(chromium, files(name)) as (tab, wrong):
        assert tab.inner_text("h1").startswith(data["program"]["cascade"])
        shown = {
            place: text_of(tab, place) for place in tab.eval_on_selector_all(".panel", "all => all.map(p => p.id)")
        }
        assert all(one["text"] in shown["equations"] for one in data["program"]["written"])
        assert tab.locator("#equations math").count() == len(data["program"]["written"])
        assert tab.locator("#graph a.node").count() == len(data["analysis"]["graphs"]["plain"]["nodes"])
        for rank, found in data["analysis"]["ranks"].items():
            if found["plain"] > 1:
                assert f"{found['plain']} passes as written, {found['lifted']} lifted" in shown["passes"], rank
        assert all(step["name"] in shown["pipeline"] for step in data["steps"])
        assert all(one["name"] in shown["kernels"] for found in data["kernels"] for one in found["kernels"])
        assert ("cost" in shown) == bool(data["costs"]) and ("plan" in shown) == bool(data["plans"])
        for found in data["costs"]:
            assert (
                all(einsum in shown["cost"] for einsum in found["per_einsum"]) and found["summary"][0] in shown["cost"]
            )
        for found in data["plans"]:
            assert all(task["name"] in shown["plan"] for task in found["tasks"])
            assert tab.locator("#plan a.task").count() == len(found["tasks"])
            assert tab.locator("#plan a.critical").count() == len(found["critical"])
        assert wrong == []


def linked(tab: Any, kind: str) -> list[str]:
    return [
        str(text).strip() for text in tab.eval_on_selector_all(f"{kind}.linked", "all => all.map(n => n.textContent)")
    ]


def test_statements_and_lines_of_a_kernel_point_at_each_other(chromium: Any, files: Any) -> None:
    with opened(chromium, files("attention"), "kernels") as (tab, wrong):
        tab.get_by_role("button", name="D[b,h,m] = sum[n] P[b,h,m,n]").click()
        lines = [re.sub(r"^\d+", "", text).strip() for text in linked(tab, "span.line")]
        assert "D = D * R_shift + D_1" in lines and not any(line.startswith("S = ") for line in lines)
        assert all(re.search(r"\bD\b|\bD_", line) or line.endswith(("(", ")")) or "," in line for line in lines), lines
        tab.get_by_role("button", name="D[b,h,m] = sum[n] P[b,h,m,n]").click()  # lets go of it
        tab.locator("span.line", has_text="S = tl.dot(q, k.T)").first.hover()
        assert (
            [text for text in linked(tab, "li")]
            == [text for text in linked(tab, "li") if text.startswith("S[b,h,m,n] =")]
            != []
        )
        assert wrong == []


def test_deep_links_open_what_they_name(chromium: Any, files: Any) -> None:
    kernel = page_of("mixture").data["kernels"][0]["kernels"][-1]
    number = next(number for number, names in kernel["lines"])
    for place, words in ((f"kernel-{kernel['name']}-L{number}", kernel["text"][number - 1]), ("def-H", "H[t,j,f]")):
        with opened(chromium, files("mixture"), place) as (tab, wrong):
            tab.wait_for_selector(".here")
            assert words.strip() in tab.inner_text(".here") and tab.locator(".here").is_visible() and wrong == []


def test_a_name_in_an_equation_leads_to_its_definition(chromium: Any, files: Any) -> None:
    with opened(chromium, files("attention"), "equations") as (tab, _):
        tab.locator("#def-O math .name", has_text="D").click()
        tab.wait_for_selector("#def-D.here")


def test_every_link_leads_somewhere(chromium: Any, files: Any) -> None:
    """What passes made stands among the statements as they run, which are shown for it."""
    for name in ALL:
        with opened(chromium, files(name)) as (tab, wrong):
            tab.evaluate("dispatchEvent(new Event('beforeprint'))")
            for place in sorted(set(tab.eval_on_selector_all("main a", "all => all.map(a => a.getAttribute('href'))"))):
                tab.evaluate("place => { location.hash = place; }", place)
                tab.wait_for_function("place => document.getElementById(place.slice(1))", arg=place)
            assert wrong == []


def test_keys(chromium: Any, files: Any) -> None:
    with opened(chromium, files("attention")) as (tab, wrong):
        tab.keyboard.press("n")
        tab.wait_for_function("location.hash === '#equations'")
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.keyboard.press("t")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.keyboard.press("]")
        assert "inline" in tab.inner_text("#pipeline output")
        tab.keyboard.press("?")
        assert tab.locator("dialog").is_visible()
        tab.keyboard.press("Escape")
        tab.wait_for_selector("dialog", state="hidden")
        tab.keyboard.press("/")
        tab.wait_for_function("document.activeElement.id === 'search'")
        tab.keyboard.type("P")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#def-P.here")
        assert wrong == []


@pytest.mark.parametrize("name", ALL)
def test_a_phone_shows_it_without_scrolling_sideways(name: str, chromium: Any, files: Any) -> None:
    with opened(chromium, files(name), viewport={"width": 390, "height": 800}) as (tab, _):
        for place in tab.eval_on_selector_all(".panel", "all => all.map(p => p.id)"):
            text_of(tab, place)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_prints_whole(chromium: Any, files: Any) -> None:
    with opened(chromium, files("plan")) as (tab, wrong):
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        kernels = [one for found in page_of("plan").data["kernels"] for one in found["kernels"] if "text" in one]
        assert tab.locator("details.kernel-box[open] pre").count() == len(kernels)
        assert len(tab.pdf()) > 50_000 and wrong == []


@pytest.mark.parametrize("name", ALL)
def test_axe_finds_nothing_serious(name: str, chromium: Any, files: Any) -> None:
    with opened(chromium, files(name)) as (tab, _):
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # everything is made, every box is open
        tab.add_script_tag = lambda **given: tab.evaluate(given["content"])  # the page lets no other script run
        for theme in ("light", "dark"):
            tab.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
            found = Axe().run(tab).response["violations"]
            nodes = [
                (one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")
            ]
            assert nodes == [], theme


INJECTED = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<img src=x onerror='hacked=1'>",
    "<svg onload=hacked=1>", "javascript:hacked=1", "\" onmouseover=\"hacked=1", "' onfocus='hacked=1", "<!--", "-->",
    "<!--<script>", "]]>", "<![CDATA[", "&lt;script&gt;", "&#60;b&#62;", "\\u003cscript\\u003e", "${hacked = 1}",
    "{{hacked}}", "`;hacked=1;`", "</style><style>*{display:none}</style>", "</title><h1>x</h1>", "<iframe srcdoc='x'>",
    "<base href='http://x/'>", "<meta http-equiv=refresh content='0'>", "\u2028hacked=1", "<a href=//x>__proto__</a>",
]  # fmt: skip


def with_text(value: Any, old: str, new: str) -> Any:
    """Data with one text for another, in keys as well."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {with_text(key, old, new): with_text(one, old, new) for key, one in value.items()}
    return [with_text(one, old, new) for one in value] if isinstance(value, list | tuple) else value


NAMED = """# comment-of-mine
cascade longname(victim[M,N]) -> Y[M] { # comment-of-mine
    prey[m,n] = exp(victim[m,n])  # comment-of-mine
    Y[m] = sum[n] prey[m,n]
}
"""


TAGS = "[...document.querySelectorAll('*')].map(node => node.localName).sort().join()"


@pytest.mark.parametrize("place", ["victim", "comment-of-mine", "file-of-mine"])
def test_text_of_a_program_is_inert(place: str, chromium: Any, tmp_path: Path) -> None:
    """Every string as the name of a tensor, in a comment and as the name of the file: it is shown as it stands."""
    assert len(INJECTED) == 25
    plain = made(NAMED, "file-of-mine")
    kernels = copy.deepcopy(plain.data["kernels"])
    usual = ""
    for number, text in enumerate(["harmless", *INJECTED]):
        data = with_text(plain.data, place, text)
        for old, new in zip(kernels[0]["kernels"], data["kernels"][0]["kernels"], strict=True):
            new["text"] = old["text"] if text == "harmless" else [text for _ in old["text"]]
        with opened(chromium, Page(text, data).save(tmp_path / f"{number}.html")) as (tab, wrong):
            tab.evaluate("dispatchEvent(new Event('beforeprint'))")
            assert tab.evaluate("window.hacked") is None and wrong == [], text
            assert text == "harmless" or text in tab.evaluate("document.body.textContent")
            found = re.sub(r"(span|a)(,(span|a))*", "", tab.evaluate(TAGS))  # lines of kernels, and their colours
            usual = found if text == "harmless" else usual
            assert found == usual, text


def test_a_file_with_such_a_name_and_such_comments(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "<img src=x onerror='hacked=1'>.cascade"
    file.write_text(NAMED.replace("comment-of-mine", "</script><script>hacked = 1</script>"), encoding="utf-8")
    path = tmp_path / "page.html"
    assert run_command(["inspect", str(file), "--no-compile", "-o", str(path)]) == 0
    with opened(chromium, path) as (tab, wrong):
        assert tab.evaluate("window.hacked") is None and wrong == []
        assert file.name in tab.text_content("#overview") and "</script><script>" in tab.text_content("#overview pre")


def made(text: str, file: str) -> Page:
    """A page without kernels' facts, of a program in a file of that name."""
    return inspect(run_pipeline(parse_cascade(text, file)), Asked(compiled=False))


def layers(count: int) -> str:
    """A model of so many layers: a norm, a gate, a residual."""
    params, body = ["X0[T,D]"], []
    for n in range(count):
        params += [f"g{n}[D]", f"W{n}[F,D]", f"V{n}[D,F]"]
        body += [f"N{n}[t,d] = rmsnorm[d](X{n}[t,d], g{n}[d])", f"H{n}[t,f] = silu(sum[d] N{n}[t,d] * W{n}[f,d])"]
        body += [f"X{n + 1}[t,d] = X{n}[t,d] + sum[f] H{n}[t,f] * V{n}[d,f]"]
    return f"cascade model({', '.join(params)}) -> X{count}[T,D] {{\n    " + "\n    ".join(body) + "\n}\n"


def test_a_model_of_a_hundred_layers_opens_at_once(chromium: Any, tmp_path: Path) -> None:
    """The program and its passes are a model's of a hundred layers; of its kernels one layer's, a hundred times."""
    trace = run_pipeline(parse_cascade(layers(100)), check=0)
    data = {**made(layers(1), "model.cascade").data, "program": panels.program(trace), "steps": panels.steps(trace)}
    data["analysis"] = panels.analysis(trace, {}, None)
    (found,) = copy.deepcopy(data["kernels"])
    layer = found["kernels"]
    found["kernels"] = [{**one, "name": f"{one['name']}_{n}"} for n in range(100) for one in layer]
    path = Page("model", {**data, "kernels": [found]}).save(tmp_path / "model.html")
    assert path.stat().st_size > 1_000_000, "it is a large page"
    started = time.perf_counter()
    with opened(chromium, path) as (tab, wrong):
        tab.wait_for_selector("#overview pre")
        taken = time.perf_counter() - started
        assert within(taken, 2.0), f"{taken:.2f} s"
        for place in ("equations", "graph", "passes", "pipeline", "kernels"):
            started = time.perf_counter()
            text_of(tab, place)
            taken = time.perf_counter() - started
            assert within(taken, 2.0), f"{place}: {taken:.2f} s"
        assert tab.locator("#equations li").count() > 600 and wrong == []


def test_a_notebook_shows_it_in_a_frame(chromium: Any, files: Any, tmp_path: Path) -> None:
    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><title>n</title>{page_of('attention')._repr_html_()}", encoding="utf-8")
    with opened(chromium, outer) as (tab, wrong):
        frame = tab.frame_locator("iframe")
        frame.locator("h1").wait_for()
        assert frame.locator("h1").inner_text().startswith("attention")
        assert frame.locator("#def-S math").count() == 1
        assert [text for text in wrong if "about:srcdoc" not in text] == []
