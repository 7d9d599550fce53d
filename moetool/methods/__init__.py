"""Methods: what moetool can do to a checkpoint. One file a method; the name is looked up here and
imported on use.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from moetool.errors import UsageError, did_you_mean
from moetool.methods.contract import Method
from moetool.units import parse_number

METHODS = {
    "upcycle": "moetool.methods.upcycle.method:Upcycle",
    "prune": "moetool.methods.prune.method:Prune",
    "merge": "moetool.methods.merge.method:Merge",
    "convert-layout": "moetool.methods.convert.layout:ConvertLayout",
}


def load(name: str) -> type[Any]:
    """The method class of a name; UsageError with the nearest names when there is none."""
    if name not in METHODS:
        raise UsageError(f"no method {name!r}", hint=did_you_mean(name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def make(name: str, options: dict[str, Any]) -> Any:
    """A method with these options; an unknown option is a UsageError."""
    cls = load(name)
    if issubclass(cls, Method):
        return cls.make(options)
    known = {f.name: f for f in dataclasses.fields(cls)}
    clean = {}
    for key, value in options.items():
        field = known.get(key.replace("-", "_"))
        if field is None:
            raise UsageError(f"{name} has no option {key!r}", hint=did_you_mean(key, known))
        clean[field.name] = _typed(name, field, value)
    return cls(**clean)


def _typed(method: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """The value as the field's type says; text is converted, anything else must already fit."""
    kind = {"int": int, "float": float, "bool": bool, "str": str}[str(field.type)]
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is str and isinstance(value, int | float | list) and not isinstance(value, bool):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        if kind in (int, float) and not isinstance(value, bool):
            return parse_number(value) if kind is float else kind(value)
    except (TypeError, ValueError, OverflowError):
        pass
    if isinstance(value, kind) and kind is not float:
        return value
    raise UsageError(
        f"{method}: {field.name}={value!r} is not {kind.__name__}",
        expected="a finite number" if kind is float else None,
        hint=str(field.metadata.get("help", "")),
    )


def _described(name: str, cls: type[Method]) -> dict[str, Any]:
    options = [
        {
            "name": f.spelled,
            "type": f.type.__name__,
            "default": f.default,
            "help": f.help,
            "of": list(f.of),
        }
        for f in cls.fields()
    ]
    ways = [{"name": n, "text": c.needs.text, "about": c.about()} for n, c in cls.ways().items()]
    about = (cls.__doc__ or "").strip()
    return {"name": name, "about": about, "options": options, "methods": ways}


def describe(name: str) -> dict[str, Any]:
    """Purpose and options of a method, from its class: {name, about, options: [{name, type,
    default, help}]}, and `methods` [{name, text, about}] where it is a verb with several ways.
    """
    cls = load(name)
    if issubclass(cls, Method):
        return _described(name, cls)
    options = [
        {
            "name": f.name.replace("_", "-"),
            "type": str(f.type),
            "default": f.default,
            "help": f.metadata.get("help", ""),
        }
        for f in dataclasses.fields(cls)
    ]
    ways = (
        [
            {"name": n, "text": c.text, "about": " ".join((c.__doc__ or "").split())}
            for n, c in cls.known().items()
        ]
        if hasattr(cls, "known")
        else []
    )
    return {"name": name, "about": (cls.__doc__ or "").strip(), "options": options} | (
        {"methods": ways} if ways else {}
    )
