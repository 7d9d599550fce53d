"""How far a model with groups of experts is from its source at birth, where its certificate does
not say that it computes the same: measured on random ids, for no text is asked for.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, Stopped
from moetool.evaluate import logits
from moetool.forward.answers import LOGIT_BYTES
from moetool.forward.needs import PER_ATTENTION, held_whole
from moetool.methods.options import Checking
from moetool.progress import Progress
from moetool.surgery.spec import Stored
from moetool.surgery.text_model import text_model
from moetool.units import show_bytes

if TYPE_CHECKING:
    from moetool.forward.profile import Calibration
    from moetool.methods.prepared import Prepared
    from moetool.surgery.checkpoint import Checkpoint

TOKENS, LENGTH = 2048, 256
DRAWN = "random ids"


def promise(prepared: Prepared) -> int:
    """Peak bytes of measuring; 0 where nothing is measured."""
    needed = _needed(prepared) if prepared.made.compared else 0
    return needed if needed <= _most(prepared) and logits.available() else 0


def _most(prepared: Prepared) -> int:
    return prepared.options.common.memory or Checking().memory


def _skipped(prepared: Prepared) -> str:
    """Why nothing is measured; empty where it is."""
    if not logits.available():
        return "transformers is not installed"
    from moetool.forward import stock

    if (needed := _needed(prepared)) > _most(prepared):
        return f"it runs whole in float32, which takes {show_bytes(needed)} of --memory"
    source = prepared.origins[0]
    is_words = stock.answers_in_words(source.config, source.folder)
    return "" if is_words else "it is no language model"


def measure(
    prepared: Prepared, written: Checkpoint, *, tell: Progress, stop: threading.Event | None
) -> JsonObject | str:
    """What `evaluate` finds of finished shards; a sentence where it cannot be measured."""
    from moetool.evaluate.perplexity import Room, evaluate

    if why := _skipped(prepared):
        return why
    room, source = Room(device=prepared.options.common.device), prepared.origins[0]
    try:
        found = evaluate(written, _ids(), reference=source, room=room, tell=tell, stop=stop)
    except Stopped:
        raise
    except MoetoolError as problem:
        return problem.message
    except Exception as problem:  # noqa: BLE001 - what was written is whole all the same
        return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:200]}"
    return found | {"held_out": False, "drawn": DRAWN}


def _ids() -> Calibration:
    from moetool.forward.batches import Cut
    from moetool.forward.drawn import RANDOM
    from moetool.forward.profile import Calibration

    return Calibration((RANDOM,), Cut(TOKENS, LENGTH, pack=True, shuffle=False, seed=0))


def _needed(prepared: Prepared) -> int:
    """The output whole, beside what stays of the source when it was sent through layer by layer;
    attention in matrices, which few families need, is counted for all.
    """
    source, plan = prepared.origins[0], prepared.plan
    lying = {n: Stored(n, t.dtype, t.shape, "", 0, t.size) for n, t in plan.targets.items()}
    planned = replace(source, config=plan.config, tensors=plan.seen().tensors, lying=lying)
    at = text_model(source.config)
    outside = (t.elements for n, t in source.tensors.items() if at.layer_of(n) is None)
    attention = PER_ATTENTION * 4 * int(at.field("heads") or 0) * TOKENS * LENGTH
    kept = 4 * sum(outside) + 4 * TOKENS * int(at.field("hidden") or 0)
    return held_whole(planned, [TOKENS]) + attention + kept + 2 * LOGIT_BYTES
