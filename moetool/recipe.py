"""A recipe is a short YAML file: one method with its options, the paper it comes from, and the
command that runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetool.errors import UsageError, did_you_mean

_KEYS = {"paper", "about", "method", "source", "from", "out", "seed", "options"}


def read(path: str | Path, changes: list[str]) -> dict[str, Any]:
    """A recipe with `key=value` changes applied, fully checked: all mistakes in one UsageError.

    Returns {method, source, from, out, seed, options}. `source`, `out` and `from` left empty in
    the file must be set.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            "no such recipe", file=path, hint="the recipes/ folder of moetool holds some"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
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
    return {
        "source": data["source"],
        "from": data.get("from") or [],
        "out": data["out"],
        "seed": data.get("seed", 0),
        "method": data["method"],
        "options": data.get("options") or {},
    }


def _apply(data: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, text = change.partition("=")
    if not equals:
        raise UsageError(
            f"--set {change!r} has no value",
            expected="key=value",
            hint="for example --set source=DIR",
        )
    value: Any = (
        text
        if key in ("source", "out")
        else text.split(",")
        if key == "from"
        else yaml.safe_load(text)
    )
    if key in _KEYS:
        data[key] = value
    else:
        data.setdefault("options", {})[key.removeprefix("options.")] = value


def _problems(data: dict[str, Any]) -> list[str]:
    """Every mistake, as a sentence."""
    from moetool import methods

    found = [f"unknown key {key!r}: {did_you_mean(key, _KEYS)}" for key in data if key not in _KEYS]
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
    if data.get("method") not in methods.METHODS:
        return [
            *found,
            f"method {data.get('method')!r}: {did_you_mean(str(data.get('method')), methods.METHODS)}",
        ]
    try:
        methods.make(data["method"], data.get("options") or {})
    except UsageError as problem:
        found.append(f"{problem.message} ({problem.hint})")
    return found
