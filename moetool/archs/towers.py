"""Which stacks of layers a model built by transformers has, and where the FFN of their layers lies:
in the class, and on disk, where names may be others. Asked by `generate`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moetool.archs.model import at, lies, owner
from moetool.archs.templates import WORDS
from moetool.data import JsonMapping, JsonObject

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
        module is the FFN; empty where one is, None where they cannot be told.
        """
        into = {p.rpartition(".")[0] for r, p in self.linears.items() if r not in _LAST}
        out = next(p for r, p in self.linears.items() if r in _LAST).rpartition(".")[0]
        if len(into) == 1 and into != {out}:  # a module of its own before the last linear's
            return [*into]
        block = self.layers[0].get_submodule(self.block)
        if self.block and self._is_ffn(block):
            return [] if _takes(block) else None
        first = [self._within(p) for r, p in self.linears.items() if r not in _LAST]
        words = WORDS["activations"]
        acts = [n for n, _ in block.named_children() if n in words]
        return [*first, *acts] if len(first) == len(acts) == 1 else None

    def _is_ffn(self, block: nn.Module) -> bool:
        """Whether a module has no other matrices than the FFN's."""
        own = {f"{self._within(path)}.weight" for path in self.linears.values()}
        return all(n in own for n, p in block.named_parameters() if p.dim() > 1)

    def _within(self, path: str) -> str:
        """The path of a linear inside the block."""
        return path.removeprefix(f"{self.block}.")

    def entry(self) -> JsonObject | None:
        """As the family's data says it; None where nothing could be said."""
        fields, steps = self._fields(), self.steps
        if steps is None or len(fields) != 2:
            return None
        head, stem = self._lies(self.block + ".router.weight" if self.block else "router.weight")
        block = stem.removesuffix(".weight").rpartition("router")[0].strip(".")
        lies = {role: self._lies(f"{path}.weight") for role, path in self.linears.items()}
        if any(stem_ != head for stem_, _ in lies.values()):
            return None
        linears = {role: self._linear(role, lies[role][1]) for role in self.linears}
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
            **({"rows": rows} if (rows := self._rows(lies)) else {}),
        }

    def _rows(self, lies: Mapping[str, tuple[str, str]]) -> dict[str, list[int]]:
        """Role -> which of how many runs of rows it is, of those that lie in one tensor on disk."""
        import torch
        from transformers.core_model_loading import revert_weight_conversion

        both = [r for r in lies if sum(lies[r] == other for other in lies.values()) > 1]
        names = {f"{self.name}.{self._one:d}.{self.linears[r]}.weight": r for r in both}
        marked = {n: torch.full((2, 2), float(k)) for k, n in enumerate(names)}
        if not both:
            return {}
        (made,) = revert_weight_conversion(self.model, marked).values()
        order = [int(run[0, 0]) for run in made.chunk(len(both))]
        assert sorted(order) == [*range(len(both))] and made.shape == (2 * len(both), 2)
        return {r: [order.index(k), len(both)] for k, r in enumerate(both)}

    def _linear(self, role: str, lies: str) -> list[str]:
        """Where one is in the block, and in a layer on disk; what its experts' are called there,
        where that is another word.
        """
        path = self._within(self.linears[role])
        word = path.replace(".", "_")
        expert = f"experts.0.{word}.lora_A"
        said = self._lies(f"{self.block}.{expert}" if self.block else expert)[1].split(".")[-2]
        return [path, lies.removesuffix(".weight"), *([said] if said != word else [])]

    def tower(self) -> str:
        """What it is called: by its part of the config, else by what it takes."""
        parts = self.name.split(".")
        if self.model.config.is_encoder_decoder:
            return next((p for p in ("encoder", "decoder") if p in parts), "text")
        said = self.config.rpartition(".")[2].removesuffix("_config")
        names: dict[str, str] = WORDS["tower_names"]
        return names.get(said, said) or WORDS["inputs"].get(_main_input(self.model), "text")

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

        name = f"{self.name}.{self._one:d}.{inside}"
        state = self.model.state_dict()
        given = {name: state.get(name, torch.empty(1, device="meta"))}
        (found,) = revert_weight_conversion(self.model, given)
        head, _, rest = found.partition(f".{self._one:d}.")
        return f"{head}.", rest

    @property
    def _one(self) -> bool:
        """The number of a layer that is not the first, where there are several."""
        return len(self.layers) > 1


def stacks(model: Any) -> Iterator[BuiltStack]:
    """Those whose layers all have an FFN that the words know, the outermost of nested ones."""
    from torch import nn

    modules = dict(model.named_modules())
    seen: list[str] = []
    for name, layers in modules.items():
        several = isinstance(layers, nn.ModuleList) and len(layers) > 1
        if not several and name.rpartition(".")[2] not in WORDS["shared_layers"]:
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
    """What the family's data says of all towers with a known name; of several the first."""
    found = [entry for stack in stacks(model) if (entry := stack.entry()) is not None]
    if model.config.model_type not in WORDS["other_projectors"]:
        found += projectors(model)
    found = [entry for entry in found if entry["name"] in WORDS["towers"]]
    names = [entry["name"] for entry in found]
    return [entry for n, entry in enumerate(found) if entry["name"] not in names[:n]]


def lies_otherwise(entry: JsonMapping) -> bool:
    """Whether names on disk alone do not say where the class has an FFN."""
    linears = entry["linears"].values()
    return bool(entry["steps"] or entry.get("rows")) or any(
        word or lies.removeprefix(entry["block"] + ".") != path for path, lies, *word in linears
    )


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
                "stem": lies(model, f"{path}.{linears[0]}.weight").removesuffix(
                    f".{linears[0]}.weight"
                ),
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


def _takes(block: nn.Module) -> bool:
    """Whether a module is called with its input alone, or with what stands around it too."""
    said = inspect.signature(type(block).forward).parameters.values()
    _, *needed = (
        p.name for p in said if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    )
    return len(needed) == 1 or needed[1:] == [WORDS["residual"]]


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
