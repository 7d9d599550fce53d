"""What a model writes itself: calibration text where there is none.

Short continuations of tokens drawn from a seed (forward/drawn.py), as the stock model of
transformers gives them, special tokens left out. The model is held whole in float32, so only one
that fits into memory can be asked. They are far nearer to text than random ids (tests/bench).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from threading import Event
from typing import TYPE_CHECKING, Any

from moetool.errors import MoetoolError, Stopped
from moetool.forward.drawn import OWN, Drawn
from moetool.progress import Progress, Stage, silent
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.text_model import TextModel, text_model
from moetool.units import show_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch

LENGTH = 64  # tokens of a continuation
TOGETHER = 64  # continuations at once
ROWS = 8  # of them, whose probabilities are summed in float64
LIMIT = 8_000_000_000  # bytes, where --memory says nothing: as `eval` and `verify` have it
RESERVE = 700_000_000  # torch and transformers imported


@dataclass(frozen=True)
class Running:
    """Where a model may run, and who hears of it. memory: bytes it may take (None: LIMIT)."""

    memory: int | None = None
    device: str = "cpu"
    tell: Progress = silent
    stop: Event | None = None


ANYWHERE = Running()


def needed(source: Checkpoint) -> int:
    """Peak bytes of letting a model write: itself in float32 beside the file that is read, keys and
    values of the tokens in work, and their logits.
    """
    at = text_model(source.config)
    hidden, layers = int(at.field("hidden") or 0), int(at.field("layers") or 1)
    weights = sum(stored.elements for stored in source.tensors.values())
    widest = max(stored.elements for stored in source.tensors.values())
    vocab = int(at.layout.field("vocab", at.config) or widest // max(1, hidden))
    tokens = TOGETHER * LENGTH
    held = 4 * weights + 2 * 4 * widest + sum(size for size, _ in source.files.values())
    return RESERVE + held + tokens * 4 * hidden * (2 * layers + 16) + TOGETHER * vocab * 4 * 3


def fits(source: Checkpoint, memory: int | None) -> bool:
    """Whether the model can be asked within --memory."""
    return needed(source) <= (memory or LIMIT)


@dataclass(frozen=True)
class Own(Drawn):
    """Stands where documents would, once the model is known."""

    source: Checkpoint | None = field(default=None, repr=False, compare=False)
    running: Running = field(default=ANYWHERE, compare=False)

    def rows(self, tokens: int, length: int, seed: int) -> Iterator[np.ndarray]:
        """Sequences of `length` that hold `tokens` ids in all: continuations one after the other.

        Raises MoetoolError where the model does not fit, or transformers cannot run it.
        """
        import numpy as np

        assert self.source is not None and self.ids is not None
        if not fits(self.source, self.running.memory):
            raise _too_large(self.source, self.running.memory or LIMIT)
        asked = _Asked(self.source.folder, str(self.source.fingerprint()), tokens, seed, self)
        flat = np.concatenate(_written(asked))[:tokens]
        for start in range(0, tokens, length):
            if len(flat[start : start + length]) > 1:
                yield flat[start : start + length]


@dataclass(frozen=True)
class _Asked:
    """What decides what a model writes; one command asks for it more than once."""

    folder: str
    files: str
    tokens: int
    seed: int
    own: Own = field(compare=False)


def of(source: Checkpoint, drawn: Drawn, running: Running) -> Own:
    """What the model writes, of the ids that may be drawn."""
    return Own(OWN, drawn.ids, drawn.weight, source, running)


@lru_cache(maxsize=1)
def _written(asked: _Asked) -> tuple[np.ndarray, ...]:
    """Continuations [LENGTH] of the model's own, as many as hold the tokens."""
    import numpy as np

    from moetool.forward import stock

    own, made = asked.own, []
    assert own.source is not None
    count = -(-asked.tokens // LENGTH)
    first = np.concatenate(list(Drawn.rows(own, 2 * count, 2 * count, asked.seed)))[:count]
    own.running.tell(_STAGE, 0, count * LENGTH)
    model, info = stock.load(own.source)
    at = text_model(own.source.config)
    lost = [n for n in chain.from_iterable(info.get(k) or () for k in _LOST) if _counts(at, str(n))]
    if lost:
        raise _cannot(own.source, f"{len(lost)} tensors not read, {lost[0]} first")
    model = model.to(own.running.device).eval()
    with stock.running(own.source.folder):
        for start in range(0, count, TOGETHER):
            names = f"calibrate/{OWN}/{start}"
            ids = _continued(model, first[start : start + TOGETHER], own, asked.seed, names)
            made += list(ids)
            own.running.tell(_STAGE, len(made) * LENGTH, count * LENGTH)
    return tuple(made)


def _counts(at: TextModel, name: str) -> bool:
    """Whether a tensor has a part in the text; layers beyond the stack (MTP) have none."""
    layer = at.layer_of(name)
    return layer is None or layer < int(at.field("layers") or 0)


_STAGE = Stage("write text", "tokens")
_LOST = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _continued(model: Any, first: np.ndarray, own: Own, seed: int, name: str) -> np.ndarray:
    """Each first token with what the model goes on to say, [continuations, LENGTH]."""
    import numpy as np
    import torch

    from moetool.kernels import draw

    allowed = torch.from_numpy(own.ids).to(own.running.device)
    now = torch.from_numpy(first).to(own.running.device)[:, None]
    said, cache = [now], None
    with torch.inference_mode():
        for step in range(1, LENGTH):
            if own.running.stop is not None and own.running.stop.is_set():
                raise Stopped("stopped while the model wrote", hint="run it again")
            out = model(input_ids=now, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chance = torch.from_numpy(draw.uniform(len(now), seed, f"{name}/{step}"))
            now = allowed[_sampled(out.logits[:, -1, allowed], chance)][:, None]
            said.append(now)
    written: np.ndarray = torch.cat(said, 1).cpu().numpy().astype(np.int64)
    return written


def _sampled(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Places drawn from the softmax of logits [rows, places] by numbers in (0, 1) [rows]."""
    import torch

    found = []
    for start in range(0, len(logits), ROWS):
        upto = torch.softmax(logits[start : start + ROWS].double(), -1).cumsum(-1)
        at = chance[start : start + ROWS, None].to(logits.device) * upto[:, -1:]
        found.append(torch.searchsorted(upto, at)[:, 0].clamp_max(logits.shape[1] - 1))
    return torch.cat(found)


def too_large(source: Checkpoint, memory: int | None) -> str:
    """What is said where random ids stand in for a model that cannot write."""
    need, room = show_bytes(needed(source)), show_bytes(memory or LIMIT)
    return (
        "random token ids stand for text: the model would write better text itself, but for that "
        f"it must be in memory whole ({need}, and there may be {room}); raise --memory, or give "
        "text with --calibrate FILE"
    )


def _too_large(source: Checkpoint, memory: int) -> MoetoolError:
    return MoetoolError(
        "the model does not fit into memory whole, so it cannot write its own text",
        file=source.folder,
        expected=f"at most {show_bytes(memory)}",
        found=show_bytes(needed(source)),
        hint="raise --memory, or --calibrate random",
    )


def _cannot(source: Checkpoint, why: str) -> MoetoolError:
    return MoetoolError(
        f"transformers does not read this model whole: {why}",
        file=source.folder,
        hint="give text: --calibrate FILE, or --calibrate random",
    )
