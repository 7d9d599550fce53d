"""What a model writes itself is what it would say: drawn from its own probabilities, the same for a
seed, special tokens left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from moetool.demo import MODEL
from moetool.errors import MoetoolError
from moetool.forward import drawn, own, stock
from moetool.forward.batches import Batches, Cut
from moetool.forward.own import Running
from moetool.forward.profile import Calibration
from moetool.kernels import draw
from moetool.surgery.checkpoint import Checkpoint

SOME = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def written(folder: Path, *, memory: int | None = None, **cut: int) -> Batches:
    told = {"tokens": 300, "seq_len": 128} | cut
    asked = Calibration(("own",), Cut(**told), running=Running(memory))
    return asked.read(Checkpoint.open(folder))


def rows(found: Batches) -> np.ndarray:
    return np.concatenate([b.ids.reshape(-1)[b.valid] for b in found.batches])


def test_the_same_text_for_a_seed() -> None:
    first = written(MODEL)
    assert (
        first.total == 300
        and first.drawn == ("own",)
        and first.peak == own.needed(Checkpoint.open(MODEL))
    )
    assert first.described == [{"name": "own", "tokens": 300, "drawn": "own"}]
    own._written.cache_clear()
    assert written(MODEL).digest == first.digest != written(MODEL, seed=1).digest
    special = set(stock.tokenizer(MODEL).all_special_ids)
    assert not set(rows(first).tolist()) & special


def test_each_token_is_drawn_from_what_the_model_says() -> None:
    """Without a cache and with the same numbers: the same tokens."""
    source = Checkpoint.open(MODEL)
    ids = drawn.of(MODEL, source.config, 512)
    asked = own.of(source, ids, Running())
    (row,) = asked.rows(2 * own.LENGTH, 2 * own.LENGTH, seed=3)
    model = stock.load(source)[0].eval()
    assert ids.ids is not None
    for number, said in enumerate(row.reshape(2, own.LENGTH)):
        with torch.no_grad():
            logits = model(torch.from_numpy(said)[None]).logits[0]
        for step in (1, 2, 17, own.LENGTH - 1):
            chance = draw.uniform(2, 3, f"calibrate/own/0/{step}")[number]
            likely = torch.softmax(logits[step - 1, ids.ids].double(), -1).numpy()
            upto, place = np.cumsum(likely), int(np.searchsorted(ids.ids, said[step]))
            assert upto[place] - likely[place] - 1e-4 < chance < upto[place] + 1e-4


def test_places_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(20_000, 4)
    chance = torch.from_numpy(draw.uniform(20_000, 0, "places"))
    counts = torch.bincount(own._sampled(logits, chance), minlength=4) / 20_000
    assert torch.allclose(counts.double(), torch.softmax(logits[0].double(), 0), atol=0.01)


def test_a_model_that_does_not_fit_cannot_write() -> None:
    source = Checkpoint.open(MODEL)
    assert own.fits(source, None) and not own.fits(source, own.needed(source) - 1)
    with pytest.raises(MoetoolError, match="does not fit into memory whole") as refused:
        written(MODEL, memory=200_000_000, seed=7)
    assert "--calibrate random" in refused.value.hint


@pytest.mark.parametrize(
    "family",
    [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in tiny.MOE],
)
def test_every_family_writes(family: str, models: Callable[..., Path]) -> None:
    found = written(models(family), tokens=130)
    assert found.total == 130 and len(set(rows(found).tolist())) > 20
