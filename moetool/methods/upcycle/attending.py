"""Experts that are attentions: what is mixed, and what they share."""

from __future__ import annotations

from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.options import option
from moetool.methods.upcycle.ground import Ground
from moetool.methods.upcycle.options import Upcycling
from moetool.surgery.groups import MIXES
from moetool.surgery.places import words


@dataclass(frozen=True)
class Attending:
    """The options of such experts."""

    attention_mix: str = option(
        MIXES[0],
        "with --site attention: what is mixed: projections (each token is projected by its "
        "experts, into one attention) or outputs (each expert attends by itself)",
        choices=MIXES,
    )
    attention_shared_kv: bool = option(
        False, "with --attention-mix outputs: experts share the keys and values of SRC"
    )

    @property
    def mixes_outputs(self) -> bool:
        """Whether each expert attends by itself."""
        return self.attention_mix != MIXES[0]

    def told(self, verb: Upcycling) -> None:
        """Refuse them where they mean nothing."""
        attends = verb.site == "attention"
        if self.mixes_outputs <= attends and self.attention_shared_kv <= self.mixes_outputs:
            return
        raise UsageError(
            "attentions are mixed where experts are attentions",
            expected="--site attention, and --attention-mix outputs with --attention-shared-kv",
            found=f"--site {verb.site} --attention-mix {self.attention_mix}",
            hint="leave out --attention-mix and --attention-shared-kv, or use all three",
        )

    def params(self, ground: Ground) -> JsonObject:
        """What the config says of them. MoetoolError for an attention that cannot have the heads
        of several beside each other: projections in one matrix, or a norm over all its heads.
        """
        if not self.mixes_outputs:
            return {}
        names = [linear.name for linear in ground.block.linears]
        wide = _norms_over_all(ground)
        if len(names) != 4 or wide or not ground.block.mixes:
            raise words.homeless(
                ground.at.layout,
                "attention, with mixed outputs",
                "q, k, v and o, and no norm over all heads",
                ", ".join([*names, *wide]),
            )
        shares = {"targets": [names[0], names[-1]]} if self.attention_shared_kv else {}
        return {"mix": self.attention_mix} | shares


def _norms_over_all(ground: Ground) -> list[str]:
    """Tensors of an attention, beside its projections, that are as wide as all its heads."""
    layer, block, tensors = ground.layers[0], ground.block, ground.source.tensors
    query = ground.stored(block.linears[0], layer)
    own = [ground.stored(one, layer).name.removesuffix("weight") for one in block.linears]
    module = f"{ground.module(layer)}."
    inside = [n for n in tensors if n.startswith(module) and not n.startswith(tuple(own))]
    return [n for n in inside if tensors[n].shape == query.shape[:1]]
