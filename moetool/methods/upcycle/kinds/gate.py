"""Gates on the values of an attention."""

from __future__ import annotations

from moetool.data import JsonObject
from moetool.methods.contract import Builder, Certificate
from moetool.methods.upcycle.ground import Ground, Spot
from moetool.methods.upcycle.kinds.kind import ExpertKind
from moetool.surgery.groups import Group
from moetool.surgery.places import words
from moetool.surgery.reform import Into


class GateKind(ExpertKind):
    """Gates on the values of an attention, tanh(gate x) for each head: the first choice of a route
    leaves them as they are, each expert has gates of its own, which are zero at birth. With --key
    modality text is computed as before, and what it sees of images begins at nothing.

    PILL (arXiv 2311.02126).
    """

    name = "gate"
    base = "member"
    law = "hard"
    top_k = 1
    sites = ("attention",)

    def check(self, ground: Ground) -> None:
        self._heads(ground)

    def params(self, ground: Ground) -> JsonObject:
        return {"heads": self._heads(ground)}

    def _heads(self, ground: Ground) -> int:
        """Heads of the values. MoetoolError where these lie in one matrix with others, or the
        config does not say how many there are.
        """
        names = [linear.name for linear in ground.block.linears]
        heads = ground.at.field("kv_heads") or ground.at.field("heads")
        if len(names) != 4 or not isinstance(heads, int):
            raise words.homeless(
                ground.at.layout,
                "attention, with gates on its values",
                "q, k, v and o, and a config that says how many heads there are",
                ", ".join(names),
            )
        return heads

    def write(self, build: Builder, spot: Spot) -> dict[str, Into]:
        spot.write_inside(build)
        return {}

    def certificate(self, group: Group, sources: int) -> Certificate:
        alone = group.route.options.get("allowed", [[]])[0] == [1] + [0] * group.experts
        text = "; text has its own as they are, for good" if alone else ""
        return Certificate("none", f"gates start at zero, and values with them{text}", None)
