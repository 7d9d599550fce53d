"""Routes of groups of experts, as a config says them: what is looked at (the *key*), how scores
become experts and weights (the *law*), and the tensors that a router has for both.

One entry a key and one a law: `modeling/routes/` and `modeling/laws/` run them; the `keys/` and
`laws/` of the verb that makes groups write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import strict
from moetool.surgery.strict import Kinds

ROUTED = "token"  # the key of routes that score each token by itself
TWOPASS = "twopass"  # the key of routes that look at what a whole pass before saw
MODALITY = "modality"  # the key of routes that look at what kind of token it is
# What a route that compares the tokens of a call means for whoever runs it.
COMPARED = (
    "experts compare all tokens of a call: what is generated with a cache is computed otherwise "
    "than without, and a sequence beside others otherwise than alone"
)
PATCHED = (
    "the tokens of a patch choose together: what is generated with a cache is computed otherwise "
    "than without (and beam search needs use_cache=False)"
)


@dataclass(frozen=True)
class Route:
    """Who runs, with which weight. `key`: what is looked at (token, modality, always, ...); `law`:
    how scores become weights: softmax (over all experts; the chosen keep their share),
    renormalised (the shares of the chosen sum to one), hard (each chosen one has weight 1),
    soft (all run), sigmoid, ...; `bias`: whether the router adds one; `options`: of the key and the
    law (`allowed`: [modalities][experts], a temperature, ...).
    """

    key: str = ROUTED
    law: str = "renormalised"
    top_k: int = 1
    bias: bool = False
    options: JsonObject = field(default_factory=dict)

    def compares(self, choices: int) -> bool:
        """Whether what a token gets depends on the other tokens of a call, where nothing is
        trained: not where each takes all there are, nor where a part of the router foresees it.
        """
        said = self.options
        alone = bool(said.get("auxiliary")) or said.get("capacity", 0) >= choices
        return LAWS[self.law].compares and not alone

    def note(self, choices: int) -> str:
        """What whoever runs it must know of tokens that depend on others; empty where none does."""
        if self.compares(choices):
            return COMPARED
        return PATCHED if self.options.get("patch") else ""

    def tensors(self, choices: int) -> Iterator[RouterTensor]:
        """What a router over so many choices has, shapes in numbers but for `hidden`."""
        scored = choices - LAWS[self.law].rest
        said: JsonObject = {**self.options, "choices": scored, "rows": scored}
        said["seen"] = said.get("width", "hidden")
        said["patched"] = f"{said['patch']}*hidden" if said.get("patch") else "hidden"
        if said.get("routers") == "each":
            said["rows"] = scored * len(said["allowed"])
        said["rows"] *= said.get("modules", 1)
        key = KEYS[self.key]
        more = (RouterTensor("bias", ("rows",), start="zero"),) if self.bias else ()
        for one in (*key.tensors, *more, *LAWS[self.law].tensors):
            if not one.when or said.get(one.when):
                words = (str(said[w]) if w in ("seen", "patched") else w for w in one.shape)
                shape = tuple(w if w.endswith("hidden") else _number(w, said) for w in words)
                yield one._replace(shape=shape)

    @property
    def goes_without(self) -> bool:
        """Whether its law can leave a token without an expert that its table gives none."""
        return self.law == "hard" and not self.options.get("straight")

    def check(self, choices: int, idle: bool = False) -> None:
        """Refuse a key, a law or options that nothing knows, or that do not fit each other. `idle`:
        whether a kind of tokens may go without an expert, by a table of who may use what.
        """
        strict.word(self.key, tuple(KEYS), "route has the key")
        strict.word(self.law, tuple(LAWS), "route has the law")
        key, law = KEYS[self.key], LAWS[self.law]
        needs, knows = {**key.needs, **law.needs}, {**key.knows, **law.knows}
        what = f"a route by {self.key} of law {self.law}"
        strict.check(self.options, needs, knows, what)
        for name, kind in {**needs, **knows}.items():
            if kind is float and self.options.get(name, 1) <= 0:
                raise _unfit(f"`{name}` of {what}", "above 0", self.options[name])
        if self.options.get("threshold", 0) > 1:
            raise _unfit(f"`threshold` of {what}", "at most 1", self.options["threshold"])
        if self.bias and not key.biased:
            raise _unfit(f"{what} with a bias", "none", "bias")
        for name in filter(self.options.__contains__, SPAN):
            _check_ids([self.options[name]])
        if self.options.get("middle") and not self.options.get("width"):
            raise _unfit(f"`middle` of {what}", "`width` beside it", self.options)
        if "ids" in self.options and "allowed" not in self.options:
            _check_ids([self.options["ids"]])
        if "allowed" in self.options:
            _check_allowed(self, choices - law.rest, idle and self.goes_without)
        if not 1 <= self.top_k <= choices - law.rest:
            expected = f"1 to {choices - law.rest}"
            raise _unfit("top_k of a group", expected, self.top_k)


class RouterTensor(NamedTuple):
    """A tensor of a router. Words of its shape: hidden (the width of a token), seen (of what is
    scored: an option `width`, else hidden), choices, rows (choices, or as many for each modality or
    module), an option's name, or 2*one. `when`: the option without which it is not there; `start`:
    zero, drawn as --router says, or given.
    """

    name: str
    shape: tuple[str, ...]
    when: str = ""
    start: str = "drawn"

    def sides(self, hidden: int) -> tuple[int, ...]:
        """Its shape, where the others are numbers already."""
        parts = (word.rpartition("*") for word in self.shape)
        return tuple(int(n or 1) * (hidden if w == "hidden" else int(w)) for n, _, w in parts)


@dataclass(frozen=True)
class RouteWord:
    """A key or a law. `needs` and `knows`: options that it must and may have; `biased`: whether a
    router of this key may have a bias; `hears`: whether it looks at what a call says, of the text
    model's tokens; `beside`: towers beside the text model that it can be in all the same; `alone`:
    towers in which alone it can be; `compares`: whether what a token gets depends on the other
    tokens of a call; `rest`: how many of the choices, the last ones, are always on, and have no
    scores; `once`: whether a group has one router, in the first module of its first layer, that
    scores for all.
    """

    tensors: tuple[RouterTensor, ...] = ()
    needs: Kinds = field(default_factory=dict)
    knows: Kinds = field(default_factory=dict)
    biased: bool = False
    hears: bool = False
    beside: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    compares: bool = False
    rest: int = 0
    once: bool = False

    def in_tower(self, tower: str) -> bool:
        """Whether a route can be there."""
        towers = self.alone or ("text", *self.beside)
        return not self.hears or tower in towers


_IDS = 1 << 31  # token ids are below it
POOLS = ("embeddings", "hidden")
SPAN = ("begin", "end")  # token ids from which a prompt counts, and at which it ends
STRAIGHT = ("chosen", "all", "balance")  # how a gradient goes through a choice
_FIRES = ("silu", "gelu", "gelu_tanh", "relu")  # how a neuron that stands for an expert does
_WEIGHT = RouterTensor("weight", ("choices", "hidden"))
_MASKED = RouterTensor("weight", ("rows", "hidden"), "routers")
KEYS: Mapping[str, RouteWord] = {
    ROUTED: RouteWord((_WEIGHT,), biased=True),
    MODALITY: RouteWord(
        (_MASKED,), {"allowed": list, "ids": list}, {"routers": ("one", "each")}, hears=True
    ),
    "always": RouteWord(),
    "attended": RouteWord(
        (_WEIGHT._replace(shape=("choices", "seen")),),
        {"width": int, "ids": list},
        hears=True,
        alone=("projector",),
    ),
    # the domains' embeddings through a SwiGLU MLP are the rows of the router
    "domain": RouteWord(
        (
            RouterTensor("domains", ("choices", "dim"), start="given"),
            RouterTensor("gate", ("width", "dim")),
            RouterTensor("up", ("width", "dim")),
            RouterTensor("down", ("hidden", "width")),
        ),
        {"dim": int, "width": int},
    ),
    "neurons": RouteWord(
        (
            RouterTensor("gate", ("choices", "hidden"), "gated", "given"),
            RouterTensor("up", ("choices", "hidden"), start="given"),
        ),
        {},
        {"gated": bool, "act": _FIRES},
    ),
    # the noise level's embedding through a SwiGLU MLP
    "noise": RouteWord(
        (
            RouterTensor("embed", ("dim", "1")),
            RouterTensor("embed_bias", ("dim",), start="zero"),
            RouterTensor("inner", ("2*width", "dim")),
            RouterTensor("inner_bias", ("2*width",), start="zero"),
            _WEIGHT._replace(shape=("choices", "width")),
            RouterTensor("bias", ("choices",), start="zero"),
        ),
        {"dim": int, "width": int},
        hears=True,
    ),
    "pooled": RouteWord(
        # `width`: of what is averaged, where the module sees another
        (
            RouterTensor("norm", ("seen",), "norm", "zero"),
            _WEIGHT._replace(shape=("choices", "seen")),
        ),
        {},
        {"of": POOLS, "norm": bool, "width": int, "begin": list, "end": list},
        biased=True,
        hears=True,
    ),
    # with `patch`, so many tokens one after the other, flattened
    "sequence": RouteWord(
        (_WEIGHT._replace(shape=("choices", "patched")),),
        {},
        {"patch": int},
        biased=True,
        hears=True,
        beside=("vision",),
    ),
    "task": RouteWord((_MASKED,), {"allowed": list}, {"routers": ("one", "each")}, hears=True),
    "query": RouteWord(),
    # an MLP of the last hidden states of a pass before, ReLU between its linears (X-LoRA)
    TWOPASS: RouteWord(
        (
            RouterTensor("into", ("width", "hidden"), "width"),
            RouterTensor("into_bias", ("width",), "width", "zero"),
            RouterTensor("middle", ("middle", "width", "width"), "middle"),
            RouterTensor("middle_bias", ("middle", "width"), "middle", "zero"),
            RouterTensor("weight", ("rows", "seen")),
            RouterTensor("bias", ("rows",), start="zero"),
        ),
        {},
        {"width": int, "middle": int, "modules": int, "before": float},
        hears=True,
        once=True,
    ),
}
LAWS: Mapping[str, RouteWord] = {
    "expert_choice": RouteWord(
        (
            RouterTensor("auxiliary_in", ("auxiliary", "hidden"), "auxiliary"),
            RouterTensor("auxiliary_out", ("choices", "auxiliary"), "auxiliary"),
        ),
        {"capacity": float},
        {"score": ("softmax", "sigmoid"), "renormalise": bool, "noise": bool, "auxiliary": int},
        compares=True,
    ),
    "gumbel": RouteWord(
        (), {"temperature": float}, {"threshold": float, "hard": bool, "share": bool}
    ),
    "filled": RouteWord((), {}, {"temperature": float, "noise": float}, rest=1),
    "hard": RouteWord((), {}, {"straight": STRAIGHT}),
    "renormalised": RouteWord(),
    "soft": RouteWord((), {}, {"temperature": float}),
    "sigmoid": RouteWord((), {}, {"renormalise": bool}),
    "softmax": RouteWord(),
    "top_p": RouteWord((), {"threshold": float}, {"renormalise": bool}),
}


def reached(route: Route, experts: int) -> int:
    """Experts that work on a token, on average."""
    if route.law == "soft":
        return experts
    if "capacity" in route.options:
        return min(ceil(float(route.options["capacity"])), experts)
    return min(route.top_k + LAWS[route.law].rest, experts)


def _number(word: str, said: JsonObject) -> str:
    times, _, name = word.rpartition("*")
    if name.isdigit():
        return word
    return str(int(times or 1) * int(said[name]))


def _check_allowed(route: Route, choices: int, idle: bool) -> None:
    """Refuse a table of who may use what that is none for these choices, and ids of tokens that
    are of no kind or of two.
    """
    rows, ids = route.options["allowed"], route.options.get("ids")
    fit = all(isinstance(row, list) and len(row) == choices and set(row) <= {0, 1} for row in rows)
    counts = [sum(row) for row in rows if any(row) or not idle] if fit else []
    few = not counts or min(counts) < max(route.top_k, 1)
    if not fit or few or (ids is not None and len(rows) != len(ids) + 1):
        expected = f"a row of {choices} for each, at least top_k {route.top_k} of them 1"
        raise _unfit(f"`allowed` of a route by {route.key}", expected, rows)
    if ids is not None:
        _check_ids(ids)


def _check_ids(ids: list[object]) -> None:
    seen: set[int] = set()
    for row in ids:
        good = isinstance(row, list) and all(type(n) is int and 0 <= n < _IDS for n in row)
        if not good or not isinstance(row, list) or seen & set(row):
            raise _unfit("`ids` of a route", "token ids of each modality, each in one alone", ids)
        seen |= set(row)


def _unfit(what: str, expected: str, found: object) -> MoetoolError:
    return MoetoolError(
        f"{what} does not fit",
        file="config.json",
        expected=expected,
        found=str(found)[:200],
        hint="restore the config.json that came with the model",
    )
