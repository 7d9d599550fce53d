"""Stacks of experts that lie on the Hub as [experts, in, out], the other way round than
transformers 5 saves them: every verb reads both, and a new one is written as on the Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from moetool import verbs
from moetool.report.anatomy import anatomy
from moetool.surgery import clients, complete
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.ops import run_task
from moetool.surgery.spec import Piece, Task

FAMILY = "qwen3_vl_moe"
GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def both(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As transformers 5 saves a model, and as the Hub has it."""
    return in_two_ways(models(FAMILY), tmp_path_factory.mktemp("hub"))


def in_two_ways(saved: Path, hub: Path) -> dict[str, Path]:
    """A model, and its copy whose stacks lie as on the Hub."""
    for file in saved.iterdir():
        (hub / file.name).write_bytes(file.read_bytes())
    tensors = load_file(hub / "model.safetensors")
    stacks = {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if ".experts." in n}
    save_file(tensors | stacks, hub / "model.safetensors", {"format": "pt"})
    return {"saved": saved, "hub": hub}


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("prune", {"method": "router-distance"}),
        ("prune", {"calibrate": ["random"], "tokens": 2048, "seq_len": 128, "refit_tokens": 1024}),
        ("merge", {"method": "alike"}),
        ("merge", {"method": "alike", "features": "svd"}),
    ],
    ids=["bytes", "refit", "alike", "svd"],
)
def test_both_are_read_alike(
    both: dict[str, Path], tmp_path: Path, verb: str, options: dict[str, Any]
) -> None:
    logits = []
    for name, source in both.items():
        verbs.make(verb)(str(source), str(tmp_path / name), ratio=0.5, **options)
        logits.append(tiny.logits(tmp_path / name))
    assert logits[0].std() > 0.1
    assert abs(logits[0] - logits[1]).max() < 1e-5 * abs(logits[0]).max()


@pytest.mark.parametrize("width", [32, 64], ids=["gate_up", "down"])
def test_one_stack_may_be_square(width: int, models: Callable[..., Path], tmp_path: Path) -> None:
    """Twice the width, or the width, is that of a token: the other stack says how both lie."""
    text = tiny.MOE[FAMILY][1]["text_config"] | {"moe_intermediate_size": width}
    (tmp_path / "hub").mkdir()
    pair = in_two_ways(models(FAMILY, text_config=text), tmp_path / "hub")
    merged = []
    for name, source in pair.items():
        out = tmp_path / f"{name}-merged"
        verbs.make("merge")(str(source), str(out), ratio=0.5, method="alike", features="svd")
        merged.append(load_file(out / "model.safetensors"))
    lying = [
        Mixture.of(Checkpoint.open(str(source))).orientation(0)["transposed"]
        for source in pair.values()
    ]
    assert lying == [False, True]
    assert merged[0].keys() == merged[1].keys()
    for name, held in merged[0].items():
        other = merged[1][name]
        assert torch.allclose(held, other.transpose(1, 2) if ".experts." in name else other)


def test_what_is_there_is_said_alike(both: dict[str, Path]) -> None:
    saved, hub = (Checkpoint.open(str(both[name])) for name in ("saved", "hub"))
    assert complete.compare(hub) == complete.compare(saved)
    assert complete.compare(hub).fault is None
    assert anatomy(hub)["layers"] == anatomy(saved)["layers"]
    facts = [clients.traits(c.config, c.tensors).facts["turned"] for c in (saved, hub)]
    assert facts == [False, True]


def test_another_shape_is_a_fault(both: dict[str, Path], tmp_path: Path) -> None:
    config = (both["hub"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    tensors = load_file(both["hub"] / "model.safetensors")
    tensors[GATE_UP] = tensors[GATE_UP][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fault = complete.compare(Checkpoint.open(str(tmp_path))).fault
    assert fault is not None and (fault.what, fault.tensor) == (complete.SHAPED, GATE_UP)


def test_an_upcycle_lies_as_on_the_hub(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("qwen3_vl"), tmp_path / "out"
    verbs.make("upcycle")(str(source), str(out), experts=2, top_k=2)
    dense, made = (load_file(folder / "model.safetensors") for folder in (source, out))
    ffn = GATE_UP.removesuffix("experts.gate_up_proj")
    one = torch.cat([dense[f"{ffn}{name}_proj.weight"] for name in ("gate", "up")]).T
    assert torch.equal(made[GATE_UP], torch.stack([one, one]))
    config = Checkpoint.open(str(out)).config["text_config"]
    assert (config["num_experts"], config["norm_topk_prob"]) == (2, True)
    assert config["tie_word_embeddings"] is False


def test_slabs_are_what_neurons_makes_beside_each_other() -> None:
    gate, up = torch.randn(2, 8, 6)
    cut = {"axis": 0, "parts": 2, "order": "order", "first": 1, "scale": 2.0}
    each = [
        {"noise": {"sigma": 0.1}, "seed": 1, "name": name, "permute": "layer0"}
        for name in ("gate", "up")
    ]

    def ran(op: str, inputs: list[torch.Tensor], shape: tuple[int, int], more: Any) -> list[Any]:
        outs = tuple(Piece(f"out{n}", shape, 0) for n in range(3))
        pieces = tuple(Piece(f"in{n}", tuple(x.shape), 0) for n, x in enumerate(inputs))
        dtypes = {p.name: "F32" for p in (*outs, *pieces)}
        tables = {"order": [3, 1, 2, 0, 7, 5, 6, 4]}
        task = Task(op, pieces, outs, cut | more)
        return [np.asarray(value) for _, value in run_task(task, inputs, dtypes, tables)]

    slabs = ran("slabs", [gate, up], (6, 8), {"each": each})
    halves = [ran("neurons", [x], (4, 6), own) for x, own in zip((gate, up), each, strict=True)]
    for slab, *parts in zip(slabs, *halves, strict=True):
        assert np.array_equal(slab, np.concatenate(parts).T)
    assert not np.array_equal(slabs[0], slabs[2])
