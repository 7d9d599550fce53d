"""The verbs as Python functions: signatures made of the same fields as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moetool as api
from moetool import methods
from moetool.measure import Evaluating, Profiling
from moetool.methods.field import Field
from moetool.methods.options import Checking, Common, fields
from moetool.surgery.plan import Plan

WRITING = {
    "upcycle": "upcycle",
    "prune": "prune",
    "merge": "merge",
    "extend": "extend",
    "quantize": "quantize",
    "dequantize": "dequantize",
    "materialize": "materialize",
    "convert_layout": "convert-layout",
    "add_tokens": "add-tokens",
}
COMMON = fields(Common)


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(api, name)).parameters)


def known(name: str) -> tuple[Field, ...]:
    """The fields that a function should have."""
    if name in WRITING:
        return (*methods.load(WRITING[name]).fields(), *COMMON)
    return {
        "profile": fields(Profiling),
        "eval": fields(Evaluating),
        "verify": fields(Checking),
        "run": COMMON,
        "plan": (
            *methods.load("upcycle").fields(),
            *(f for f in COMMON if f.name != "dry_run"),
        ),
    }[name]


FUNCTIONS = [*WRITING, "profile", "eval", "verify", "run", "plan"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_the_fields(name: str) -> None:
    found = parameters(name)
    for field in known(name):
        made = found[field.name]
        assert made.kind is inspect.Parameter.KEYWORD_ONLY and made.default == field.default
        assert made.annotation is not inspect.Parameter.empty
        assert all(choice in made.annotation for choice in field.choices)
    first = next(iter(found.values()))
    assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert first.default is inspect.Parameter.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_name_every_option(name: str) -> None:
    function = getattr(api, name)
    assert (function.__name__, function.__module__) == (name, "moetool")
    first, _, rest = function.__doc__.partition("\n")
    assert first and max(len(line) for line in function.__doc__.splitlines()) <= 100
    assert all(f"{field.name}: " in rest for field in known(name))


def test_only_upcycle_takes_fine_tunes() -> None:
    takes = {name for name in FUNCTIONS if "experts_from" in parameters(name)}
    assert takes == {"upcycle", "plan"}
    with pytest.raises(api.UsageError, match="takes one source"):
        api.prune("a", "b", experts_from=["c"])


def test_importing_is_light() -> None:
    code = (
        "import sys, moetool\nassert dir(moetool)\n"
        "heavy = {'numpy', 'torch', 'transformers', 'yaml', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert 'moetool.verbs' not in sys.modules\nmoetool.prune\n"
        "heavy = {'numpy', 'torch', 'transformers', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        api.prnue  # noqa: B018
    assert set(api.__all__) <= set(dir(api))
    assert api.prune is api.prune  # made once


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("upcycle", {"expert": 4}, "experts"),
        ("prune", {"raito": 0.5}, "ratio"),
        ("prune", {"method": "reep"}, "reap"),
        ("merge", {"tokens": 0}, "--tokens is too small"),
        ("merge", {"tokens": "many"}, "a whole number"),
        ("profile", {"calibrat": "x"}, "calibrate"),
        ("eval", {"tokens": 0}, "--tokens is too small"),
        ("eval", {"max_kl": 0.5}, "--reference"),
        ("verify", {"lod": True}, "load"),
    ],
)
def test_mistakes_are_usage_errors(name: str, options: dict[str, Any], said: str) -> None:
    places = ["SRC", "OUT"][: 1 if name in ("eval", "verify") else 2]
    with pytest.raises(api.UsageError) as refused:
        getattr(api, name)(*places, **options)
    assert said in str(refused.value) and refused.value.hint


def test_percentages_sizes_and_old_names(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = str(models("mixtral")), str(tmp_path / "out")
    one = api.prune(source, out, ratio="25%", memory="4GB", max_shard="1GB", dry_run=True)
    two = api.prune(source, out, ratio=0.25, memory=4 * 10**9, max_shard_size=10**9, dry_run=True)
    assert one["plan_digest"] == two["plan_digest"] and one["options"] == two["options"]
    assert one["experts_after"] == 6 and not (tmp_path / "out").exists()


def test_reports_are_those_of_the_command_line(
    llama: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    told = moetool("upcycle", llama, tmp_path / "a", "--experts", 4, "--json").json
    made = api.upcycle(str(llama), str(tmp_path / "b"), experts=4)
    of_the_run = ("out", "seconds", "free_disk")
    assert {k: v for k, v in told.items() if k not in of_the_run} == {
        k: v for k, v in made.items() if k not in of_the_run
    }
    assert list(told) == list(made)
    assert api.verify(str(tmp_path / "b"), against=[str(llama)], load=False)["verified"]


def test_plan_is_a_value(llama: Path, tmp_path: Path) -> None:
    found = api.plan(str(llama), str(tmp_path / "out"), experts=4)
    assert isinstance(found, Plan) and not list(tmp_path.iterdir())
    assert found.digest == api.upcycle(str(llama), str(tmp_path / "x"), experts=4)["plan_digest"]


def test_run_takes_changes_and_what_every_command_takes(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: upcycle\nsource:\nout:\nseed: 3\noptions:\n  experts: 4\n")
    out = str(tmp_path / "out")
    found = api.run(str(recipe), source=str(llama), out=out, dry_run=True)
    assert (found["seed"], found["options"]["experts"]) == (3, 4)
    changed = api.run(str(recipe), source=str(llama), out=out, experts=8, seed=5, dry_run=True)
    assert (changed["seed"], changed["options"]["experts"]) == (5, 8)
    with pytest.raises(api.UsageError, match="mistake"):
        api.run(str(recipe), out=out)


def test_run_takes_lists_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text of a list is one text, whatever stands in its name."""
    said: list[Any] = []
    monkeypatch.setattr("moetool.pipeline.prepare", lambda options: said.append(options) or 1 / 0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: prune\noptions: {method: reap}\n")
    texts = ["one.txt", "two, too: x.txt:0.5"]
    with pytest.raises(ZeroDivisionError):
        api.run(str(recipe), source="demo", out=str(tmp_path / "out"), calibrate=texts)
    (options,) = said
    assert methods.make(options.method, options.values).options.calibrate == tuple(texts)
