"""The walk computes exactly what the whole model does, in every family, and stops and goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import moetool
from moetool.forward import block as blocks
from moetool.forward import walk as walking
from moetool.forward.batches import Batch, Batches
from moetool.forward.profiler import Profiler
from moetool.forward.stats import Wanted
from moetool.forward.walk import Budget, Walk
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture

DENSE = ("llama", "gemma", "cohere2", "lfm2", "qwen3_vl", "llava")


def batches(*shapes: tuple[int, int], seed: int = 0, files: int = 1) -> Batches:
    """Random ids; the second batch is padded on the right."""
    dice = np.random.default_rng(seed)
    made = []
    for number, (count, length) in enumerate(shapes):
        lengths = (
            np.full(count, length) if number == 0 else np.maximum(2, length - np.arange(count) * 5)
        )
        made.append(Batch(dice.integers(10, 150, (count, length)), lengths, number % files))
    return Batches(
        tuple(made),
        tuple(f"file{i}" for i in range(files)),
        (sum(b.tokens for b in made),) * files,
        max(s[1] for s in shapes),
        "test",
    )


SHAPES = ((2, 24), (3, 20))


def apart(walk: Walk, model: Any) -> float:
    """Largest logit difference at real tokens, relative to the largest logit."""
    worst = 0.0
    for number, batch in enumerate(walk.batches.batches):
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(batch.ids)).logits
        made = torch.cat([walk.logits(number, 0, 7), walk.logits(number, 7, batch.ids.shape[1])], 1)
        real = torch.from_numpy(batch.valid).view(batch.ids.shape)
        worst = max(worst, float((expected - made)[real].abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("family", [*tiny.MOE, *DENSE])
def test_it_is_the_whole_model(family: str, models: Callable[..., Path]) -> None:
    folder = models(family)
    walk = Walk(Checkpoint.open(folder), batches(*SHAPES), Budget())
    walk.run()
    assert apart(walk, tiny.load(folder)) < 2e-6


def test_sixteen_moe_families_are_tried() -> None:
    assert len(tiny.MOE) == 16


@pytest.mark.parametrize("family", tiny.MOE)
def test_statistics_count_every_choice_once(family: str, models: Callable[..., Path]) -> None:
    """Frequencies, gate mass and REAP against the dense weights of the kernel itself; padding is
    never counted.
    """
    source = Checkpoint.open(models(family))
    look = Profiler(Wanted(sample=16, dense=True))
    text = batches(*SHAPES)
    walk = Walk(source, text, Budget())
    walk.run(look)
    mixture = Mixture.of(source)
    assert sorted(look.layers) == list(mixture.layers)
    for number, stats in look.layers.items():
        assert stats.tokens == text.total and stats.count.sum() == text.total * mixture.top_k
        assert np.trace(stats.together) == stats.count.sum() and stats.x.shape == (16, 64)
        block = blocks.read(mixture, number)
        mean = stats.mean("reap")
        assert (mean[stats.total("count")[: mixture.experts] > 0] > 0).all() and np.allclose(
            np.diag(stats.cosine), 1.0, atol=1e-4
        )
        assert stats.max_out.shape == (block.experts.count,) and (stats.norm2 >= 0).all()


def test_statistics_are_those_of_a_plain_float64_reference(models: Callable[..., Path]) -> None:
    """One layer, written out: every number of the first MoE layer from the inputs that a hook on
    the real model sees.
    """
    folder = models("qwen3_moe")
    source, text = Checkpoint.open(folder), batches((3, 20))
    look = Profiler(Wanted(sample=10**6, dense=True, covariance=True))
    Walk(source, text, Budget()).run(look)
    stats = look.layers[1]
    model, seen = tiny.load(folder), []
    own = model.model.layers[1]
    hook = own.mlp.register_forward_hook(
        lambda m, a, out: seen.append((a[0].double().reshape(-1, 64), out.double().reshape(-1, 64)))
    )
    after = own.register_forward_hook(lambda m, a, out: seen.append(out.double().reshape(-1, 64)))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(text.batches[0].ids))
    hook.remove()
    after.remove()
    (x, out), stream = seen
    gate_up, down, router = (
        p.double()
        for p in (own.mlp.experts.gate_up_proj, own.mlp.experts.down_proj, own.mlp.gate.weight)
    )
    p = (x @ router.T).softmax(-1)
    weight, index = p.topk(3)
    weight = weight / weight.sum(-1, keepdim=True)
    moved = 1 - torch.nn.functional.cosine_similarity(stream - out, stream)
    for e in range(8):
        token, slot = torch.where(index == e)
        g, u = (x[token] @ gate_up[e].T).chunk(2, -1)
        h = torch.nn.functional.silu(g) * u
        f = h @ down[e].T
        w = weight[token, slot]

        def close(a, b):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=2e-4, atol=1e-6)

        close(stats.reap[0, e], (f.norm(dim=1) * w).sum())
        close(stats.gate[0, e], w.sum())
        close(stats.norm[e], f.norm(dim=1).sum())
        close(stats.out_sum[e], f.sum(0))
        close(stats.out_sq[e], (f * f).sum(0))
        close(stats.max_in[e], h.abs().max())
        close(stats.max_out[e], f.abs().max())
        close(stats.easy[e], (f.norm(dim=1) * w * moved[token].clamp_min(0)).sum())
        close(stats.in_sq[e], (x[token] ** 2).sum(0))
        close(stats.mid_sq[e], (h**2).sum(0))
        close(stats.mid_cov[e], (h * w[:, None]).T @ (h * w[:, None]))
    token = stream.abs().amax(1).argmax()
    wanted = torch.stack([stream[token].abs().amax(), stream[token].abs().median()])
    np.testing.assert_allclose(stats.stream, wanted.numpy(), rtol=1e-5)
    np.testing.assert_allclose(stats.in_cov, (x.T @ x).numpy(), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(stats.x, x.numpy(), atol=1e-5)
    every = torch.stack(
        [
            torch.nn.functional.silu((x @ gate_up[e].T).chunk(2, -1)[0])
            * (x @ gate_up[e].T).chunk(2, -1)[1]
            @ down[e].T
            for e in range(8)
        ]
    )
    np.testing.assert_allclose(
        stats.gram,
        (torch.einsum("etd,ftd->ef", every, every) / len(x)).detach().numpy(),
        rtol=1e-3,
        atol=1e-6,
    )


def test_spilled_narrow_and_in_memory_are_the_same(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever --memory makes it do, the numbers stay (bf16 experts widened one at a time or all
    at once).
    """
    source = Checkpoint.open(models("mixtral", dtype="bfloat16", num_local_experts=64))
    text = batches(*SHAPES)
    free = Walk(source, text, Budget())
    free.run()
    needed = walking.needs(source, text)
    tight = Walk(
        source, text, Budget(needed.floor + max(needed.stored, needed.compared), tmp_path / "work")
    )
    assert tight.hidden.spill and not tight.widen and tight.peak < free.peak
    tight.run()
    for number, batch in enumerate(text.batches):
        assert torch.equal(
            free.logits(number, 0, batch.ids.shape[1]), tight.logits(number, 0, batch.ids.shape[1])
        )
    with pytest.raises(moetool.MoetoolError, match="does not fit into --memory"):
        Walk(source, text, Budget(needed.floor, tmp_path / "less"))


