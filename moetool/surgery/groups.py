"""The groups of experts of a checkpoint that no stock class holds, as its config says them.

    "model_type": "moetool", "base_model_type": "llama",
    "moetool": {"version": 1, "groups": [{"name": "experts", "layers": [0, 2], "experts": 4,
                "form": "lora", "params": {"rank": 16, "alpha": 32.0}, "base": "under",
                "route": {"key": "token", "law": "renormalised", "top_k": 2}}]}

Everything else in the config is the base family's. Tensors of the base keep their names; the new
ones lie inside the module that holds the FFN of a layer (its *block*, `model.layers.3.mlp`), or
another site's:

    BLOCK.router.weight                       [experts, hidden]; BLOCK.NAME_router.weight for a
                                              group that is not called `experts`
    BLOCK.experts.7.gate_proj.lora_A          what the form stores for each linear of the FFN,
                                              under the linear's own name in the family
    BLOCK.experts.7.output_scale              [1], where the form's params ask for one

Read strictly, by whoever plans (methods/), decodes (forms) or runs (modeling/) it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

from moetool.data import JsonObject
from moetool.errors import did_you_mean
from moetool.surgery import calibrated, strict
from moetool.surgery.inside import HELD
from moetool.surgery.route import KEYS, Route, RouterTensor, reached
from moetool.surgery.strict import edited

MODEL_TYPE = "moetool"
VERSION = 1
TEXT = "text"  # the tower that text goes through, where there are several
# Who runs the experts, as transformers 5 has it in a config: its own classes refuse a name that
# they do not know, where else the base's class would load the model without its experts.
RUNS = "experts_implementation"
MASKED = (TEXT, "encoder")  # towers whose padding a model's attention mask says
FIRST = "experts"  # the usual name of a group
FIRST_SITE = "ffn"  # the usual site
LINEAR = "linear"  # the site where each linear has a router of its own
BASES = ("under", "beside", "member", "gone")
MIXES = ("projections", "outputs")  # of experts that are attentions: what is mixed
LINEARWISE = ("linears",)  # of experts that add to the linears of an FFN: mixed inside each
PART = "part"  # the form of experts that are parts of what is there
ACTIVATIONS = ("relu", "relu2", "gelu", "silu")  # that experts may have instead of the family's
EMPTY = "null"  # the form of experts that have no tensors: their output is zero
# What trainers ask of a mixture, where the base is none.
_TRAINED = {"output_router_logits": False, "router_aux_loss_coef": 0.01}
MOST = 4096  # experts of a group; models in use have hundreds
_KINDS = {"form": str, "name": str, "base": str, "site": str, "tower": str} | {
    "params": dict,
    "scale": float,
}
_LINEARS = ("targets", "linears")  # of params: names of linears
_ROUTE_KINDS = {"key": str, "law": str, "bias": bool, "options": dict}


@dataclass(frozen=True)
class Group:
    """Experts of one form behind one route. `base`, the layer's own FFN: `under` (each expert is
    the FFN with something changed: y = sum of w_e FFN_e(x)), `beside` (y = FFN(x) + sum of w_e
    E_e(x)), `member` (expert 0 of the route is the FFN itself; `experts` counts the others), or
    `gone`. `site`: which module of a layer that is, by its name in surgery/places; what is said of
    an FFN here goes for it; `tower`: in which stack of layers (surgery/towers). `scale`: factor on
    the sum.
    """

    form: str
    experts: int
    layers: tuple[int, ...]
    name: str = FIRST
    base: str = "under"
    params: JsonObject = field(default_factory=dict)
    route: Route = field(default_factory=Route)
    site: str = FIRST_SITE
    tower: str = TEXT
    scale: float = 1.0

    @property
    def router(self) -> str:
        """The router's module inside the block."""
        return "router" if self.name == FIRST else f"{self.name}_router"

    @property
    def once(self) -> bool:
        """Whether one router, in the first module of its first layer, scores for all."""
        return self.route.key in KEYS and KEYS[self.route.key].once

    @property
    def router_tensors(self) -> tuple[RouterTensor, ...]:
        """What the router has; nothing for a route without one."""
        return tuple(self.route.tensors(self.choices))

    @property
    def choices(self) -> int:
        """What the router chooses among."""
        return self.experts + (self.base == "member")

    @property
    def reached(self) -> int:
        """Experts that work on a token: all of them under a law that mixes them all."""
        return reached(self.route, self.experts)

    def has(self, linear: str) -> bool:
        """Whether its experts have tensors for this linear of the FFN."""
        whole = self.form != EMPTY and self.form not in HELD
        return whole and linear in self.params.get("targets", [linear])

    def expert(self, number: int, linear: str = "", part: str = "") -> str:
        """A name inside the block: `experts.7.gate_proj.lora_A`."""
        return ".".join(filter(None, (self.name, str(number), linear, part)))

    def as_json(self) -> JsonObject:
        """For config.json: what is not the usual."""
        said = _unusual(self)
        return said | {"layers": list(self.layers), "route": _unusual(self.route)}


