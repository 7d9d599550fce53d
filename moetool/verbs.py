"""The command line's verbs as Python functions, each with a real signature: its parameters are the
fields that the command line has.
"""

from __future__ import annotations

import inspect as introspection
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from moetool import methods
from moetool.data import JsonMapping, JsonObject
from moetool.errors import UsageError
from moetool.methods.field import Field
from moetool.methods.options import Checking, Common, build, fields

if TYPE_CHECKING:
    from moetool.methods.prepared import Options
    from moetool.surgery.plan import Plan

Report = JsonObject
Parameter = introspection.Parameter
_COMMON = fields(Common)
_TYPES: dict[type, str] = {tuple: "Sequence[str]", bool: "bool", int: "int", float: "float"}


def make(name: str) -> Callable[..., Any]:
    """The function of a name (moetool.__all__)."""
    made = {"profile": _profile, "eval": _eval, "verify": _verify, "plan": _plan, "run": _run}
    if name in made:
        return made[name]()
    if name == "inspect":
        return inspect
    if name == "load":
        from moetool.forward.load import load

        return load
    return _writing(name.replace("_", "-"), name)


def _writing(verb: str, name: str) -> Callable[..., Report]:
    """SRC -> OUT, with the options of a method and those of every command that writes."""
    cls = methods.load(verb)

    def function(
        source: str, out: str, *, experts_from: Sequence[str] = (), **options: Any
    ) -> Report:
        from moetool import pipeline

        if experts_from and not cls.several:
            raise UsageError(f"{verb} takes one source", hint="leave out experts_from")
        said = _options(verb, (source, *experts_from), out, options)
        prepared = pipeline.prepare(said)
        if said.common.dry_run:
            return pipeline.planned(prepared)
        return pipeline.write(prepared).as_json()

    about = (
        f"{methods.METHODS[verb].about}\n\nReturns the report, with `dry_run` the plan's summary. "
        "Raises MoetoolError; VerificationFailed where a gate is missed."
    )
    first = [_argument("source"), _argument("out"), *([_FROM] if cls.several else [])]
    return _named(function, name, about, first, (*cls.fields(), *_COMMON))


def _plan() -> Callable[..., Plan]:
    def function(
        source: str, out: str, *, experts_from: Sequence[str] = (), **options: Any
    ) -> Plan:
        from moetool import pipeline

        said = _options("upcycle", (source, *experts_from), out, {**options, "dry_run": True})
        return pipeline.prepare(said).plan

    about = (
        "The plan of an upcycle as a value (moetool.surgery.plan.Plan), made from headers alone."
        "\n\nRaises MoetoolError."
    )
    known = (*methods.load("upcycle").fields(), *(f for f in _COMMON if f.name != "dry_run"))
    first = [_argument("source"), _argument("out"), _FROM]
    return _named(function, "plan", about, first, known, "Plan")


def _run() -> Callable[..., Report]:
    def function(recipe: str, **changes: Any) -> Report:
        from moetool import pipeline
        from moetool.recipe import read

        common = {f.name for f in _COMMON} | {f.was for f in _COMMON if f.was}
        own = {k: v for k, v in changes.items() if k not in common}
        found = read(recipe, [f"{k.rstrip('_')}={_text(k, v)}" for k, v in own.items()])
        said = found.options({k: v for k, v in changes.items() if k in common})
        prepared = pipeline.prepare(said)
        if said.common.dry_run:
            return pipeline.planned(prepared)
        return pipeline.write(prepared).as_json()

    about = (
        "Run a recipe file.\n\n`changes` are what `--set` takes: source=, out=, from_=[...], any "
        "option of the method. Raises MoetoolError."
    )
    changes = Parameter("changes", Parameter.VAR_KEYWORD, annotation="Any")
    return _named(function, "run", about, [_argument("recipe"), changes], _COMMON)


