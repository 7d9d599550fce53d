"""Does stock transformers load it, with nothing missing, and does it give the same logits?
(float32)
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

from moetool.data import JsonObject
from moetool.errors import VerificationFailed
from moetool.evaluate import feed
from moetool.forward import stock
from moetool.surgery.checkpoint import Checkpoint

GREEDY = 40
TIE = 1e-5  # relative to the largest logit


def available() -> bool:
    """Whether transformers is installed."""
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def load(checkpoint: Checkpoint, device: str = "cpu") -> Any:
    """The model in float32; VerificationFailed when the loading info is not empty (random weights
    hide there).
    """
    stock.library()
    try:
        model, info = stock.load(checkpoint)
    except Exception as problem:  # noqa: BLE001
        raise VerificationFailed(
            f"transformers cannot load it: {type(problem).__name__}: {str(problem).strip()[:300]}",
            file=checkpoint.folder,
            hint="make the output again; if it stays, report this as a bug of moetool",
        ) from None
    wrong = {k: sorted(map(str, v))[:4] for k, v in info.items() if v}
    if wrong:
        raise VerificationFailed(
            "transformers loads it with keys missing, unexpected or mismatched",
            file=checkpoint.folder,
            expected="empty loading info",
            found=wrong,
            hint="those tensors would be random: make the output again",
        )
    return model.eval().to(device)


def compare_logits(
    source: Checkpoint, out: Checkpoint, *, device: str = "cpu", seed: int = 0
) -> JsonObject:
    """Largest difference relative to the largest number of what a model gives (logits, or, where
    it has none, all), on random ids or pixels, and whether the greedy continuations agree where it
    writes text.
    """
    import torch

    def run(checkpoint: Checkpoint) -> Answer:
        model = load(checkpoint, device)
        given = feed.inputs(model, checkpoint.config, seed)
        writes = model.can_generate() and set(given) == {"input_ids"}
        with torch.no_grad():
            made = [*feed.answers(model(**given))]
            greedy = _greedy(model, given["input_ids"][:1, :8]) if writes else None
        del model
        gc.collect()
        return Answer(made, *(greedy or (None, None)))

    expected, made = run(source), run(out)
    found: JsonObject = {
        "relative": max(map(_apart, made.given, expected.given)),
        "max_logit": max(float(one.abs().max()) for one in expected.given),
        "same_greedy": True,
        "greedy_tokens": 0,
        "greedy_tie": False,
    }
    if expected.words is None or made.words is None or expected.steps is None:
        return found
    return found | {
        "same_greedy": bool((expected.words == made.words).all()),
        "greedy_tokens": GREEDY,
        "greedy_tie": _tie(expected.words, made.words, expected.steps),
    }


class Answer(NamedTuple):
    """What a model gives, and where it writes text its greedy tokens and their logits."""

    given: list[Tensor]
    words: Tensor | None
    steps: Tensor | None


def _apart(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _greedy(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """40 greedy tokens, without a cache: plain and the same for every family. Returns the ids and
    the logits [GREEDY, vocabulary] that chose them.
    """
    import torch

    steps = []
    for _ in range(GREEDY):
        steps.append(model(input_ids=ids).logits[0, -1].float())
        ids = torch.cat([ids, steps[-1].argmax(-1).reshape(1, 1)], dim=1)
    return ids, torch.stack(steps)


def _tie(words: Tensor, others: Tensor, steps: Tensor) -> bool:
    """Whether the first word that differs was as good as the other one: nearer than rounding."""
    apart = (words != others)[0].nonzero()
    if not len(apart):
        return False
    at = int(apart[0])
    logits = steps[at - (words.shape[1] - GREEDY)]
    gap = (logits[words[0, at]] - logits[others[0, at]]).abs()
    return bool(gap <= TIE * logits.abs().max())
