"""The tables of README and the guide say what the registries say."""

from __future__ import annotations

import docs
import pytest


def test_no_table_is_stale() -> None:
    assert docs.stale(map(docs.Path.read_text, docs.PAGES)) == [], "run: python tests/docs.py"


def test_every_marked_table_is_made_and_every_table_is_marked() -> None:
    text = "".join(map(docs.Path.read_text, docs.PAGES))
    assert len(docs.PAGES) >= 6 and sorted(m[2] for m in docs.MARKED.finditer(text)) == sorted(
        docs.TABLES
    )
    assert text.count("<!-- table:") == len(docs.TABLES) == text.count("<!-- end -->")


def test_a_change_is_found_and_written_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    texts = list(map(docs.Path.read_text, docs.PAGES))
    old = [
        text.replace("| `reap`", "| `raep`").replace("recipes/upcycle/btx.yaml` |", "gone` |")
        for text in texts
    ]
    assert docs.stale(old) == ["ways of prune", "recipes"] and list(map(docs.written, old)) == texts
    with pytest.raises(KeyError):
        docs.written("".join(texts).replace("table: pairs", "table: peers"))
    pages = [docs.Path(str(tmp_path)) / page.name for page in docs.PAGES]
    for page, text in zip(pages, old, strict=True):
        page.write_text(text)
    monkeypatch.setattr(docs, "PAGES", pages)
    assert docs.main(["--check"]) == 1 and list(map(docs.Path.read_text, pages)) == old
    assert docs.main([]) == 0 and list(map(docs.Path.read_text, pages)) == texts
    assert docs.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("about", "first"),
    [
        ("One (arXiv 2510.13999): a sum. g is small.", "One (arXiv 2510.13999): a sum"),
        ("No end", "No end"),
        ("Two\n   lines. Three.", "Two lines"),
        ("Version 1.5 of it.", "Version 1.5 of it"),
    ],
)
def test_first_sentence(about: str, first: str) -> None:
    assert docs.sentence(about) == first


def test_bars_do_not_break_a_table() -> None:
    assert docs.markdown(["a"], [["|x|"]]) == "| a |\n| --- |\n| \\|x\\| |\n"
