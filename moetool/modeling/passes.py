"""A pass before the pass, for routes that look at what a whole one saw (X-LoRA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from moetool.errors import UsageError
from moetool.modeling.routes.twopass import TwopassScorer
from moetool.modeling.signals import BEFORE, Heard, Hears, wanted_by

_ANSWERS = ("labels", "output_router_logits")  # what the pass before is not asked for
CACHE = "use_cache"


def first(
    heard: Heard, held: Sequence[Hears], run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> None:
    """Run the model once for the routes that want it, and say the scores of all modules, which are
    made of the last hidden states; without gradients of that pass, as PEFT runs X-LoRA. The call
    goes on without a cache: it would hold the keys of one of the two passes. UsageError for a call
    that brings one.
    """
    holders = [*_holders(held)]
    if not holders:
        return
    if not heard.fresh:
        raise UsageError(
            "experts that look at a pass before have no cache of it",
            expected="the whole sequences",
            found="a cache that holds tokens already",
            hint="call the model, and generate, with use_cache=False",
        )
    kwargs[CACHE] = False
    kwargs.pop("past_key_values", None)
    said: Mapping[str, Any] = {k: v for k, v in kwargs.items() if k not in _ANSWERS}
    heard.before = True
    try:
        with torch.no_grad():
            asked = {"output_hidden_states": True, "return_dict": True}
            seen = run(*args, **{**said, **asked}).hidden_states[-1]
    finally:
        heard.before = False
    flat = seen.reshape(-1, seen.shape[-1])
    for router in holders:
        router.check()
        weight = router.weight
        heard.values[router.title] = router.scores(flat.to(weight.device))


def are_two(held: Sequence[Hears]) -> bool:
    """Whether a model runs twice."""
    return any(_holders(held))


def _holders(held: Sequence[Hears]) -> Iterator[TwopassScorer]:
    """The routers that hold a classifier."""
    wanted = (r for r in wanted_by(held) if BEFORE in r.reads)
    return (r for r in wanted if isinstance(r, TwopassScorer) and r.holds)
