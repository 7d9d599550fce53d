"""Does stock transformers load it, with nothing missing, and does it give the same logits?
(float32)
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from moetool.data import JsonObject
from moetool.errors import VerificationFailed
from moetool.forward import stock
from moetool.surgery.checkpoint import Checkpoint

TOKENS = 48
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
    """Largest logit difference relative to the largest logit, on random ids, and whether the
    greedy continuations agree.
    """
    import torch

    def run(checkpoint: Checkpoint) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        model = load(checkpoint, device)
        text = checkpoint.config.get("text_config") or checkpoint.config
        vocab = int(text.get("vocab_size") or model.get_input_embeddings().num_embeddings)
        ids = torch.randint(
            min(10, vocab - 1), vocab, (2, TOKENS), generator=torch.Generator().manual_seed(seed)
        ).to(device)
        special = {
            v
            for k, v in checkpoint.config.items()
            if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
        }
        for token in special:
            ids[ids == token] = (max(special) + 1) % vocab
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
            greedy = _greedy(model, ids[:1, :8])
        del model
        gc.collect()
        return logits, greedy

    expected, (words, steps) = run(source)
    made, (others, _) = run(out)
    return {
        "relative": float((made - expected).abs().max() / expected.abs().max().clamp_min(1e-30)),
        "max_logit": float(expected.abs().max()),
        "same_greedy": bool((words == others).all()),
        "greedy_tokens": GREEDY,
        "greedy_tie": _tie(words, others, steps),
    }


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
