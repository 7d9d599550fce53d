"""Derive every family's layout from the installed transformers: `python -m moetool.archs.generate
[--check] [FAMILY ...]`.

For each model type in `index.json` a tiny model is built on the meta device and asked what
`save_pretrained` would write (`revert_weight_conversion`). Dimensions are given distinct values
first, so that a shape can be written back as a formula over config fields. Nothing here runs when
moetool works on a checkpoint: the result is checked in under `families/`, and a test derives it
again and compares.

Words of transformers' own (config fields, patterns of tensor names, values to build with) stand in
`words.json`; what transformers cannot tell (router law, hub quirks) stands in `overlay.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.archs import model as built
from moetool.archs import towers
from moetool.archs.model import Shapes, at
from moetool.archs.templates import (
    LAYERS,
    WORDS,
    Formulas,
    Template,
    Tensors,
    fields_of,
    mark_layers,
    role_of,
    square_of,
    terms_of,
)
from moetool.data import JsonMapping, JsonObject

HERE = Path(__file__).parent
Values = JsonObject


def main(argv: list[str] | None = None) -> int:
    """Write (or with --check compare) the layout files; returns how many families differ."""
    parser = argparse.ArgumentParser(prog="python -m moetool.archs.generate", description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; default: every one in index.json")
    parser.add_argument(
        "--check", action="store_true", help="compare with the checked-in files, write nothing"
    )
    args = parser.parse_args(argv)
    index = json.loads((HERE / "index.json").read_text())
    kinds = dict.fromkeys(index["moe"], "moe") | dict.fromkeys(index["dense"], "dense")
    wanted = [(k, n) for n, k in kinds.items() if not args.families or n in args.families]
    different = 0
    for kind, name in wanted:
        text = render(derive(name, index[kind][name], kind))
        path = HERE / "families" / f"{name}.json"
        if not args.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            different += 1
            print(f"{name}: differs from {path}", file=sys.stderr)
    print(f"{len(wanted)} families {'compared' if args.check else 'written'}, {different} differ")
    return different


def render(layout: JsonMapping) -> str:
    """JSON with one tensor per line: a change in a family reads as a short diff."""
    rows = ",\n".join("  " + json.dumps(t) for t in layout["tensors"])
    head = {k: v for k, v in layout.items() if k not in ("tensors", "towers")}
    body = ",\n".join(
        f" {json.dumps(k)}: {json.dumps(v, sort_keys=k == 'defaults')}" for k, v in head.items()
    )
    if layout.get("towers"):
        stacks = ",\n".join("  " + json.dumps(t) for t in layout["towers"])
        body += f',\n "towers": [\n{stacks}\n ]'
    return "{\n" + body + ',\n "tensors": [\n' + rows + "\n ]\n}\n"


@dataclass(frozen=True)
class Family:
    """A model type as transformers has it; `prefix` is the path to the text part of its config."""

    model_type: str
    cls: Any
    config_class: Any
    default: Values
    prefix: str

    @classmethod
    def of(cls, model_type: str, class_name: str) -> Family:
        import transformers

        config_class = transformers.CONFIG_MAPPING[model_type]
        default = config_class().to_dict()
        prefix = next((p for p in WORDS["text_config"] if at(default, p) is not None), "")
        return cls(model_type, getattr(transformers, class_name), config_class, default, prefix)

    @property
    def must(self) -> Values:
        """Values without which the family cannot be built; a key with a leading slash stands
        beside the text config.
        """
        return dict(WORDS["must"].get(self.model_type, {}))

    def values(self) -> Values:
        """The probing values that this family's text config takes."""
        text = at(self.default, self.prefix)
        return {k: v for k, v in WORDS["first"].items() if k in text} | self.must

    def config(self, values: Values) -> Any:
        """A config with these values in its text part."""
        data: Any = {k: v for k, v in values.items() if not k.startswith("/")}
        for part in reversed([p for p in self.prefix.split(".") if p]):
            data = {part: data}
        beside = {k[1:]: v for k, v in values.items() if k.startswith("/")}
        return self.config_class(**json.loads(json.dumps(data | beside)))

    def text(self, config: Any) -> Values:
        """The text part of a config."""
        return dict(at(config.to_dict(), self.prefix))

    def build(self, values: Values) -> Any:
        """A model on the meta device."""
        return built.meta(self.cls, self.config(values))


