"""Each expert takes the tokens that it likes most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetool.data import JsonObject
from moetool.errors import UsageError
from moetool.methods.contract import Certificate
from moetool.methods.options import option
from moetool.methods.upcycle.laws.law import RouteLaw, Summed, exact
from moetool.surgery.groups import Group


@dataclass(frozen=True)
class Taking(Summed):
    """The options of the law."""

    capacity: float = option(
        2.0, "experts of a token, on average: each takes capacity x tokens / experts", minimum=0
    )
    score: str = option("softmax", "what a taken token's weight is", choices=("softmax", "sigmoid"))
    score_noise: bool = option(False, "in training, add logistic noise to scores (Gumbel-sigmoid)")
    auxiliary: bool = option(
        False,
        "a further part of the router, by which each token alone foresees who takes it: trained by "
        "the balance loss, and where nothing is trained it decides",
    )


class ExpertChoiceWord(RouteLaw):
    """Each expert takes the tokens that it likes most, so that experts are even: Zhou et al., arXiv
    2202.09368; Sparse Upcycling; MoMa.

    Not causal: an expert compares all tokens of a call, later ones too, so that a token alone is
    computed otherwise than among others, and generation with a cache otherwise than without;
    --auxiliary mends that where nothing is trained. A token that nobody takes gets nothing.
    """

    name = "expert_choice"
    Options: ClassVar[type] = Taking
    own: Taking
    all_run = True
    apart = True
    mends = "; --auxiliary mends it where nothing is trained"

    def told(self, base: str, top_k: int) -> None:
        if not self.own.capacity:
            raise UsageError(
                "--capacity 0 leaves every expert idle",
                expected="a number above 0",
                found="--capacity 0",
                hint="for example --capacity 2",
            )

    def options(self, hidden: int) -> JsonObject:
        own, made = self.own, JsonObject(capacity=self.own.capacity)
        made |= {} if own.score == "softmax" else {"score": own.score}
        made |= {"renormalise": True} if own.renormalise else {}
        made |= {"noise": True} if own.score_noise else {}
        return made | ({"auxiliary": max(hidden // 2, 1)} if own.auxiliary else {})

    def certificate(self, group: Group) -> Certificate:
        own, all_taken = self.own, self.own.capacity >= group.choices
        if all_taken and not own.auxiliary and (own.renormalise or own.score == "softmax"):
            return exact(group, "takes every token")
        why = "a token that no expert takes gets nothing from them"
        more = "" if own.renormalise else ", and the weights of the others do not sum to one"
        return Certificate("none", why + more, None)
