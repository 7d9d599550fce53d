"""The block check: an upcycled layer against the FFN it came from, in the memory of one expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import moetool
from moetool.evaluate import blocks
from moetool.forward import block as reading
from moetool.kernels import moe
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.text_model import text_model

MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "copies": ("llama", {"experts": 4}),
    "fused": ("llama", {"experts": 4, "layout": "fused"}),
    "all-parts": ("llama", {"experts": 4, "split": 4, "top_k": 4, "router": "zero"}),
    "groups": ("qwen3", {"experts": 8, "split": 2, "top_k": 4}),
    "shared": ("llama", {"experts": 4, "split": 2, "shared": True, "target": "glm4_moe"}),
    "gated-shared": ("qwen2", {"experts": 4, "shared": True, "target": "qwen2_moe"}),
    "both-in-one": ("phi3", {"experts": 4}),
    "inside": ("llava", {"experts": 4}),
    "some-layers": ("qwen3", {"experts": 4, "layers": "1,3"}),
}


def opened(
    kind: str, models: Callable[..., Path], out: Path, **options: Any
) -> tuple[Checkpoint, Checkpoint]:
    family, recipe = MADE[kind]
    moetool.upcycle(str(models(family)), str(out), **{**recipe, **options})
    return Checkpoint.open(models(family)), Checkpoint.open(out)


@pytest.mark.parametrize("kind", MADE)
def test_exact_recipes_differ_by_rounding_only(
    kind: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    found = [*blocks.compare(*opened(kind, models, tmp_path / "out"))]
    assert [d.layer for d in found] == ([1, 3] if kind == "some-layers" else [0, 1, 2, 3])
    assert all(d.relative < 1e-5 for d in found)
    if "shared" not in kind:
        assert all(d.coverage in (pytest.approx(1.0), pytest.approx(2.5, rel=2)) for d in found)


@pytest.mark.parametrize("kind", ["copies", "fused", "inside"])
def test_a_changed_expert_is_seen_in_its_layer(
    kind: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = opened(kind, models, tmp_path / "out")
    (stored,) = [c.stored for c in Mixture.of(out).by_layer[2] if c.role == "down"][:1]
    path = Path(out.folder) / stored.file
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, "<f4", (stored.stop - stored.start) // 4, stored.start)
    values *= 3.0  # every expert of a stack, or the first one alone
    path.write_bytes(data)
    found = {d.layer: d.relative for d in blocks.compare(source, Checkpoint.open(out.folder))}
    assert found.pop(2) > 0.1 and max(found.values()) < 1e-5


def test_noise_and_scale_are_measured(models: Callable[..., Path], tmp_path: Path) -> None:
    noisy = opened("copies", models, tmp_path / "noisy", diversify="noise:0.1")
    assert all(1e-3 < d.relative < 1.0 for d in blocks.compare(*noisy))
    halved = opened("copies", models, tmp_path / "halved", scale="0.5")
    for difference in blocks.compare(*halved):
        assert 0.4 < difference.relative <= 0.5 + 1e-5


def test_the_seed_is_the_whole_randomness(models: Callable[..., Path], tmp_path: Path) -> None:
    pair = opened("copies", models, tmp_path / "out", diversify="noise:0.1")
    assert [*blocks.compare(*pair, seed=3)] == [*blocks.compare(*pair, seed=3)]
    assert [*blocks.compare(*pair, seed=3)] != [*blocks.compare(*pair, seed=4)]


def test_nothing_is_said_without_experts(models: Callable[..., Path]) -> None:
    dense = Checkpoint.open(models("llama"))
    assert [*blocks.compare(dense, dense)] == []


def test_a_dense_ffn_is_read_from_one_tensor_or_two(models: Callable[..., Path]) -> None:
    for family in ("llama", "phi3", "llava"):
        source = Checkpoint.open(models(family))
        ffn = blocks.DenseFfn.read(source, text_model(source.config), 1)
        assert ffn.gate.shape == ffn.up.shape == (128, 64) and ffn.down.shape == (64, 128)
        assert ffn.gate.dtype == torch.float32 and not torch.equal(ffn.gate, ffn.up)


class Counting:
    """How many experts of a checkpoint are in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = self.read = 0
        real = reading._experts

        def experts(mixture: Mixture, layer: int, some: range, *rest: Any) -> Any:
            self.most, self.read = max(self.most, len(some)), self.read + len(some)
            return real(mixture, layer, some, *rest)

        monkeypatch.setattr(reading, "_experts", experts)


def test_one_expert_is_in_memory_at_a_time(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are; and those that see no token are not read."""
    pair = opened("copies", models, tmp_path / "out", experts=64, top_k=1)
    counting = Counting(monkeypatch)
    assert len([*blocks.compare(*pair)]) == 4
    assert counting.most == 1 and 4 <= counting.read <= 4 * blocks.TOKENS


@pytest.mark.parametrize("family", tiny.MOE)
def test_reading_on_demand_is_reading(family: str, models: Callable[..., Path]) -> None:
    """Every family's block: routed, shared and zero experts, held or read when they run."""
    mixture = Mixture.of(Checkpoint.open(models(family)))
    layer = mixture.layers[0]
    held, loose = (reading.read(mixture, layer, hold=hold) for hold in (True, False))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    first, second = held.route(x), loose.route(x)
    assert torch.equal(first.index, second.index) and torch.equal(first.weight, second.weight)
    assert torch.equal(held.routed(x, first), loose.routed(x, second))
    one, other = held.always(x), loose.always(x)
    assert (one is None) == (other is None)
    assert one is None or other is None or torch.equal(one, other)
    assert loose.experts.count == held.experts.count == mixture.count_in(layer)


def test_on_demand_keeps_one(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture.of(Checkpoint.open(models("mixtral")))
    counting = Counting(monkeypatch)
    experts = reading.OnDemand(mixture, 0, 8, moe.activation("silu"))
    x = torch.randn(3, 64)
    for expert in (2, 2, 5, 2):
        experts.out(experts.hidden(x, expert), expert)
        assert len(experts._held) == 1
    assert counting.read == 3


def test_what_cannot_be_computed_is_refused(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = opened("copies", models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["num_local_experts"]
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "num_local_experts": None}))
    with pytest.raises(moetool.MoetoolError, match="how many experts"):
        [*blocks.compare(source, Checkpoint.open(out.folder))]