@dataclass(frozen=True)
class Probe:
    """What a family was built with. `distinct`: its dimensions are; else the class's default."""

    family: Family
    config: Any
    distinct: bool

    @classmethod
    def of(cls, family: Family) -> Probe:
        """A config whose dimensions are distinct, or the class's own default where the family
        refuses ours.
        """
        values = family.values()
        plain = {k: v for k, v in values.items() if k != "head_dim"}
        few = {k: v for k, v in plain.items() if "layer" in k or "expert" in k}
        found = []
        tries = (values | {"head_dim": WORDS["first"]["head_dim"]}, plain, few)
        for number, tried in enumerate(tries):
            try:
                config = family.config(tried)
                known = set(terms_of(family.text(config)).values())
                shapes = built.disk(built.meta(family.cls, config)).values()
            except Exception:
                continue
            unsolved = sum(sum(d not in known for d in shape) for shape in shapes)
            found.append((number == 2, unsolved, number, config))
        if found:
            return cls(family, min(found, key=lambda f: f[:3])[3], True)
        return cls(family, family.config(family.must), False)

    def formulas(self) -> Formulas:
        """Formulas that hold in this build and in one with other values."""
        if not self.distinct:
            return Formulas({})
        first = terms_of(self.family.text(self.config))
        try:
            config = self._second()
            found = terms_of(self.family.text(config))
            disk = built.disk(built.meta(self.family.cls, config))
        except Exception:
            return Formulas.of_one(first)
        layered = Tensors(disk, _layered(built.meta(self.family.cls, config), self.family), "")
        shapes: Shapes = {layered.template(n).name: s for n, s in disk.items()}
        terms: dict[tuple[int, int | None], str] = {
            (v, found[f]): f for f, v in reversed(first.items()) if f in found
        }
        return Formulas(terms, shapes, square_of(self.family.text(self.config)))

    def _second(self) -> Any:
        text, second = self.family.text(self.config), WORDS["second"]
        changed = {k: v for k, v in second.items() if text.get(k) == WORDS["first"].get(k)}
        if len(changed) < 3:
            raise ValueError("nothing to vary")
        data = _replaced(self.config.to_dict(), self.family.prefix, changed)
        return self.family.config_class.from_dict(json.loads(json.dumps(data)))


def _replaced(data: Values, path: str, values: Values) -> Values:
    if not path:
        return data | values
    head, _, rest = path.partition(".")
    return data | {head: _replaced(data[head], rest, values)}


def derive(model_type: str, class_name: str, kind: str) -> JsonObject:
    """One family's layout as plain data; raises whatever transformers raises when it cannot be
    built.
    """
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    family = Family.of(model_type, class_name)
    probe = Probe.of(family)
    model = built.meta(family.cls, probe.config)
    text = family.text(probe.config)
    stack = _stack(model, family)
    layout: JsonObject = {
        "model_type": model_type,
        "cls": class_name,
        "kind": kind,
        "text_config": family.prefix,
        "stack": stack,
        "fields": fields_of(text),
        "aliases": _aliases(probe),
        "defaults": _defaults(family.config_class()) | _unwritten(family.config_class()),
        "tied": built.tied(model),
    }
    if (bare := _bare(model)) is not None:
        layout["bare"] = bare
    if kind == "moe":
        layout["experts"] = _experts(model, stack)
    else:
        layout["towers"] = _towers(family, model, stack)
    layout["tensors"] = mark_layers(
        _tensors(probe, model, kind), LAYERS if probe.distinct else None
    )
    return layout


def _bare(model: Any) -> JsonObject | None:
    """The class without a head, where it has few names of its own; those with numbers have
    layers that the other has not.
    """
    try:
        found = built.bare(model)
    except Exception:  # it cannot be built alone
        return None
    numbered = found and any(Template.of(name).index for name in found["more"])
    return None if numbered else found


def _towers(family: Family, model: Any, stack: str | None) -> list[JsonObject]:
    """Stacks of layers in which the FFN is not where the names of the text model's own say."""
    found = towers.entries(model)
    variant = WORDS["variants"].get(family.model_type, {})
    for field, value in variant.items():
        plain = {"when": f"{field}={json.dumps(family.text(model.config)[field])}"}
        other = towers.entries(family.build(family.values() | variant))
        more = [one | {"when": f"{field}={json.dumps(value)}"} for one in other]
        found = [one | plain for one in found] + more
    only = WORDS["only"].get(family.model_type)
    if only is not None:
        return [one | {"when": only} for one in found]
    return [
        one
        for one in found
        if one["stack"] != stack or towers.lies_otherwise(one) or not _has_roles(one)
    ]