def block_of(name: str) -> str:
    """`model.layers.3.mlp` of `model.layers.3.mlp.gate_proj.weight`: where a layer's experts lie."""
    return name.rsplit(".", 2)[0]


def linear_of(name: str) -> str:
    """`gate_proj` of `model.layers.3.mlp.gate_proj.weight`."""
    return name.rsplit(".", 2)[1]


def config_of(base: JsonObject, groups: tuple[Group, ...]) -> JsonObject:
    """The config of a model of family `base` with these groups; its other fields stay."""
    said = {"version": VERSION, "groups": [g.as_json() for g in groups]}
    return _config(base, said, _TRAINED)


def ragged_config(base: JsonObject, held: calibrated.Correction | None = None) -> JsonObject:
    """The config of a mixture of experts whose layers have numbers of their own, or routers whose
    weights are corrected.
    """
    said: JsonObject = {"version": VERSION, "ragged": True}
    return _config(base, said | ({calibrated.NAME: held.as_json()} if held else {}), {})


def _config(base: JsonObject, said: JsonObject, added: JsonObject) -> JsonObject:
    told = {"model_type": MODEL_TYPE, "base_model_type": base.get("model_type")} | added
    told[RUNS] = MODEL_TYPE
    rest = {k: v for k, v in base.items() if k not in ("architectures", "model_type")}
    classes = {"architectures": [f"Moe{name}" for name in base.get("architectures") or ()]}
    return classes | told | rest | {MODEL_TYPE: said}


def base_of(config: JsonObject) -> JsonObject:
    """The config of the family that a model stands on."""
    added = () if is_ragged(config) else tuple(_TRAINED)
    ours = (MODEL_TYPE, "base_model_type", RUNS, *added)
    rest = {k: v for k, v in config.items() if k not in (*ours, "auto_map")}
    named = [n.removeprefix("Moe") for n in config.get("architectures") or ()]
    return rest | {"architectures": named, "model_type": config["base_model_type"]}


def family_of(config: Mapping[str, Any]) -> str:
    """The model type of the family that a model is of, or stands on."""
    return str(config.get("base_model_type" if is_ours(config) else "model_type"))


