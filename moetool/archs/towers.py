"""Which stacks of layers a model built by transformers has, and where the FFN of their layers lies:
in the class, and on disk, where names may be others. Asked by `generate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetool.archs.model import at, owner
from moetool.archs.templates import WORDS
from moetool.data import JsonObject

if TYPE_CHECKING:
    from torch import nn

_LAST = ("down", "fc2")  # roles of those that give the FFN's output


@dataclass(frozen=True)
class BuiltStack:
    """A list of layers that are alike. `linears`: role -> path of a linear of the FFN inside a
    layer; `config`: path of the part of the config that its model was built with.
    """

    model: Any
    name: str
    layers: nn.ModuleList
    linears: Mapping[str, str]
    config: str

    @property
    def block(self) -> str:
        """The module inside a layer that holds all linears of the FFN; empty: the layer itself."""
        heads = [path.split(".")[:-1] for path in self.linears.values()]
        common = [p[0] for p in zip(*heads, strict=False) if len(set(p)) == 1]
        return ".".join(common)

    @property
    def steps(self) -> list[str] | None:
        """The modules of the block that run one after the other before the last linear, where no
        module holds all; empty where one does, None where they cannot be told.
        """
        into = {p.rpartition(".")[0] for r, p in self.linears.items() if r not in _LAST}
        out = next(p for r, p in self.linears.items() if r in _LAST).rpartition(".")[0]
        if len(into) == 1 and into != {out}:  # a module of its own before the last linear's
            return [*into]
        if self.block:
            return []
        first = [p for r, p in self.linears.items() if r not in _LAST]
        words = WORDS["activations"]
        acts = [n for n, _ in self.layers[0].named_children() if n in words]
        return [*first, *acts] if len(first) == len(acts) == 1 else None

    def entry(self) -> JsonObject | None:
        """As the family's data says it; None where nothing could be said."""
        fields, steps = self._fields(), self.steps
        if steps is None or len(fields) != 2:
            return None
        head, stem = self._lies(self.block + ".router.weight" if self.block else "router.weight")
        block = stem.removesuffix(".weight").rpartition("router")[0].strip(".")
        lies = {role: self._lies(f"{path}.weight") for role, path in self.linears.items()}
        if any(stem_ != head for stem_, _ in lies.values()) or len({*lies.values()}) < len(lies):
            return None  # on disk one tensor holds two of them
        linears = {
            role: [path.removeprefix(f"{self.block}."), lies[role][1].removesuffix(".weight")]
            for role, path in self.linears.items()
        }
        return {
            "name": self.tower(),
            "stack": self.name,
            "config": self.config,
            "fields": fields,
            "stem": head,
            "inside": self.block,
            "block": block,
            "linears": linears,
            "steps": steps,
        }

    def tower(self) -> str:
        """What it is called: by its part of the config, else by what it takes."""
        parts = self.name.split(".")
        if self.model.config.is_encoder_decoder:
            return next((p for p in ("encoder", "decoder") if p in parts), "text")
        said = self.config.rpartition(".")[2].removesuffix("_config")
        return said or WORDS["inputs"].get(_main_input(self.model), "text")

    def _fields(self) -> dict[str, str]:
        """The fields of its config that count its layers and say how wide a token is."""
        said = at(self.model.config.to_dict(), self.config)
        parts = self.name.split(".")
        side = next((p for p in ("decoder", "encoder") if p in parts), "")
        linear = self.layers[0].get_submodule(next(iter(self.linears.values())))
        sides = {*linear.get_parameter("weight").shape}
        found = {}
        for meaning, wanted in (("layers", {len(self.layers)}), ("hidden", sides)):
            names = [n for n in WORDS["tower_fields"][meaning] if said.get(n) in wanted]
            names.sort(key=lambda n: not (side and side in n))
            if names:
                computed = len(names) > 1 and _default(self.model.config, names[0]) is None
                found[meaning] = "|".join(names[: 1 + computed])
        return found

    def _lies(self, inside: str) -> tuple[str, str]:
        """Where a tensor of a layer lies on disk: what stands before the layer's number, and what
        after it.
        """
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        name = f"{self.name}.1.{inside}"
        state = self.model.state_dict()
        given = {name: state.get(name, torch.empty(1, device="meta"))}
        (found,) = revert_weight_conversion(self.model, given)
        head, _, rest = found.partition(".1.")
        return f"{head}.", rest


def stacks(model: Any) -> Iterator[BuiltStack]:
    """Those whose layers all have an FFN that the words know, the outermost of nested ones."""
    from torch import nn

    modules = dict(model.named_modules())
    seen: list[str] = []
    for name, layers in modules.items():
        if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
            continue
        if any(name.startswith(f"{one}.") for one in seen):
            continue
        found = [_linears(layer) for layer in layers]
        if not found[0] or any(one != found[0] for one in found):
            continue
        seen.append(name)
        config = _path(model.config, owner(modules, name).config)
        if config is not None:
            yield BuiltStack(model, name, layers, found[0], config)


def entries(model: Any) -> list[JsonObject]:
    """What the family's data says of all towers; of several with one name the first."""
    found = [entry for stack in stacks(model) if (entry := stack.entry()) is not None]
    found += projectors(model)
    names = [entry["name"] for entry in found]
    return [entry for n, entry in enumerate(found) if entry["name"] not in names[:n]]


def projectors(model: Any) -> Iterator[JsonObject]:
    """The module between a vision tower and the text model, where it is an FFN of two linears and
    nothing else: a tower of one module.
    """
    from torch import nn

    name, roles = WORDS["projector"]["name"], WORDS["projector"]["linears"]
    for path, module in model.named_modules():
        children = dict(module.named_children())
        linears = [n for n, child in children.items() if isinstance(child, nn.Linear)]
        inside = sorted(n for n in children if n not in linears)
        if path.rpartition(".")[2] == name and linears == [*roles] and inside == ["act"]:
            yield {
                "name": "projector",
                "stack": path,
                "config": "vision_config",
                "fields": {"layers": "1", "hidden": "hidden_size"},
                "stem": name,
                "inside": "",
                "block": "",
                "linears": {role: [n, n] for n, role in roles.items()},
                "steps": [],
            }


def _linears(layer: nn.Module) -> dict[str, str]:
    """Role -> path of the linears of a layer's FFN; nothing where there is none that is whole."""
    found: dict[str, str] = {}
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        role = _role(name)
        if role is None:
            continue
        if role in found:
            return {}
        found[role] = name
    return found if any(set(found) == set(whole) for whole in WORDS["whole_ffns"]) else {}


def _default(config: Any, field: str) -> Any:
    """What a config's class says where a field is absent; None where it computes it from others."""
    known = getattr(type(config), "__dataclass_fields__", {}).get(field)
    return getattr(known, "default", field)


def _role(path: str) -> str | None:
    roles: Sequence[Sequence[str]] = WORDS["ffn"]
    return next((role for role, pattern in roles if re.fullmatch(pattern, path)), None)


def _path(whole: Any, part: Any) -> str | None:
    """The path of a part of a config in the whole; the whole's, where it is a copy of that."""
    return "" if type(whole) is type(part) else _inside(whole, part)


def _inside(whole: Any, part: Any) -> str | None:
    for name in getattr(whole, "sub_configs", None) or ():
        inner = getattr(whole, name, None)
        if inner is part:
            return str(name)
        path = None if inner is None else _inside(inner, part)
        if path is not None:
            return f"{name}.{path}"
    return None


def _main_input(model: Any) -> str:
    return str(getattr(model.base_model, "main_input_name", ""))