@pytest.mark.parametrize("spill", [False, True])
def test_it_goes_on_where_it_stopped(
    spill: bool, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Stopped inside layer 2; the second run starts there and ends with the same bytes."""
    source, text = Checkpoint.open(models("qwen2_moe")), batches(*SHAPES)
    whole = Walk(source, text, Budget())
    whole.run()
    needed = walking.needs(source, text)
    budget = Budget(
        needed.floor + max(needed.widened, needed.compared) if spill else None, tmp_path / "work"
    )
    stop = threading.Event()
    first = Walk(
        source,
        text,
        budget,
        stop=stop,
        tell=lambda stage, layer, count: stop.set() if layer == 2 else None,
    )
    with pytest.raises(moetool.Stopped):
        first.run()
    assert [p.name for p in (tmp_path / "work").glob("hidden-*.bin")] == ["hidden-00002.bin"]
    seen: list[int] = []
    second = Walk(source, text, budget, tell=lambda stage, layer, count: seen.append(layer))
    second.run()
    assert seen[0] == 2
    assert torch.equal(whole.logits(1, 0, 20), second.logits(1, 0, 20))


def test_a_block_that_disagrees_is_a_loud_error(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "law", lambda self: {"top_k": 3, "renorm": False})
    with pytest.raises(moetool.MoetoolError, match="otherwise than transformers does") as refused:
        Walk(Checkpoint.open(models("qwen3_moe")), batches(*SHAPES), Budget()).run()
    assert "layer 1" in str(refused.value) and "at most" in str(refused.value)


def test_an_incomplete_checkpoint_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = models("mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(moetool.MoetoolError, match="missing") as refused:
        Walk(Checkpoint.open(tmp_path), batches(*SHAPES), Budget())
    assert "layers.2.self_attn.q_proj" in str(refused.value)


def test_a_full_disk_is_a_sentence(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from moetool.forward import hidden

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    source, text = Checkpoint.open(models("mixtral", num_local_experts=64)), batches(*SHAPES)
    needed = walking.needs(source, text)
    walk = Walk(
        source, text, Budget(needed.floor + max(needed.widened, needed.compared), tmp_path / "work")
    )
    monkeypatch.setattr(hidden.os, "pwrite", full)
    with pytest.raises(moetool.MoetoolError, match="No space left") as refused:
        walk.run()
    assert "same command again" in str(refused.value)
