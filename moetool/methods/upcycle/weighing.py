"""How a group of experts weighs them, in the words that classes with experts have for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moetool.surgery.groups import Group
from moetool.surgery.layout import Layout
from moetool.surgery.route import Route

# Each chosen expert has: its share of the softmax over all; of the softmax over the chosen; the
# weight 1; the sigmoid of its score; that sigmoid over the sum of the chosen ones'.
SHARE, SUMS, ONE, SIGMOID, SIGMOID_SUMS = "share", "sums", "one", "sigmoid", "sigmoid sums"
ALWAYS, DOMAIN = "always", "domain"  # keys
_SAYS = {
    SHARE: "weigh experts by their share of the softmax over all",
    SUMS: "weigh the chosen experts by a softmax that sums to one",
    ONE: "give every chosen expert the weight 1",
    SIGMOID: "weigh each chosen expert by its own sigmoid",
    SIGMOID_SUMS: "weigh the chosen experts by sigmoids that sum to one",
}
# What a class must score by, and what it may not do with the weights of the chosen.
_NEEDS = {
    SHARE: (("softmax",), "always"),
    SUMS: (("softmax",), "never"),
    ONE: ((), ""),
    SIGMOID: (("sigmoid",), "always"),
    SIGMOID_SUMS: (("sigmoid",), "never"),
}
_MONOTONE = ("softmax", "sigmoid")  # the best one is the same, and renormalised its weight is 1


# Laws, with the options of each that are looked at here; under another one it is none of these.
_KNOWN: Mapping[str, tuple[str, ...]] = {
    "expert_choice": ("capacity", "score", "renormalise", "noise"),
    "gumbel": ("temperature", "threshold", "hard", "share"),
    "hard": ("straight",),
    "renormalised": (),
    "sigmoid": ("renormalise",),
    "soft": ("temperature",),
    "softmax": (),
    "top_p": ("threshold", "renormalise"),
}
_OF_KEYS = {DOMAIN: ("dim", "width")}


@dataclass(frozen=True)
class Weighing:
    """`kind`: one of the words above; `top_k`: experts of a token; `factor`: on what they give;
    `router`: on its scores.
    """

    kind: str
    top_k: int
    factor: float = 1.0
    router: float = 1.0

    @classmethod
    def of(cls, group: Group) -> Weighing | None:
        """What a group does; None where no class does."""
        found = _always(group) if group.route.key == ALWAYS else _routed(group.route, group.choices)
        if found is None:
            return None
        alone = found.top_k == 1 and found.kind in (SUMS, SIGMOID_SUMS)
        kind = ONE if alone else found.kind
        return replace(found, kind=kind, factor=found.factor * group.scale)

    @property
    def renormalised(self) -> bool:
        """Whether the weights of the chosen are divided by their sum."""
        return self.kind not in (SHARE, SIGMOID)

    @property
    def by_rank(self) -> bool:
        """Whether scores do nothing but say which one is the best."""
        return self.kind == ONE and self.top_k == 1

    def refusals(self, target: Layout) -> Iterator[str]:
        """What a family's router does otherwise."""
        law = target.overlay.law
        scores, never = (_MONOTONE, "never") if self.by_rank else _NEEDS[self.kind]
        if law.score not in scores or law.renorm == never:
            yield f"{target.model_type} does not {_SAYS[self.kind]}"


def _always(group: Group) -> Weighing | None:
    """All experts, with equal scores: the same share of each."""
    route, count = group.route, group.choices
    if route.law == "soft":
        return Weighing(SUMS, count)
    every = route.law == "hard" and route.top_k == count
    return Weighing(SUMS, count, float(count)) if every else None


def _routed(route: Route, choices: int) -> Weighing | None:
    said, law = route.options, route.law
    known = (*_KNOWN.get(law, ()), *_OF_KEYS.get(route.key, ()))
    if law not in _KNOWN or not set(said) <= set(known):
        return None
    sums = bool(said.get("renormalise"))
    sigmoid = SIGMOID_SUMS if sums else SIGMOID
    if law == "expert_choice":  # shares of all sum to one
        kind = sigmoid if said.get("score") == "sigmoid" else SUMS
        return None if route.compares(choices) else Weighing(kind, choices)
    if law == "top_p" and float(said["threshold"]) < 1:
        return None
    if law == "soft":
        return Weighing(SUMS, choices, router=1 / float(said.get("temperature", 1.0)))
    kinds = {
        "gumbel": SHARE if said.get("share") else ONE,
        "hard": ONE,
        "renormalised": SUMS,
        "sigmoid": sigmoid,
        "softmax": SHARE,
        "top_p": SUMS if sums else SHARE,
    }
    return Weighing(kinds[law], route.top_k)
