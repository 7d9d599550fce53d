"""The pages of the guide, which come with the package: `moetool guide PAGE` prints one.

A page is a Markdown file here: its first line is its title, its second paragraph what it is about.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moetool.errors import UsageError, did_you_mean

FOLDER = Path(__file__).resolve().parent


class Page(NamedTuple):
    """A page of the guide."""

    name: str
    title: str
    about: str
    text: str


def pages() -> list[Page]:
    """All of them, by name."""
    return [_read(file) for file in sorted(FOLDER.glob("*.md"))]


def page(name: str) -> Page:
    """One of them; UsageError where there is none of this name."""
    known = {found.name: found for found in pages()}
    if name not in known:
        raise UsageError(
            f"the guide has no page {name!r}",
            expected=", ".join(known),
            hint=did_you_mean(name, known),
        )
    return known[name]


def _read(file: Path) -> Page:
    text = file.read_text(encoding="utf-8")
    title, about, _ = text.split("\n\n", 2)
    return Page(file.stem, title.removeprefix("# "), " ".join(about.split()), text)
