"""A recipe is a short YAML file: one method with its options, the paper it comes from, and the
command that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool import reading, strict_yaml
from moetool.data import JsonObject
from moetool.errors import UsageError, did_you_mean
from moetool.methods.contract import Options
from moetool.methods.options import Common, build

KEYS = {
    "paper": "where it is described",
    "about": "what it does, in a sentence or two",
    "method": "the verb",
    "source": "the checkpoint to start from; empty: --set source=",
    "from": "fine-tunes that give experts; empty: --set from=A,B",
    "out": "the folder to write; empty: --set out=",
    "seed": "everything random derives from it",
    "options": "what the verb is told",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked: nothing in it is unknown, nothing that is needed is empty."""

    method: str
    source: str
    further: tuple[str, ...]  # `from`
    out: str
    seed: int
    values: Mapping[str, object]

    def options(self, common: Mapping[str, object] | None = None, command: str = "") -> Options:
        """One command, as the pipeline takes it; `common`: what every command understands."""
        made = build(Common, {"seed": self.seed, **(common or {})}, "a recipe")
        sources = (self.source, *self.further)
        return Options(self.out, sources, self.method, self.values, made, command)


def read(path: str | Path, changes: list[str]) -> Recipe:
    """A recipe with `key=value` changes applied, fully checked: all mistakes in one UsageError.
    `source`, `out` and `from` left empty in the file must be set.
    """
    data = _load(path)
    for change in changes:
        _apply(data, change)
    problems = _problems(data)
    if problems:
        raise UsageError(
            f"the recipe has {len(problems)} mistake{'s' * (len(problems) != 1)}",
            file=path,
            **{f"mistake {i}": p for i, p in enumerate(problems, 1)},
            hint="correct the file, or use --set key=value",
        )
    return Recipe(
        data["method"],
        data["source"],
        tuple(data.get("from") or ()),
        data["out"],
        data.get("seed", 0),
        data.get("options") or {},
    )


def _load(path: str | Path) -> JsonObject:
    try:
        data = strict_yaml.load(reading.read(path, "recipe").decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            "no such recipe", file=path, hint="moetool run --list shows those of moetool"
        ) from None
    except (OSError, ValueError) as problem:
        raise UsageError(
            f"the recipe is not YAML: {problem}", file=path, hint="correct the file"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(
            "the recipe is not a mapping",
            file=path,
            expected="method, options, ...",
            hint="see recipes/upcycle/sparse-upcycling.yaml",
        )
    return data


def _apply(data: JsonObject, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise UsageError(
            f"--set {change!r} has no value",
            expected="key=value",
            hint="for example --set source=DIR",
        )
    value = _value(key, text)
    if key in KEYS:
        data[key] = value
    else:
        data["options"] = (data.get("options") or {}) | {key.removeprefix("options."): value}


def _value(key: str, text: str) -> Any:
    if key in ("source", "out"):
        return text
    if key == "from":
        return text.split(",")
    try:
        return strict_yaml.load(text)
    except ValueError as problem:
        raise UsageError(f"--set {key}: {problem}", hint="quote the value") from None


def _problems(data: JsonObject) -> list[str]:
    """Every mistake, as a sentence."""
    from moetool import methods

    found = [f"unknown key {key!r}: {did_you_mean(key, KEYS)}" for key in data if key not in KEYS]
    for key in ("source", "out"):
        if not isinstance(data.get(key), str) or not data[key]:
            found.append(f"{key} is not set: --set {key}=...")
    wanted = data.get("from")
    if "from" in data and (
        not isinstance(wanted, list) or not wanted or not all(isinstance(w, str) for w in wanted)
    ):
        found.append("from needs the fine-tunes: --set from=A,B,C")
    if not isinstance(data.get("seed", 0), int):
        found.append(f"seed={data['seed']!r} is not a whole number")
    verb, options = str(data.get("method")), data.get("options") or {}
    if verb not in methods.METHODS:
        return [*found, f"method {data.get('method')!r}: {did_you_mean(verb, methods.METHODS)}"]
    if not isinstance(options, dict):
        return [*found, f"options={options!r} is not a mapping of names to values"]
    try:
        methods.make(verb, options)
    except UsageError as problem:
        found.append(f"{problem.message} ({problem.hint})")
    return found
