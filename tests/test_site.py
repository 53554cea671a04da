"""The site: it builds without a warning, every link in it leads somewhere, and what nobody wrote by hand is true."""

from __future__ import annotations

import fcntl
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import cascade
from benchmarks import gallery, kept, shown
from cascade.cli import commands, run_command
from cascade.settings import settings
from docs.generate import every_command
from tests.blocks import ROOT, blocks_of

GENERATED = ROOT / "docs" / "generated"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def site() -> Path:
    """The site, built once for all workers; a warning is an error."""
    folder = settings().cache_dir / "site"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.html").exists():
            argv = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
            quick = {**os.environ, "CASCADE_CHECK": "0"}  # the programs of the gallery are checked elsewhere
            done = subprocess.run(argv, cwd=ROOT, env=quick, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return folder


# --- links -----------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page links to, what it loads, and the names of its places."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {given[key] or "" for key in ("id", "name") if key in given}
        if tag == "a" and given.get("href"):
            self.targets.append(given["href"] or "")
        for key in ("src", "srcset", "data"):
            if given.get(key) and tag != "a":
                self.loaded.append(given[key] or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(given.get("href") or "")


@functools.cache
def links(page: Path) -> Links:
    """The links of a page."""
    found = Links()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def pages() -> list[Path]:
    """Every page of the site."""
    return sorted(site().rglob("*.html"))


def dead(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere; those to elsewhere are looked at for their form only."""
    for target in links(page).targets + links(page).loaded:
        parts = urlsplit(target)
        if parts.scheme:
            if parts.scheme not in ("https", "mailto", "data") or (parts.scheme == "https" and not parts.netloc):
                yield target
            continue
        file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        is_page = file.suffix == ".html" and file.exists()
        if not file.exists() or (is_page and parts.fragment and unquote(parts.fragment) not in links(file).places):
            yield target


@pytest.mark.campaign
def test_every_link_and_every_anchor_of_the_site_resolves() -> None:
    assert len(pages()) > 40 and sum(len(links(page).targets) for page in pages()) > 1000
    assert {page.name: found for page in pages() if (found := list(dead(page)))} == {}


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("""<a href="page.html#here" id="here"></a> <a href="#there"></a> <img src="no.png">
        <a href="other.html#here"></a> <a href="http://example.org"></a> <a href="https://example.org/x#y"></a>""")
    assert list(dead(page)) == ["#there", "other.html#here", "http://example.org", "no.png"]


@pytest.mark.campaign
def test_the_site_needs_no_network() -> None:
    """Nothing that a page loads is elsewhere: no fonts, scripts, styles or pictures."""
    for page in pages():
        assert not [url for url in links(page).loaded if urlsplit(url).netloc], page
    for style in site().rglob("*.css"):
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.campaign
def test_every_page_is_in_the_site_and_every_public_name_on_its_page() -> None:
    assert all((site() / f"{path.stem}.html").exists() for path in DOCUMENTS[1:])
    reference = (site() / "generated" / "api.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", reference)
    assert [name for name in cascade.__all__ if not re.search(rf"\b(cs|cascade)\.{name}\b", text)] == []
    words = " ".join(text.split())
    for name in ("compile", "parse", "Compiled", "ranks"):  # docstrings, not only names
        first = (inspect.getdoc(getattr(cascade, name)) or "").split(".")[0].replace("`", "").replace("\n", " ")
        assert first.split(":")[0] in words, name
    assert "explain" in text and "sources" in text


# --- commands --------------------------------------------------------------------------------------------------------


def mentioned(text: str) -> Iterator[list[str]]:
    """Every command line of `cascadec` in a document: in blocks, and in text between backticks."""
    joined = text.replace("\\\n", " ")
    for line in re.findall(r"^\s*(?:\$ )?(cascadec .*)$", joined, re.M) + re.findall(r"`(cascadec [^`]*)`", joined):
        yield line.split()[1:]


def options_of(command: click.Command) -> set[str]:
    """The options that a command takes."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {"--help", "-h"}.union(*((*option.opts, *option.secondary_opts) for option in options))


def wrong(words: list[str]) -> str:
    """What is wrong with a command line that a document mentions; "" where nothing is."""
    known: click.Command = commands
    while isinstance(known, click.Group) and words and not words[0].startswith("-"):
        found = known.commands.get(words[0])
        if found is None:
            return f"no command {words[0]!r}"
        known, words = found, words[1:]
    given = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
    if unknown := given - options_of(known) - ({"--version"} if known is commands else set()):
        return f"no option {', '.join(sorted(unknown))} of {known.name}"
    return ""


def test_every_command_and_option_that_a_document_mentions_exists() -> None:
    told = [
        (path.name, words) for path in (*DOCUMENTS, ROOT / "CONTRIBUTING.md") for words in mentioned(path.read_text())
    ]
    told += [(name, words) for name, command in every_command() for words in mentioned(command.help or "")]
    assert len(told) > 60
    assert [f"{where}: {' '.join(words)}: {wrong(words)}" for where, words in told if wrong(words)] == []
    assert wrong(["sow", "x"]) and wrong(["show", "--aftr", "lift"]) and not wrong(["show", "x", "--after", "lift"])


@pytest.mark.campaign
def test_every_command_is_in_the_documents_as_its_help_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    site()
    page = (GENERATED / "commands.md").read_text()
    for name, command in every_command():
        assert run_command([*name.split()[1:], "--help"]) == 0
        section = page.split(f"## {name}\n\n```text\n")[1].split("\n```")[0]
        told = "".join(capsys.readouterr().out.split())  # lines are broken at blanks and hyphens, by their width
        assert "".join(section.split()) == told or isinstance(command, click.Group)
        assert all(option in section for option in options_of(command))


# --- numbers ---------------------------------------------------------------------------------------------------------


def naive(source: str, row: str, contender: str) -> float:
    """Milliseconds as a file has them, looked up in another way than `kept` does."""
    if source.endswith(".json"):
        table = json.loads((RESULTS / source).read_text())
        return float(next(found for found in table["rows"] if found["name"] == row)["ms"][contender])
    lines = (RESULTS / source).read_text().splitlines()
    titles = next(line for line in lines if line.startswith("workload"))
    end = titles.index(f"{contender} ms") + len(f"{contender} ms")  # columns are aligned right
    line = next(line for line in lines if line.startswith(f"{row} "))
    return float(re.sub(r" \([\d.]+\)$", "", line[:end]).split()[-1])


def test_rows_are_read_as_they_stand_in_the_files() -> None:
    found = {device: kept.rows(device) for device in gallery.DEVICES}
    for rows in found.values():
        for row in rows.values():
            assert all(ms == pytest.approx(naive(row.source, row.name, who)) for who, ms in row.ms.items())
    h200 = found["nvidia-h200"]
    assert len(h200) > 100
    for table in RESULTS.glob("*-nvidia-h200.json"):  # no later row of ours was passed over
        data = json.loads(table.read_text())
        for row in data["rows"]:
            if row.get("ms", {}).get(kept.OURS):
                assert h200[row["name"]].date >= data["date"].removesuffix(" UTC")


def test_a_table_that_was_kept_as_text_is_read_like_its_object(tmp_path: Path) -> None:
    for path in RESULTS.glob("*-nvidia-h200.json"):
        (tmp_path / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    from_text, whole = kept.rows("nvidia-h200", tmp_path), kept.rows("nvidia-h200")
    read = [name for name in whole if name in from_text and whole[name].source.endswith(".json")]
    assert len(read) > 100
    for name in read:
        assert set(from_text[name].ms) == set(whole[name].ms)
        assert all(from_text[name].ms[who] == pytest.approx(ms, rel=0.006) for who, ms in whole[name].ms.items())


def test_documents_show_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown.main(["--check"]) == 0, capsys.readouterr().out + "run python -m benchmarks.shown"
    readme = (ROOT / "README.md").read_text()
    row = kept.rows("nvidia-h200")["causal 4 32 4096 128"]
    assert f"| {naive(row.source, row.name, 'ours'):#.3g} |" in readme
    assert shown.filled(readme.replace("| 1.15 |", "| 1.14 |"), kept.rows(shown.DEVICE)) == readme
    inline = "<!-- begin generated: times flex of causal 4 32 4096 128 -->?<!-- end generated -->"
    ratio = naive(row.source, row.name, "flex") / naive(row.source, row.name, "ours")
    assert f"-->{ratio:.2f}<!--" in shown.filled(inline, kept.rows(shown.DEVICE))
    with pytest.raises(KeyError):
        shown.filled(inline.replace("flex", "nobody"), kept.rows(shown.DEVICE))


def test_titles_say_no_size_that_their_row_lacks() -> None:
    for row, title in (shown.SPEEDS | shown.PICTURED).items():
        assert set(re.findall(r"\d+", title)) <= set(re.findall(r"\d+", row)), title


def test_no_measured_number_is_typed_into_a_page() -> None:
    """Times and rates stand in what commands print and in what is generated, nowhere else."""
    for path in DOCUMENTS:
        prose = re.sub(
            r"^```.*?^```$|<!-- begin generated.*?end generated -->|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S
        )
        found = re.findall(r"\d[\d.]* ?(?:ns|us|ms|GB/s|TB/s|TF|TFLOP/s|x as fast|times as fast|of cuBLAS)\b", prose)
        assert not found, f"{path.name}: {found}"


# --- the gallery -----------------------------------------------------------------------------------------------------

KNOWN = {  # by hand, from the equations: passes over the rank that is reduced, as written and lifted
    "attention": "n: 3 -> 1", "decode": "n: 3 -> 1", "sigmoid": "each rank once", "softmax": "n: 3 -> 2",
    "entropy": "n: 3 -> 1", "cross-entropy": "v: 2 -> 1", "rmsnorm-linear": "d: 2 -> 1", "gelu": "each rank once",
}  # fmt: skip


@pytest.mark.campaign
def test_the_gallery_shows_twenty_cascades_and_what_was_measured_of_them() -> None:
    site()
    assert len(gallery.SHOWN) == 20
    for name, (row, title) in gallery.SHOWN.items():
        page = (GENERATED / "gallery" / f"{name}.md").read_text()
        assert page.startswith(f"# {title}\n")
        cells = re.findall(r"^\| [^|]*\| ([^|]+) \| ([^|]+) \| ([^|]*) \| `([^`]+)` \|$", page, re.M)
        assert cells, name
        for contender, shown_ms, ratio, source in cells:
            who = contender.removesuffix(", the product alone")
            if re.fullmatch(r"[\d.]+", shown_ms):
                assert float(shown_ms) == pytest.approx(naive(source, row, who), rel=0.006)
            else:
                assert shown_ms and not ratio.strip()
            if ratio.strip():
                assert float(ratio) == pytest.approx(naive(source, row, who) / naive(source, row, "ours"), abs=0.006)
        assert f"**{KNOWN.get(name, '')}" in page


@pytest.mark.campaign
def test_the_gallery_shows_what_the_compiler_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equations, passes and kernels of a page are what the commands print for what the page says."""
    site()
    for name in gallery.SHOWN:
        blocks = blocks_of((GENERATED / "gallery" / f"{name}.md").read_text())
        assert [block.kind for block in blocks[:2]] == ["cascade", "text"] and blocks[2:]
        for block in blocks[2:]:
            compile(block.text, name, "exec")
        assert any("@triton.jit" in block.text for block in blocks[2:])
    text = (GENERATED / "gallery" / "softmax.md").read_text()
    program, passes, kernel = (block.text for block in blocks_of(text))
    file, sizes = (
        tmp_path / "softmax_rows.cascade",
        re.findall(r"(\w+) = (\d+)", re.findall(r"^bf16, .*", text, re.M)[0]),
    )
    file.write_text(program)
    given = [word for size in sizes for word in ("-s", "=".join(size))]
    assert run_command(["passes", str(file), *given, "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.rstrip() == passes.rstrip()
    assert run_command(["emit", str(file), *given, "--backend", "triton", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "softmax_rows.py").read_text().rstrip() == kernel.rstrip()
