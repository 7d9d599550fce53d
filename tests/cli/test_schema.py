"""The JSON Schema of recipes: every recipe is valid under it, and mistakes are not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetool import methods
from moetool.methods.described import schema

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def problems(recipe: dict[str, Any], verb: str) -> list[str]:
    checker = jsonschema.Draft202012Validator(schema(verb))
    return [problem.message for problem in checker.iter_errors(recipe)]


@pytest.mark.parametrize("verb", methods.METHODS)
def test_it_is_a_schema_of_every_option(verb: str, moetool: Callable[..., Any]) -> None:
    found = moetool("schema", verb, "--json").json
    assert found == schema(verb)
    jsonschema.Draft202012Validator.check_schema(found)
    options = found["properties"]["options"]
    assert found["additionalProperties"] is options["additionalProperties"] is False
    for field in methods.load(verb).fields():
        made = options["properties"][field.spelled]
        assert made["description"]
        known = [*field.choices, *(word for word, _ in field.old)]
        assert made.get("enum", known)[: len(known)] == known
        if field.default is not None:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert made["default"] == default


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 77


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_every_recipe_is_valid(recipe: Path) -> None:
    data = yaml.safe_load(recipe.read_text())
    steps = data.pop("steps", [])
    for step in steps or [{"method": data["method"]}]:
        again = {"from": data["from"]} if step.get("from") is True else {}  # the recipe's own
        assert not problems(data | step | again, step["method"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optoins": {}}, "optoins"),
        ({"method": "merge"}, "prune"),
        ({"seed": "x"}, "integer"),
        ({"options": {"raito": 0.5}}, "raito"),
        ({"options": {"method": "reep"}}, "reep"),
        ({"options": {"tokens": 0}}, "minimum"),
        ({"options": {"ratio": "a lot"}}, "a lot"),
        ({"options": {"refit": "yes"}}, "boolean"),
        ({"options": {"calibrate": 3}}, "3"),
    ],
    ids=str,
)
def test_mistakes_are_not_valid(change: dict[str, Any], said: str) -> None:
    base = {"method": "prune", "source": "SRC", "out": "OUT", "options": {"method": "reap"}}
    assert not problems(base, "prune")
    found = problems({**base, **change}, "prune")
    assert found and any(said in problem for problem in found), found


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": "25%"},
        {"ratio": 0.5},
        {"calibrate": ["a", "b"]},
        {"calibrate": "a"},
        {"uneven": "ghost"},
    ],
    ids=str,
)
def test_what_recipes_may_say(options: dict[str, Any]) -> None:
    assert not problems({"method": "prune", "options": options}, "prune")
    assert methods.load("prune").fields()


def test_of_nothing(moetool: Callable[..., Any]) -> None:
    done = moetool("schema", "prnue")
    assert done.returncode == 2 and "did you mean prune" in done.stderr


# --- what `moetool methods` says, from the same place


def test_methods_list_names_every_way(moetool: Callable[..., Any]) -> None:
    text = moetool("methods", "list", env={**os.environ, "COLUMNS": "100"}).stdout
    found = moetool("methods", "list", "--json").json
    assert [m["name"] for m in found["methods"]] == list(methods.METHODS)
    for verb in found["methods"]:
        assert [w["name"] for w in verb["ways"]] == list(methods.load(verb["name"]).ways())
        for way in verb["ways"]:
            (line,) = [li for li in text.splitlines() if li.split()[:1] == [way["name"]]]
            shown = line.split(None, 1)[1].removesuffix(" (needs no text)").removesuffix(" ...")
            shown = re.sub(r"^[\d.> !-]* (?=\S)", "", shown)  # what it was measured to keep
            assert len(line) <= 100 and way["about"].startswith(shown) and len(shown) > 20
            assert line.endswith(" (needs no text)") is not way["text"]


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_methods_show_a_way(verb: str, moetool: Callable[..., Any]) -> None:
    for name, cls in methods.load(verb).ways().items():
        done = moetool("methods", "show", name)
        assert done.returncode == 0 and f"moetool {verb}; needs" in done.stdout
        found = moetool("methods", "show", name, "--json").json
        assert (found["verb"], found["text"]) == (verb, cls.needs.text)
        assert (
            f"--method {name}" in found["example"] and ("TEXT" in found["example"]) is found["text"]
        )
        for option in found["options"]:
            assert f"--{option['name']}" in done.stdout


def test_a_way_names_its_paper_and_its_own_options(moetool: Callable[..., Any]) -> None:
    found = moetool("methods", "show", "stun", "--json").json
    assert "arXiv 2409.06211" in found["papers"]
    assert [o["name"] for o in found["options"]] == ["total-sparsity"]
    assert moetool("methods", "show", "reap", "--json").json["papers"] == ["arXiv 2510.13999"]


def test_methods_show_writes_options_as_help_does(moetool: Callable[..., Any]) -> None:
    """`SHARE` and 0, not the type and the value that Python has; a blank line ends the table."""
    lines = moetool("methods", "show", "stun").stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("--total-sparsity"))
    assert lines[at].split()[1:3] == ["SHARE", "0"] and lines[at + 1] == ""
    assert lines[at + 2].strip().startswith("moetool prune SRC OUT")


def test_methods_show_a_verb_is_one_object(moetool: Callable[..., Any]) -> None:
    done = moetool("methods", "show", "prune", "--json")
    assert done.stdout.count("\n") == 1
    assert {"name", "about", "options", "examples", "methods"} <= set(done.json)
    wrong = moetool("methods", "show", "reep")
    assert wrong.returncode == 2 and "reap" in wrong.stderr