def _has_roles(tower: JsonMapping) -> bool:
    """Whether names on disk tell what each linear of an FFN is."""
    names = (f"{tower['stem']}{{layer}}.{lies}.weight" for _, lies, *_ in tower["linears"].values())
    return all(role_of(name, "dense") for name in names)


def _stack(model: Any, family: Family) -> str | None:
    """Where the text model's layers are in a built model; None for a family whose layers run
    twice, as encoder and as decoder.
    """
    if family.model_type in WORDS["unstacked"]:
        return None
    text = family.text(model.config)
    return built.stack(model, family.prefix, text.get(fields_of(text).get("layers", "")))


def _layered(model: Any, family: Family) -> frozenset[str]:
    """Names on disk of what lies in the text model's layers; all where it has no plain stack."""
    stack = _stack(model, family)
    names = [n for n in model.state_dict() if stack is None or n.startswith(stack + ".")]
    return frozenset(built.disk(model, names))


def _tensors(probe: Probe, model: Any, kind: str) -> list[JsonObject]:
    """An entry for each template, those that depend on a flag of the config included."""
    formulas, disk, family = probe.formulas(), built.disk(model), probe.family
    unbound = WORDS["unbound"].get(family.model_type, "$^")
    said = (built.unsaved(model), unbound, not family.prefix)
    plain = Tensors(disk, _layered(model, family), kind, *said)
    flipped = _flipped(family) if probe.distinct else {}
    without: dict[str, str] = {}
    extra: list[JsonObject] = []
    for flag, other in flipped.items():
        theirs = built.disk(other)
        more = {n: s for n, s in theirs.items() if n not in disk}
        tensors = Tensors(more, _layered(other, family), kind, *said)
        extra += [t | {"when": flag.flipped} for t in tensors.entries(formulas.of_first())]
        without |= {plain.template(n).name: flag.plain for n in sorted(set(disk) - set(theirs))}
    found = plain.entries(formulas)
    return [t | _when(without.get(t["name"])) for t in found] + extra


def _when(flag: str | None) -> dict[str, str]:
    return {"when": flag} if flag else {}


@dataclass(frozen=True)
class Flag:
    """A boolean config field and the value it has in the plain build."""

    name: str
    value: bool

    @property
    def plain(self) -> str:
        return f"{self.name}={json.dumps(self.value)}"

    @property
    def flipped(self) -> str:
        return f"{self.name}={json.dumps(not self.value)}"


def _flipped(family: Family) -> dict[Flag, Any]:
    """A model for each boolean field that decides on tensors (biases, q/k norms), flipped."""
    found = {}
    for name, value in at(family.default, family.prefix).items():
        if isinstance(value, bool) and re.search(WORDS["flag"], name):
            try:
                found[Flag(name, value)] = family.build(family.values() | {name: not value})
            except Exception:
                continue
    return found


def _aliases(probe: Probe) -> dict[str, str]:
    part = at(probe.config, probe.family.prefix)
    return dict(getattr(type(part), "attribute_map", {}) or {})


def _defaults(config: Any) -> Values:
    """What a class assumes when a field is absent. A value that the class computes from others is
    written as null.
    """
    static = {n: f.default for n, f in getattr(type(config), "__dataclass_fields__", {}).items()}
    out: Values = {}
    for name, value in sorted(config.to_dict().items()):
        if name in WORDS["base"]:
            continue
        if isinstance(value, dict) and "model_type" in value:
            inner = getattr(config, name)
            out[name] = _defaults(inner) | {"model_type": inner.model_type}
        elif static.get(name, value) is None and name != "rope_parameters":
            out[name] = None
        else:
            out[name] = value
    return out


def _unwritten(config: Any) -> Values:
    """What a class says of ties and does not write into a config."""
    tied = getattr(config, WORDS["tied"], None) is True and WORDS["tied"] not in config.to_dict()
    return {WORDS["tied"]: True} if tied else {}


def _experts(model: Any, stack: str | None) -> JsonObject:
    """How the experts lie in memory, which is also the stacked form on disk; and which forms the
    family reads.
    """
    found = built.inside(model, stack, _role_of) if stack else None
    return {
        "block": found.block if found else None,
        "stacked": found.stacked if found else {},
        "reads_per_expert": built.reads(model, WORDS["per_expert"]),
        **built.flags(model, stack),
    }


def _role_of(name: str) -> str | None:
    return role_of(Template.of(name).name)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
