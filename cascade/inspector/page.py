"""The page: one HTML file without anything from elsewhere, which opens from disk.

The data of the panels stands in it as JSON with every character escaped that could end its element; the script makes
elements of it by `textContent` alone. A content security policy lets nothing run but that script, by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cascade.files import write_whole

SCRIPTS = ("elements.js", "drawings.js", "panels.js", "page.js")
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the inspector: its title, and what it shows.

    `html` is the file; notebooks show it in a frame of their own.
    """

    title: str
    data: Mapping[str, Any]

    @property
    def html(self) -> str:
        """The whole file."""
        script, style = "\n".join(asset(name) for name in SCRIPTS), asset("page.css")
        policy = f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; base-uri 'none'"
        filled = {
            "POLICY": policy, "TITLE": html.escape(self.title), "STYLE": style, "SCRIPT": script,
            "DATA": embedded(self.data),
        }  # fmt: skip
        parts = asset("page.html").split("@@")  # text and names of places in turn: what is filled in is not looked at
        return "".join(filled[part] if number % 2 else part for number, part in enumerate(parts))

    @property
    def panels(self) -> list[str]:
        """What the page has: the parts of its data that are not empty."""
        return [name for name, part in self.data.items() if part and name != "version"]

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all; CommandError where it cannot be written."""
        write_whole(Path(path), self.html)
        return Path(path)

    def show(self, path: str | Path) -> None:
        """Writes the file and opens it in the browser of this machine."""
        webbrowser.open(self.save(path).resolve().as_uri())

    def _repr_html_(self) -> str:
        """In a notebook: the page in a frame, apart from the notebook's own styles and scripts."""
        return (
            f'<iframe title="{html.escape(self.title)}" srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            'width="100%" height="800" style="border: 1px solid #888"></iframe>'
        )


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: no text in it can end the element or be read as markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return "".join(ESCAPED.get(letter, letter) for letter in text) if any(c in text for c in ESCAPED) else text


@functools.cache
def asset(name: str) -> str:
    """A part of the page that comes with the project."""
    return (resources.files("cascade.inspector") / "assets" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