def name_of(config: Mapping[str, Any], family: str) -> str:
    """What a model of a family is called: moetool's own type where it is of that."""
    return MODEL_TYPE if is_ours(config) else family


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a model with groups."""
    return config.get("model_type") == MODEL_TYPE


def is_ragged(config: Mapping[str, Any]) -> bool:
    """Whether a model with groups of experts is one whose layers have numbers of their own."""
    said = config.get(MODEL_TYPE)
    return isinstance(said, Mapping) and said.get("ragged") is True


def stock_of(config: JsonObject) -> JsonObject:
    """The config of the stock family where a model adds nothing to it but numbers of experts by
    layer; any other as it is.
    """
    return config if not is_ours(config) or read(config) else base_of(config)


def read(config: JsonObject) -> tuple[Group, ...]:
    """The groups of a config; none where it is ragged alone. MoetoolError for a version of the
    future, an unknown key (with the nearest known one), a value of the wrong kind, or two groups of
    one name.
    """
    said = config.get(MODEL_TYPE)
    if not isinstance(said, dict) or not isinstance(config.get("base_model_type"), str):
        raise edited(
            "no groups of experts", "`base_model_type` and `moetool`", config.get("moetool")
        )
    if said.get("version") is True or said.get("version") != VERSION:
        raise edited("groups of another version", f"version {VERSION}", said.get("version"))
    _known(said, ("version", "groups", "ragged", calibrated.NAME), "moetool")
    if calibrated.of(config) and not is_ragged(config):
        raise edited("calibration of routers beside groups", "a native mixture", said)
    if config.get(RUNS, MODEL_TYPE) not in (MODEL_TYPE, None):
        raise edited(f"`{RUNS}` is not moetool's", MODEL_TYPE, config[RUNS])
    if type(said.get("ragged", False)) is not bool:
        raise edited("`ragged` of moetool", "true or false", said["ragged"])
    found = said.get("groups", [] if is_ragged(config) else None)
    if not isinstance(found, list) or not (found or is_ragged(config)):
        raise edited("a list of no groups", "at least one group", found)
    groups = tuple(map(_group, found))
    for layer in set(chain.from_iterable(g.layers for g in groups)):
        here = [g for g in groups if layer in g.layers]
        for tower, site in {(g.tower, g.site) for g in here}:
            both = [g for g in here if (g.tower, g.site) == (tower, site)]
            if not add_up(both):
                raise edited(
                    f"two groups that both stand for the {site} of layer {layer}",
                    "all but one of them beside it",
                    [g.base for g in both],
                )
        names = [(g.tower, g.site, g.name) for g in here]
        if len(set(names)) != len(names):
            raise edited(f"two groups of one name in layer {layer}", "a name each", names)
    return groups


def add_up(groups: Sequence[Group]) -> bool:
    """Whether the outputs of groups at one block can be added: at most one stands for it, the
    others beside.
    """
    return sum(group.base != "beside" for group in groups) <= 1


def _group(data: object) -> Group:
    said = _object(data, "a group")
    _known(said, [f.name for f in fields(Group)], "a group")
    route = _object(said.get("route", {}), "route")
    _known(route, [f.name for f in fields(Route)], "route")
    for name in ("form", "experts", "layers"):
        if name not in said:
            raise edited(f"a group without `{name}`", name, sorted(said))
    try:
        made = Group(**(said | {"layers": tuple(said["layers"]), "route": Route(**route)}))
    except TypeError as problem:
        raise edited(f"a group is not well formed: {problem}", "lists and numbers", said) from None
    _check(made)
    return made


def _check(group: Group) -> None:
    _check_kinds(group)
    key = group.route.key
    if key in KEYS and not KEYS[key].in_tower(group.tower):
        towers = " or ".join(KEYS[key].alone or (TEXT, *KEYS[key].beside))
        raise edited(f"experts by {key} in another tower", f"tower {towers}", group.tower)
    counts = (group.experts, group.route.top_k, *group.layers)
    if not all(type(n) is int and n >= 0 for n in counts):
        raise edited("a count is no whole number", "experts, top_k, layers", counts)
    if group.experts > MOST:
        raise edited("more experts than a group can have", f"at most {MOST:,}", group.experts)
    if not group.layers or len(set(group.layers)) != len(group.layers):
        raise edited("layers of a group", "at least one, each once", list(group.layers))
    if group.base not in BASES:
        raise edited(f"base {group.base!r} of a group", ", ".join(BASES), group.base)
    if not group.name.isidentifier():
        raise edited("a group's name", "letters, digits and _", group.name)
    # what is added to a linear may be nothing: its own output is whole
    group.route.check(group.choices, idle=group.site == LINEAR and group.base == "beside")


def _check_kinds(group: Group) -> None:
    """Refuse a value that is not of its field's kind; a number must be finite."""
    for thing, kinds in ((group, _KINDS), (group.route, _ROUTE_KINDS)):
        for name, kind in kinds.items():
            value = getattr(thing, name)
            if not strict.fits(value, kind):
                raise edited(f"`{name}` of a group", kind.__name__, repr(value))
    for name in filter(group.params.__contains__, _LINEARS):
        said = group.params[name]
        if type(said) is not list or not said or not all(type(one) is str for one in said):
            raise edited(f"`{name}` of a group", "a list of names of linears", repr(said))


def _unusual(value: Group | Route) -> JsonObject:
    usual = {f.name: f.default for f in fields(value)}
    said = asdict(value)
    return {n: v for n, v in said.items() if v != usual[n] and v != {}}


def _object(data: object, what: str) -> JsonObject:
    if not isinstance(data, dict):
        raise edited(f"{what} is no object", "an object", data)
    return data


def _known(said: JsonObject, known: Sequence[str], what: str) -> None:
    for name in said:
        if name not in known:
            raise edited(
                f"{what} has the unknown key {name!r}",
                ", ".join(known),
                name,
                did_you_mean(name, known),
            )
