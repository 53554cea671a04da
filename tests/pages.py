"""Pages of the inspector in a real browser: which are looked at, and how one is opened.

`python -m tests.pages DIR` writes pictures of the main views into a folder.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from cascade.frontend.build import parse_cascade
from cascade.inspector import Asked, inspect
from cascade.inspector.page import Page
from cascade.pipeline import run_pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"
BLOCK = {"T": 4096, "D": 8192, "H": 64, "HK": 8, "E": 128, "F": 28672}
HEADS = {"B": 1, "H": 8, "M": 4096, "N": 4096, "E": 64, "F": 64}
SHOWN = {
    "attention": ("attention", Asked(compiled=True)),
    "mixture": ("moe", Asked(compiled=False)),
    "cost": ("attention", Asked(sizes=HEADS, machines=("fusemax",), compiled=False)),
    "plan": ("tensor_parallel_block", Asked(sizes=BLOCK, machines=("h100x8",), compiled=False)),
}
VIEWS = {
    "attention-overview": ("attention", "overview"), "attention-kernels": ("attention", "kernels"),
    "attention-graph": ("attention", "graph"), "mixture-passes": ("mixture", "passes"), "cost": ("cost", "cost"),
    "plan": ("plan", "plan"),
}  # fmt: skip
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@functools.cache
def page_of(name: str) -> Page:
    """One of the pages that are looked at."""
    file, asked = SHOWN[name]
    return inspect(
        run_pipeline(parse_cascade((EXAMPLES / f"{file}.cascade").read_text("utf-8"), f"{file}.cascade")), asked
    )


def executable() -> str | None:
    """The browser of this machine; None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a network: whatever a page would ask for fails."""
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield found
        finally:
            found.close()


@contextlib.contextmanager
def opened(chromium: Any, path: Path, place: str = "", **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page from disk, and what went wrong in it: errors, complaints on the console, requests for anything else."""
    context = chromium.new_context(offline=True, **options)
    wrong: list[str] = []
    tab = context.new_page()
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda sent: None if sent.url.startswith(path.as_uri()) else wrong.append(sent.url))
    try:
        tab.goto(path.as_uri() + (f"#{place}" if place else ""))
        yield tab, wrong
    finally:
        context.close()


def main(folder: str) -> None:
    """Writes a picture of every view, in light and dark, and one as wide as a phone."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        for view, (name, place) in VIEWS.items():
            path = page_of(name).save(out.resolve() / f"{name}.html")
            for scheme, width in (("light", 1300), ("dark", 1300), ("light", 390)):
                size = {"width": width, "height": 1000}
                with opened(chromium, path, place, viewport=size, color_scheme=scheme) as (tab, _):
                    tab.wait_for_timeout(300)
                    tab.screenshot(path=out / f"{view}-{scheme if width > 390 else 'phone'}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
