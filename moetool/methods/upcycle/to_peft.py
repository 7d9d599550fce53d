"""Low-rank experts that all tokens run with the same weight, as one adapter of PEFT: a folder that
every client of PEFT reads, on top of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import Builder, Certificate, Made, ModelFacts
from moetool.methods.upcycle.bare import ALONE, IN_FULL, LORA
from moetool.methods.upcycle.weighing import ALWAYS, Weighing
from moetool.surgery import groups, places
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.groups import LINEAR, Group
from moetool.surgery.layout import Layout
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, whole
from moetool.surgery.text_model import TextModel, text_model

if TYPE_CHECKING:
    from moetool.surgery.ffn import FfnLinear

TARGET = "peft"
Gates = Sequence[Sequence[float]]  # a row for all layers, or for each
DROPPED = "it is the base's, or a router that chooses among one"


@dataclass(frozen=True)
class Adapted:
    """One linear of the base with what is added to it: its module as transformers has it, the A
    and B of each expert, and by what each is multiplied.
    """

    module: str
    layer: int
    linear: FfnLinear
    parts: Sequence[tuple[Stored, Stored]]
    weights: Sequence[float]
    scale: float  # alpha / rank

    @property
    def rank(self) -> int:
        """Of all experts together."""
        return sum(a.shape[0] for a, _ in self.parts)

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def write(self, build: Builder, folder: str = "") -> None:
        """Plan lora_A [rank, in] and lora_B [out, rank], in a folder of the output (`0/`)."""
        (a, b), stem = self.parts[0], f"{folder}base_model.model.{self.module}"
        down = build.target(f"{stem}.lora_A.weight", a.dtype, (self.rank, a.shape[1]))
        up = whole(build.target(f"{stem}.lora_B.weight", b.dtype, (b.shape[0], self.rank)))
        begun = 0
        for (one, _), weight in zip(self.parts, self.weights, strict=True):
            piece = Piece(down.name, one.shape, begun * one.shape[1])
            begun += one.shape[0]
            if weight == 1.0:
                build.copy(whole(one), piece)
            else:
                build.task("affine", [whole(one)], [piece], scale=weight)
        if len(self.parts) == 1:
            build.copy(whole(b), up)
        else:
            build.task("columns", [whole(other) for _, other in self.parts], [up])


def plan(source: Checkpoint, base: str, gates: Gates) -> Made:
    """The adapter. MoetoolError, with the reason, for groups that are no fixed change of linears.
    `base`: what it calls its base; `gates`: weights of the experts for one request, of all layers
    or a row for each, of every group that has several.
    """
    at = text_model(source.config)
    several = any(group.experts > 1 for group in at.groups)
    own = [() if several and group.experts == 1 else gates for group in at.groups]
    each = zip(at.groups, own, strict=True)
    adapted = [*chain.from_iterable(linears_of(source, at, g, mine) for g, mine in each)]
    modules = [one.module for one in adapted]
    if len(set(modules)) != len(modules):
        raise refused(source, "two groups change the same linear, each by itself")
    build = Builder()
    for one in adapted:
        one.write(build)
    name = base or base_name(source)
    config = adapter_config(source, adapted, name)
    wanted = Outputs(config, build.targets, build.tasks, left_out(source, build), {"name": TARGET})
    made = Plan.build([source.fingerprint()], wanted, max_shard=1 << 62)
    why = "one change of each linear, whatever the token: PEFT adds the same"
    if gates:
        said = " / ".join(map(_said, gates))
        why = f"the request's experts weigh {said} in every linear; PEFT adds the same"
    told = () if name else ("the adapter names no base: say it with --base NAME",)
    certificate = Certificate("exact_if" if gates else "exact", why)
    return Made(made, certificate, config, {}, facts_of(adapted, made), told)


def linears_of(source: Checkpoint, at: TextModel, group: Group, gates: Gates) -> Iterator[Adapted]:
    """The linears that a group changes, in the order of layers."""
    rows, base = _weights(source, group, gates), groups.base_of(source.config)
    each = rows if len(rows) > 1 else [rows[0]] * len(group.layers)
    by_layer = dict(zip(group.layers, each, strict=True))
    stack = Layout.load(str(base["model_type"])).stack or ""
    blocks = places.named(group.site).of(text_model(base).layout, group)
    for layer, block in product((n for n in group.layers if any(by_layer[n])), blocks):
        weights = by_layer[layer]
        module = f"{stack}.{layer}.{block.module.partition('{layer}.')[2]}"
        for linear in block.linears:
            if not group.has(linear.name):
                continue
            held = at.name(block.module, layer=layer)
            kept = [expert for expert, weight in enumerate(weights) if weight]
            stems = [f"{held}.{group.expert(expert, linear.lies)}" for expert in kept]
            parts = [(source.part(f"{s}.lora_A"), source.part(f"{s}.lora_B")) for s in stems]
            scale = group.params["alpha"] / group.params["rank"]
            some, name = [weights[e] for e in kept], f"{module}.{linear.name}".rstrip(".")
            yield Adapted(name, layer, linear, parts, some, scale)


def _weights(source: Checkpoint, group: Group, gates: Gates) -> Gates:
    """What each expert's change is multiplied by, for every token, in all layers or in each.
    MoetoolError where that is not one number.
    """
    where = f"group {group.name!r}"
    if group.form != LORA:
        raise refused(
            source, f"{where} holds {group.form} experts, and PEFT's adapters are low-rank"
        )
    stands = "beside" if group.site == LINEAR else "under"
    if group.base != stands or group.scale != 1.0 or group.tower != "text":
        raise refused(source, f"{where} is more than a change of the text model's own linears")
    if gates:
        return _gated(source, group, gates)
    if group.experts == 1 and group.route.law in ALONE:
        return [[1.0]]
    if group.site == LINEAR and group.route.key == ALWAYS and Weighing.of(group) is not None:
        return [[1.0 if group.route.law == "hard" else 1 / group.experts] * group.experts]
    if group.site == LINEAR:
        raise refused(
            source,
            f"each linear of {where} weighs its {group.experts} experts by itself, by "
            f"{group.route.key}; PEFT's X-LoRA weighs all by the last hidden state of a pass before",
            "--request-gates 0.2,0.8,... writes the experts of one request, added up",
        )
    raise refused(
        source,
        f"{where} chooses among {group.experts} experts for each token, by what goes into their "
        "block; PEFT adds one change for all tokens, and its X-LoRA weighs them by the last "
        "hidden state of a whole pass before",
    )


def _gated(source: Checkpoint, group: Group, gates: Gates) -> Gates:
    """The weights of one request. Changes of a linear add up; those of a whole FFN do not, but one
    alone is itself.
    """
    fits = all(len(row) == group.experts for row in gates) and any(chain.from_iterable(gates))
    if not fits or len(gates) not in (1, len(group.layers)):
        raise UsageError(
            f"--request-gates does not fit the experts of group {group.name!r}",
            expected=f"{group.experts} numbers, not all zero; or {len(group.layers)} times so many",
            found=" / ".join(map(_said, gates)),
            hint="give the weight of each expert: 0.2,0.8,0,0, with / between layers that differ",
        )
    sums = group.site == LINEAR or "mix" in group.params
    if not sums and group.experts > 1 and not all(map(_alone, gates)):
        raise refused(
            source,
            f"experts of group {group.name!r} are mixed behind the {group.site}, which is not "
            "linear: no one change of its matrices is their sum",
            "--request-gates 0,1,0,0 writes the one expert of a request",
        )
    return gates


def _alone(row: Sequence[float]) -> bool:
    """Whether one expert has the weight 1, and no other any."""
    return sorted(row) == [0.0] * (len(row) - 1) + [1.0]


def _said(row: Sequence[float]) -> str:
    return ", ".join(f"{gate:g}" for gate in row)


def adapter_config(source: Checkpoint, adapted: Sequence[Adapted], base: str) -> JsonObject:
    """adapter_config.json, as PEFT writes it."""
    first, modules = adapted[0], [one.module for one in adapted]
    other = [one for one in adapted if (one.rank, one.alpha) != (first.rank, first.alpha)]
    names = list(dict.fromkeys(m.rpartition(".")[2] for m in modules))
    tails = tuple(f".{name}.weight" for name in names)
    alone = sum(n.endswith(tails) and ".experts." not in n for n in source.tensors) == len(modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": names if alone else modules,
        "rank_pattern": {one.module: one.rank for one in other},
        "alpha_pattern": {one.module: one.alpha for one in other},
        "bias": "none",
        "fan_in_fan_out": first.linear.transposed,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def base_name(source: Checkpoint) -> str:
    """What the model was made from, as its config or its record calls it."""
    said = source.config.get("_name_or_path")
    path = Path(source.folder) / "moetool.json"
    if not said and path.is_file():
        made = strict_json.load(path, "record of moetool", file_names=True).get("sources") or [{}]
        said = made[0].get("name")
    return str(said or "")


def left_out(source: Checkpoint, build: Builder) -> dict[str, str]:
    """All that the adapter is not."""
    used = {piece.name for piece in chain.from_iterable(task.inputs for task in build.tasks)}
    return dict.fromkeys((n for n in source.stored if n not in used), DROPPED)


def facts_of(adapted: Sequence[Adapted], made: Plan) -> ModelFacts:
    ranks = sorted({one.rank for one in adapted})
    layers = sorted({one.layer for one in adapted})
    count = sum(prod(target.shape) for target in made.targets.values())
    lie = f"LoRA of rank {' and '.join(map(str, ranks))} on {len(adapted)} linears"
    return ModelFacts(groups.MODEL_TYPE, TARGET, tuple(layers), 0, 0, 0, lie, count, count)


def refused(source: Checkpoint, why: str, hint: str = "") -> MoetoolError:
    return MoetoolError(
        f"no adapter of PEFT computes this: {why}",
        file=source.folder,
        expected="low-rank experts that all tokens run with one weight",
        hint=hint or IN_FULL,
    )
