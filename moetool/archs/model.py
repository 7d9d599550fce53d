"""What a model built by transformers says of its own text part: where its layers are, and which
module of a layer is the MoE block. Asked by `generate`; nothing here runs on a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from moetool.data import JsonMapping, JsonObject

if TYPE_CHECKING:
    from torch import nn

Shapes = dict[str, tuple[int, ...]]
Role = Callable[[str], str | None]


def at(data: Any, path: str) -> Any:
    """`a.b` of nested dicts or objects; None where there is none."""
    for part in filter(None, path.split(".")):
        data = data.get(part) if isinstance(data, Mapping) else getattr(data, part, None)
    return data


def meta(cls: Any, config: Any) -> nn.Module:
    """A model without memory."""
    import torch

    with torch.device("meta"):
        made: nn.Module = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    return made


def disk(model: Any, names: Iterable[str] | None = None) -> Shapes:
    """Names and shapes that `save_pretrained` would write, of the whole state or a part of it."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    part = state if names is None else {n: state[n] for n in names}
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, part).items()}


def stack(model: Any, text_config: str, count: int | None) -> str | None:
    """The module list of the text model's decoder layers, where text can be sent through it.

    It has as many modules as the text config says layers, and the model around it is one for the
    text config; of several the one with most parameters. None for encoders, and where two models
    in it take the text config (encoder and decoder).
    """
    from torch import nn

    wanted = type(at(model.config, text_config))
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return None
    modules = dict(model.named_modules())
    lists: dict[str, int] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and type(owner(modules, name).config) is wanted
    }
    if len({id(owner(modules, name)) for name in lists}) != 1:
        return None
    return max(lists, key=lambda n: lists[n])


def owner(modules: JsonMapping, name: str) -> Any:
    """The nearest model around a module."""
    from transformers import PreTrainedModel

    while not isinstance(modules[name], PreTrainedModel):
        name = name.rpartition(".")[0]
    return modules[name]


@dataclass(frozen=True)
class Inside:
    """The experts of one MoE layer as the model holds them: the module with router and experts
    (`""`: the layer itself), and the stacked parameters by role, `{layer}` in their names.
    """

    block: str
    stacked: dict[str, str]


def inside(model: Any, name: str, role: Role) -> Inside | None:
    """Router and experts of the first layer of the stack `name` that has them."""
    for number, layer in enumerate(model.get_submodule(name)):
        head = f"{name}.{number}."
        roles = {p: _role(model, head + p, role) for p, _ in layer.named_parameters()}
        found = {p: r for p, r in roles.items() if r and _is_block(r)}
        if any(r.startswith("expert.") for r in found.values()):
            return Inside(_block(found), _stacked(name, {p: role(head + p) for p in found}))
    return None


def _block(roles: Mapping[str, str]) -> str:
    """The innermost module with all of these parameters, and one further out without a router."""
    module = _common([p.rpartition(".")[0] for p in roles])
    return module if "router" in roles.values() else module.rpartition(".")[0]


def _stacked(name: str, roles: Mapping[str, str | None]) -> dict[str, str]:
    """Role -> template of the parameters that hold all experts, in name order."""
    found = {p: r for p, r in sorted(roles.items()) if r and r.startswith("expert.")}
    return {r.removeprefix("expert."): f"{name}.{{layer}}.{p}" for p, r in found.items()}


def _is_block(role: str) -> bool:
    return role == "router" or role.startswith("expert.")


def _role(model: Any, parameter: str, role: Role) -> str | None:
    """A parameter's role: that of the names it is saved under."""
    try:
        names: Iterable[str] = disk(model, [parameter])
    except Exception:
        names = [parameter]  # it is saved together with others only
    return next((r for n in names if (r := role(n))), None)


def _common(modules: list[str]) -> str:
    """The innermost module that holds all of these."""
    first, *others = (m.split(".") for m in modules)
    depth = 0
    while depth < len(first) and all(o[: depth + 1] == first[: depth + 1] for o in others):
        depth += 1
    return ".".join(first[:depth])


def reads(model: Any, pattern: str) -> bool:
    """Whether a converter of the family's loading takes names with this pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(model)
    sources = [c.source_patterns for c in mapping if isinstance(c, WeightConverter)]
    return any(pattern in str(p) for p in chain.from_iterable(sources))


def flags(model: Any, name: str | None) -> dict[str, bool]:
    """How the experts' module in this stack says its matrices lie."""
    names = ("is_transposed", "is_concatenated", "has_gate")
    modules = model.modules() if name is None else model.get_submodule(name).modules()
    experts = next((m for m in modules if hasattr(m, "is_concatenated")), None)
    return {k: bool(getattr(experts, k)) for k in names if hasattr(experts, k)}


def tied(model: Any) -> dict[str, str]:
    """Names on disk that share another tensor's memory where the config ties, those of models
    inside the model included.
    """
    found: dict[str, str] = {}
    for head, part in model.named_modules():
        said = getattr(part, "_tied_weights_keys", None)
        if isinstance(said, dict):
            found |= {f"{head}.{k}".strip("."): f"{head}.{v}".strip(".") for k, v in said.items()}
    here = model.state_dict().keys()
    names = {k: v for k, v in found.items() if {k, v} <= here}  # others are patterns of names
    return {lies(model, k): lies(model, v) for k, v in names.items()}


def unsaved(model: Any) -> str:
    """A pattern of the names that the class does not save: what it computes itself."""
    said = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return "|".join(f"^({name})$" for name in said) or "$^"


def bare(model: Any) -> JsonObject | None:
    """The family's class without a head, what stands before its names in those of the class with
    one, and names that it alone has; None where it is the same class, or has other names.
    """
    base, prefix = model.base_model, f"{model.base_model_prefix}."
    if base is model:
        return None
    mine = disk(meta(type(base), base.config))
    theirs = disk(model)
    same = {n.removeprefix(prefix): s for n, s in theirs.items() if n.startswith(prefix)}
    if not same or any(mine.get(name) != shape for name, shape in same.items()):
        return None
    more = sorted({name for name in mine if name not in same})
    return {"cls": type(base).__name__, "prefix": prefix, "more": more}


def lies(model: Any, parameter: str) -> str:
    """The name that a parameter is saved under; its own where it is saved with others only."""
    try:
        (name,) = disk(model, [parameter])
    except Exception:
        return parameter
    return name