def _profile() -> Callable[..., Report]:
    from moetool import measure

    def function(moe: str, stats: str, **options: Any) -> Report:
        return measure.profile(moe, stats, build(measure.Profiling, options, "profile"))

    about = (
        "Statistics of every expert on text, into the folder `stats`.\n\nReturns profile.json with "
        "a summary of each layer. Raises MoetoolError."
    )
    first = [_argument("moe"), _argument("stats")]
    return _named(function, "profile", about, first, fields(measure.Profiling))


def _eval() -> Callable[..., Report]:
    from moetool import measure

    def function(model: str, **options: Any) -> Report:
        return measure.evaluate(model, build(measure.Evaluating, options, "eval"))

    about = (
        "Perplexity on text, and distance from a reference.\n\nRaises MoetoolError; "
        "VerificationFailed where a gate is missed."
    )
    return _named(function, "eval", about, [_argument("model")], fields(measure.Evaluating))


def _verify() -> Callable[..., Report]:
    def function(out: str, *, against: Sequence[str] = (), **options: Any) -> Report:
        from moetool.evaluate.verify import verify

        return verify(out, against=against, how=build(Checking, options, "verify"))

    about = (
        "Check an output, with `against` its sources byte by byte and function by function.\n\n"
        "Raises VerificationFailed."
    )
    several = Parameter("against", Parameter.KEYWORD_ONLY, default=(), annotation="Sequence[str]")
    return _named(function, "verify", about, [_argument("out"), several], fields(Checking))


def inspect(path: str) -> Report:
    """What a checkpoint is, from headers and config alone. Raises MoetoolError."""
    from moetool.report.anatomy import anatomy
    from moetool.surgery import source
    from moetool.surgery.checkpoint import Checkpoint

    return anatomy(Checkpoint.open(source.locate(path)))


_FROM = Parameter("experts_from", Parameter.KEYWORD_ONLY, default=(), annotation="Sequence[str]")


def _argument(name: str) -> Parameter:
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation="str")


def _named(
    function: Callable[..., Any],
    name: str,
    about: str,
    first: Sequence[Parameter],
    known: Sequence[Field],
    returns: str = "JsonObject",
) -> Callable[..., Any]:
    """The function under its name, with the signature and the docstring of its fields."""
    made = sorted([*first, *map(_parameter, known)], key=lambda p: p.kind)
    signature = introspection.Signature(made, return_annotation=returns)
    function.__name__ = function.__qualname__ = name
    function.__module__ = "moetool"
    head, _, more = about.partition("\n\n")
    function.__doc__ = "\n\n".join([head, textwrap.fill(more, 96), _documented(known)])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _parameter(field: Field) -> Parameter:
    annotation = _TYPES.get(field.type, "str")
    if field.choices:
        words = f"Literal[{', '.join(map(repr, field.choices))}]"
        annotation = f"Sequence[{words}] | str" if field.type is tuple else words
    elif field.unit:
        annotation = f"{annotation} | str"
    if field.default is None:
        annotation += " | None"
    return Parameter(
        field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )


def _documented(known: Sequence[Field]) -> str:
    lines = []
    for field in known:
        lines += textwrap.wrap(
            f"{field.name}: {field.help}", 96, subsequent_indent="    ", break_long_words=False
        )
    return "\n".join(lines)


def _options(verb: str, sources: tuple[str, ...], out: str, options: JsonMapping) -> Options:
    """Sorted into what the verb and what every command understands."""
    from moetool.methods.prepared import Options

    shared = {f.name for f in dataclass_fields(Common)} | {f.was for f in _COMMON if f.was}
    common = build(Common, {k: v for k, v in options.items() if k in shared}, verb)
    own = {k: v for k, v in options.items() if k not in shared}
    return Options(out, sources, verb, own, common)


def _text(name: str, value: object) -> object:
    """As `--set NAME=` takes it: fine-tunes joined by commas, other lists as YAML has them."""
    if not isinstance(value, list | tuple):
        return value
    return ",".join(map(str, value)) if name == "from_" else json.dumps(list(map(str, value)))
