"""A recipe is a short YAML file: one method with its options, or several such steps, the paper it
comes from, and the command that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool import reading, strict_yaml
from moetool.data import JsonObject
from moetool.errors import UsageError, did_you_mean
from moetool.methods.options import Common, build
from moetool.methods.prepared import Options, Step

KEYS = {
    "paper": "where it is described",
    "about": "what it does, in a sentence or two",
    "method": "the verb",
    "source": "the checkpoint to start from; empty: --set source=",
    "from": "fine-tunes that give experts; empty: --set from=A,B",
    "out": "the folder to write; empty: --set out=",
    "seed": "everything random derives from it",
    "options": "what the verb is told",
    "steps": "instead of method and options: several of them, each reads what the one before makes, "
    "and with `from: true` the further models again",
}
_STEP = ("method", "options")
_IN_STEP = (*_STEP, "from")


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked: nothing in it is unknown, nothing that is needed is empty."""

    steps: tuple[Step, ...]  # the last one writes
    source: str
    further: tuple[str, ...]  # `from`
    out: str
    seed: int

    def options(self, common: Mapping[str, object] | None = None, command: str = "") -> Options:
        """One command, as the pipeline takes it; `common`: what every command understands."""
        made = build(Common, {"seed": self.seed, **(common or {})}, "a recipe")
        *before, last = self.steps
        return Options(
            self.out,
            (self.source, *self.further),
            last.method,
            last.values,
            made,
            command,
            tuple(before),
            last.further,
        )


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
    steps = tuple(
        Step(s["method"], s.get("options") or {}, s.get("from") is True) for s in _steps(data)
    )
    further = tuple(data.get("from") or ())
    return Recipe(steps, data["source"], further, data["out"], data.get("seed", 0))


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
        return
    for step in _meant(data, key):
        name = key.removeprefix("options.") if len(_steps(data)) == 1 else key.rpartition(".")[2]
        step["options"] = (step.get("options") or {}) | {name: value}


def _steps(data: JsonObject) -> list[JsonObject]:
    """The steps of a recipe, the last one writes: itself, where it has a method of its own."""
    found = data.get("steps")
    return found if isinstance(found, list) and found else [data]


def _meant(data: JsonObject, key: str) -> list[JsonObject]:
    """The steps that `--set KEY=` is for: `2.format` and `quantize.format` name one; any other name
    is for all that have such an option, one of a gate for the last of them, one of a word (`--key
    modality`) for those that say it, where any does.
    """
    from moetool.methods.field import GATE

    steps = [s for s in _steps(data) if isinstance(s, dict)]
    place, _, name = key.rpartition(".")
    if len(steps) < 2:
        return steps
    if place:
        named = [s for n, s in enumerate(steps, 1) if place in (str(n), s.get("method"))]
        if named:
            return named
        verbs = [str(s.get("method")) for s in steps]
        raise UsageError(
            f"--set {key}: the recipe has no step {place!r}",
            expected=", ".join(f"{n}.{name} ({verb})" for n, verb in enumerate(verbs, 1)),
            hint=did_you_mean(place, verbs),
        )
    panels = [_panel(str(step.get("method")), name) for step in steps]
    found = [step for step, panel in zip(steps, panels, strict=True) if panel]
    found = [step for step in found if _says_word(step, name)] or found
    return found[-1:] if GATE in panels else found or steps[-1:]


def _says_word(step: JsonObject, name: str) -> bool:
    """Whether a step names the word that an option belongs to."""
    from moetool import methods

    fields = methods.load(str(step.get("method"))).fields()
    of = next((f.of for f in fields if f.name == name.replace("-", "_")), ())
    said = step.get("options")
    return isinstance(said, dict) and bool(set(of).intersection(map(str, said.values())))


def _panel(verb: str, name: str) -> str:
    """Where an option of a verb stands in its help; empty where it has no such option."""
    from moetool import methods

    if verb not in methods.METHODS:
        return ""
    known = {f.name: f.panel for f in methods.load(verb).fields()}
    return known.get(name.replace("-", "_"), "")


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
    return found + _of_steps(data)


def _of_steps(data: JsonObject) -> list[str]:
    """What is wrong with the steps; of a recipe with one method, with that."""
    said = data.get("steps")
    if "steps" not in data:
        return _of_step(data)
    if not isinstance(said, list) or not said or not all(isinstance(s, dict) for s in said):
        return ["steps needs a list of {method, options}"]
    found = [
        f"{key} stands beside steps: it belongs into one of them" for key in _STEP if key in data
    ]
    for number, step in enumerate(said, 1):
        known = _IN_STEP if number > 1 and "from" in data else _STEP
        wrong = [f"unknown key {k!r}: {did_you_mean(k, known)}" for k in step if k not in known]
        if "from" in step and not wrong and type(step["from"]) is not bool:
            wrong = [f"from={step['from']!r} is not true or false"]
        found += [f"step {number}: {problem}" for problem in wrong + _of_step(step)]
    return found


def _of_step(data: JsonObject) -> list[str]:
    from moetool import methods

    verb, options = str(data.get("method")), data.get("options") or {}
    if verb not in methods.METHODS:
        return [f"method {data.get('method')!r}: {did_you_mean(verb, methods.METHODS)}"]
    if not isinstance(options, dict):
        return [f"options={options!r} is not a mapping of names to values"]
    try:
        methods.make(verb, options)
    except UsageError as problem:
        return [f"{problem.message} ({problem.hint})"]
    return []
