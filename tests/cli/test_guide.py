"""The guide: which pages there are, a page as it lies in the package, and a page that is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import Done

from moetool import guide


def test_lists_every_page(moetool: Callable[..., Done]) -> None:
    names = [page.name for page in guide.pages()]
    assert names == ["clients", "quantize", "recipes", "smaller", "upcycle"]
    said = moetool("guide").stdout
    assert all(f"{page.name} " in said and page.about in said for page in guide.pages())
    listed = json.loads(moetool("guide", "--json").stdout)["pages"]
    assert [page["page"] for page in listed] == names


@pytest.mark.parametrize("page", guide.pages(), ids=lambda page: page.name)
def test_prints_a_page_as_it_is(page: guide.Page, moetool: Callable[..., Done]) -> None:
    assert page.title and page.about.endswith(".")
    assert moetool("guide", page.name).stdout == page.text.rstrip() + "\n"


def test_an_unknown_page_is_answered_with_a_near_one(moetool: Callable[..., Done]) -> None:
    done = moetool("guide", "quantise")
    assert done.returncode == 2 and "did you mean quantize" in done.stderr, done.stderr
