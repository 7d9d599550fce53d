"""Low-rank experts of linears that a pass before weighs, as X-LoRA of PEFT: a folder with the
classifier, and in it one with each adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.methods.contract import Builder, Certificate, Decisions, Made
from moetool.methods.upcycle import to_peft
from moetool.methods.upcycle.xlora import HEAD, KIND, registered
from moetool.surgery import groups, places
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.companions import ADAPTER
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Piece, Stored, whole
from moetool.surgery.text_model import TextModel, text_model

if TYPE_CHECKING:
    from moetool.surgery.groups import Group

ORDER = "order"
STEP = 2  # from a linear of the classifier to the next one: between them lies its activation
_WIDTH = 2048  # that PEFT says where there is none


def is_meant(source: Checkpoint) -> bool:
    """Whether one router scores for all linears of a group."""
    return any(group.once for group in text_model(source.config).groups)


def decide(source: Checkpoint) -> Decisions:
    """The modules of the base in the order in which PEFT counts them, where each has scores of its
    own: as the stock class registers them.
    """
    (group, *_) = text_model(source.config).groups
    if not group.route.options.get("modules"):
        return Decisions()
    return Decisions(chosen={ORDER: registered(groups.base_of(source.config), source.folder)})


def plan(source: Checkpoint, base: str, order: Sequence[str]) -> Made:
    """The folders. `order`: of modules, where each has scores of its own. MoetoolError, with the
    reason, for what PEFT does not load so.
    """
    at, build = text_model(source.config), Builder()
    group, *others = at.groups
    if others:
        raise to_peft.refused(
            source, "X-LoRA is all that changes a model, and here are more groups"
        )
    name, files = base or to_peft.base_name(source), dict[str, bytes]()
    each = []
    for expert in range(group.experts):
        gates = [[float(other == expert) for other in range(group.experts)]]
        linears = [*to_peft.linears_of(source, at, group, gates)]
        if not all(one.module.startswith("model.") for one in linears):
            raise to_peft.refused(
                source,
                f"its X-LoRA finds adapters of models whose layers lie in `model.` alone, and here "
                f"is {linears[0].module}",
            )
        for one in linears:
            one.write(build, f"{expert}/")
        said = to_peft.adapter_config(source, linears, name)
        files[f"{expert}/{ADAPTER}"] = json.dumps(said, indent=2).encode() + b"\n"
        each += linears
    by_layer = sorted(each[: len(each) // group.experts], key=attrgetter("layer"))
    modules = [one.module for one in by_layer]
    ours = [modules.index(name) for name in order if name in modules]
    _Classifier(source, at, group, ours).write(build)
    config = _config(at, group, name)
    dropped = to_peft.left_out(source, build)
    wanted = Outputs(config, build.targets, build.tasks, dropped, {"name": to_peft.TARGET})
    made = Plan.build([source.fingerprint()], wanted, max_shard=1 << 62)
    certificate = Certificate("exact", "PEFT's X-LoRA runs the same two passes")
    return Made(made, certificate, config, {}, to_peft.facts_of(each, made), _told(group), files)


def _told(group: Group) -> tuple[str, ...]:
    each = ", ".join(f"'{n}': 'DIR/{n}'" for n in range(group.experts))
    return (
        "PEFT wants to be told where the adapters are, and a base without a cache: "
        "base.config.use_cache = False; config = PeftConfig.from_pretrained('DIR'); "
        f"config.adapters = {{{each}}}; PeftModel.from_pretrained(base, 'DIR', config=config)",
    )


def _config(at: TextModel, group: Group, base: str) -> JsonObject:
    """adapter_config.json, as PEFT writes it."""
    said = group.route.options
    return {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "adapters": {str(n): str(n) for n in range(group.experts)},
        "hidden_size": at.field("hidden"),
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise_scalings": bool(said.get("modules")),
        "xlora_depth": said.get("middle", 0) + (2 if said.get("width") else 1),
        "xlora_size": said.get("width", _WIDTH),
        "xlora_dropout_p": 0.0,
        "use_trainable_adapters": False,
        "softmax_temperature": said.get("temperature", 1.0),
        "top_k_lora": None,
        "scaling_pass_value": said.get("before", 0.0),
        "global_scaling_weight": 1.0,
        "inference_mode": True,
    }


class _Classifier:
    """The classifier of a group, by the names that PEFT gives its linears. `order`: where what PEFT
    counts first, second, ... stands among the group's modules.
    """

    def __init__(
        self, source: Checkpoint, at: TextModel, group: Group, order: Sequence[int]
    ) -> None:
        self.group, self.order = group, order
        layout = text_model(groups.base_of(source.config)).layout
        first = places.named(group.site).of(layout, group)[0]
        head = f"{at.name(first.module, layer=min(group.layers))}.{group.router}"
        self.held = {t.name: source.part(f"{head}.{t.name}") for t in group.router_tensors}

    def write(self, build: Builder) -> None:
        """Plan its linears, the last one's rows in PEFT's order of modules."""
        for number, (weight, bias) in enumerate(self._linears()):
            for what, pieces in (("weight", weight), ("bias", bias)):
                stored, shape = self.held["weight"], pieces[0].shape
                rows = sum(piece.shape[0] for piece in pieces)
                target = build.target(
                    f"{HEAD}.{STEP * number}.{what}", stored.dtype, (rows, *shape[1:])
                )
                begun = 0
                for piece in pieces:
                    build.copy(piece, Piece(target.name, piece.shape, begun))
                    begun += prod(piece.shape)

    def _linears(self) -> Iterator[tuple[list[Piece], list[Piece]]]:
        """Weight and bias of each, in pieces."""
        held = self.held
        if "into" in held:
            yield [whole(held["into"])], [whole(held["into_bias"])]
        for n in range(self.group.route.options.get("middle", 0)):
            yield [_part(held["middle"], n)], [_part(held["middle_bias"], n)]
        last = (held["weight"], held["bias"])
        if not self.group.route.options.get("modules"):
            yield [whole(last[0])], [whole(last[1])]
            return
        choices = self.group.choices
        weight, bias = ([_rows(one, n * choices, choices) for n in self.order] for one in last)
        yield weight, bias


def _part(stored: Stored, number: int) -> Piece:
    """One of a stack."""
    shape = stored.shape[1:]
    return Piece(stored.name, shape, number * prod(shape))


def _rows(stored: Stored, first: int, count: int) -> Piece:
    rest = stored.shape[1:]
    return Piece(stored.name, (count, *rest), first * prod(rest))
