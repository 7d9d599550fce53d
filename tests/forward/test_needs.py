"""The memory that a walk promises: counted by hand, and the fastest way that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from moetool.errors import MoetoolError
from moetool.forward import needs as counting
from moetool.forward.batches import Batch, Batches
from moetool.forward.needs import Fit, Promised, compared_experts, needs
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

PLAIN = Promised(floor=1000, stored=100, widened=200, compared=50, hidden=30, outside=10)


def batches(*shapes: tuple[int, int]) -> Batches:
    made = [Batch(np.zeros(s, np.int64), np.full(s[0], s[1]), 0) for s in shapes]
    return Batches(made, ["text"], [sum(b.ids.size for b in made)], "digest", 64, [])


@pytest.mark.parametrize(
    ("memory", "fit"),
    [
        (None, Fit(True, False, 1230)),
        (1230, Fit(True, False, 1230)),
        (1229, Fit(True, True, 1200)),
        (1199, Fit(False, False, 1130)),
        (1129, Fit(False, True, 1100)),
        (1100, Fit(False, True, 1100)),
    ],
)
def test_the_fastest_way_that_fits(memory: int | None, fit: Fit) -> None:
    assert PLAIN.fit(memory) == fit


def test_what_fits_no_way_is_refused_with_the_least() -> None:
    with pytest.raises(MoetoolError, match="does not fit into --memory") as refused:
        PLAIN.fit(1099)
    assert "1,100" in str(refused.value) and "1,099" in str(refused.value)
    assert "--batch-tokens" in refused.value.hint


def test_comparing_may_be_the_peak() -> None:
    wide = Promised(floor=0, stored=1, widened=2, compared=500, hidden=0, outside=0)
    assert wide.fit(None).peak == 500 and wide.fit(500).widen


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "llava", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_promises_by_hand(family: str, dtype: str, models: Callable[..., Path]) -> None:
    """Experts once as stored and once widened; all else in float32; hidden states of all tokens."""
    source = Checkpoint.open(models(family, dtype=dtype))
    found = needs(source, batches((2, 16), (1, 8)))
    mixture = Mixture.of(source) if family in tiny.MOE else None
    experts = {
        c.stored.name for c in (mixture.counted.values() if mixture else ()) if c.kind == "expert"
    }
    total = sum(t.elements for t in source.tensors.values())
    inside = sum(source.tensors[n].elements for n in experts)
    assert found.hidden == 4 * 64 * (2 * 16 + 8)
    assert 0 < found.outside < 4 * (total - inside)
    if mixture is None:
        assert found.stored == found.widened == found.compared == 0
        return
    width = 2 if dtype == "bfloat16" else 4
    layers = [*mixture.layers, *mixture.mtp_layers]
    widest = max(mixture.expert_elements(n) * mixture.experts for n in layers)
    one = widest * width // mixture.experts
    assert found.stored == widest * width + 8 * one
    assert found.widened == 2 * widest * width + 8 * one
    assert found.compared == 8 * one * compared_experts(mixture)


def test_more_is_promised_for_more(models: Callable[..., Path]) -> None:
    source = Checkpoint.open(models("mixtral"))
    few, many = (needs(source, batches((n, 16))) for n in (1, 3))
    assert many.floor - few.floor == counting.PER_TOKEN * 4 * 64 * 2 * 16
    assert many.hidden == 3 * few.hidden
    assert needs(source, batches((1, 16)), extra=777).floor == few.floor + 777
    assert few.floor > counting.RESERVE


@pytest.mark.parametrize("family", tiny.MOE)
def test_compared_experts(family: str, models: Callable[..., Path]) -> None:
    """A few more than run, as many in each group of the router, never more than there are."""
    mixture = Mixture.of(Checkpoint.open(models(family)))
    few = compared_experts(mixture)
    assert min(mixture.experts, mixture.top_k + 2) <= few <= mixture.experts
    assert few % mixture.groups == 0 or few == mixture.experts
