"""extend over every family: outputs load in stock transformers with nothing missing, compute what
the block with copied experts computes, and hold every old expert byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Done, tree
from test_reductions import close, expected, logits, text

import moetool
from moetool.forward.profile import Profile
from moetool.methods.extend.choose import Copies
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.spec import whole

Run = Callable[..., Done]
__all__ = ["text"]
CUT: dict[str, Any] = {"tokens": 400, "seq_len": 40}


def groups_of(source: Path) -> int:
    return Mixture.of(Checkpoint.open(source)).groups


def leads(report: dict[str, Any], source: Path) -> dict[int, Any]:
    """{layer: old expert of each new one}, from what the report says was copied."""
    mixture, copies = Mixture.of(Checkpoint.open(source)), Copies.from_json(report)
    return {n: copies.decision(n, mixture).leads for n in mixture.layers}


def expert_bytes(folder: Path, layer: int, expert: int) -> dict[str, bytes]:
    opened = Checkpoint.open(folder)
    pieces = Mixture.of(opened).pieces(layer, expert)
    return {role: bytes(opened.read(piece)) for role, piece in pieces.items()}


@pytest.mark.parametrize("family", tiny.MOE)
def test_extend(family: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = models(family), tmp_path / "out"
    count = groups_of(source)
    report = moetool.extend(str(source), str(out), calibrate=[str(text)], copies=count, **CUT)
    assert (report["experts_before"], report["experts"]) == (8, 8 + count)
    made = leads(report, source)
    for layer, order in made.items():
        assert sorted(set(order)) == [*range(8)] and len(order) == 8 + count
        for new, old in enumerate(order):
            assert expert_bytes(out, layer, new) == expert_bytes(source, layer, old)
    close(logits(out), expected(source, made, lambda n, block, order: block.with_experts(order)))
    checked = moetool.verify(str(out), against=[str(source)])
    assert checked["verified"] == "bytes" and checked["bytes"]["computed_tensors"] == 0


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "gpt_oss"])
def test_a_copy_that_is_never_chosen_changes_nothing(
    family: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    count = groups_of(source)
    told = {"copy_expert": "2,5"} if count == 1 else {"calibrate": [str(text)], "copies": count}
    report = moetool.extend(str(source), str(out), router="never", **told, **CUT)
    assert report["certificate"]["level"] == "exact" and report["experts"] > 8
    close(logits(out), logits(source), 1e-6)


@pytest.mark.parametrize(
    ("family", "more", "level"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "exact"),
        ("llama4_text", {"num_experts_per_tok": 1}, "exact"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}, "none"),
        ("mixtral", {}, "none"),
    ],
)
def test_top_1_with_a_weight_of_its_own_is_exact(
    family: str, more: dict[str, Any], level: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Whichever of an expert and its copy is chosen, it is the same; not where all share a sum."""
    if family not in tiny.MOE:
        pytest.skip("no tiny model")
    source, out = models(family, **more), tmp_path / "out"
    report = moetool.extend(str(source), str(out), copy_expert="3", copies=2)
    assert report["certificate"]["level"] == level
    apart = (logits(out) - logits(source)).abs().max() / logits(source).abs().max()
    assert (float(apart) < 1e-6) == (level == "exact")


def test_near_experts_of_phimoe_share_a_weight(models: Callable[..., Path]) -> None:
    """As stock transformers has it, where the router keeps its jitter."""
    source = models("phimoe", router_jitter_noise=0.3)
    close(logits(source), expected(source, dict.fromkeys(range(4)), lambda n, b, layer: b))


def test_the_most_used_experts_where_routing_shifted(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """e* and the half of the layers by MoExtend's score, computed anew from the profiles."""
    source = models("qwen3_moe")
    other = tmp_path / "other.jsonl"
    dice = np.random.default_rng(5)
    rows = (json.dumps({"input_ids": dice.integers(10, 40, 40).tolist()}) for _ in range(10))
    other.write_text("\n".join(rows))
    for name, file in (("before", text), ("after", other)):
        moetool.profile(str(source), str(tmp_path / name), calibrate=[str(file)], **CUT)
    told = {"stats": str(tmp_path / "after"), "before": str(tmp_path / "before")}
    report = moetool.extend(str(source), str(tmp_path / "out"), layers="auto", copies=2, **told)
    score, used = {}, {}
    for layer in Profile.open(tmp_path / "after").facts["layers"]:
        after, before = (
            Profile.open(tmp_path / n).layer(layer).count.sum(0) for n in ("after", "before")
        )
        score[layer] = float(np.std(after / after.sum() - before / before.sum()))
        used[layer] = set(np.argsort(-after, kind="stable")[:2].tolist())
    best = sorted(score, key=lambda n: -score[n])[: len(score) // 2]
    assert set(map(int, report["copies"])) == set(best)
    assert all(set(e) == used[int(n)] for n, e in report["copies"].items())
    assert report["scores"] == pytest.approx({str(n): s for n, s in score.items()}, rel=1e-5)
    assert report["counts"] == "ragged" and report["experts"] == [8, 10]


def test_copies_move_without_torch(models: Callable[..., Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys, moetool; moetool.extend(sys.argv[1], sys.argv[2], copy_expert='1');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", script, str(models("mixtral")), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_resumed_and_dry(models: Callable[..., Path], tmp_path: Path, moetool: Run) -> None:
    """A dry run writes nothing and says the same plan; the same command twice is done."""
    words = ["extend", models("mixtral"), tmp_path / "out", "--copy-expert", "1", "--json"]
    dry = moetool(*words, "--dry-run")
    assert dry.returncode == 0 and not (tmp_path / "out").exists()
    assert moetool(*words).json["plan_digest"] == dry.json["plan_digest"]
    before = tree(tmp_path / "out")
    assert moetool(*words).returncode == 0 and tree(tmp_path / "out") == before


def test_the_kl_of_a_copy_is_measured_and_gated(
    models: Callable[..., Path], text: Path, tmp_path: Path, moetool: Run
) -> None:
    words = ["extend", models("mixtral"), tmp_path / "out", "--copy-expert", "1", "--json"]
    words += ["--text", text, "--text-tokens", "200", "--seq-len", "40"]
    refused = moetool(*words, "--max-kl", "1e-9")
    assert refused.returncode == 4 and not (tmp_path / "out" / "config.json").exists()
    said = moetool(*words, "--max-kl", "5").json
    assert 1e-6 < said["quality"]["kl"] < 5


@pytest.mark.parametrize(
    ("family", "words", "said"),
    [
        ("mixtral", ["--copy-expert", "8"], "names an expert that is not there"),
        ("mixtral", ["--copy-expert", "x"], "not understood"),
        ("mixtral", [], "looks at text"),
        ("mixtral", ["--copy-expert", "1", "--stats", "x"], "nothing looks at the text"),
        ("mixtral", ["--copy-expert", "1,2", "--copies", "3"], "other than --copies"),
        ("mixtral", ["--copy-expert", "1", "--router", "never"], "a router with a bias"),
        ("mixtral", ["--copy-expert", "1", "--layers", "9"], "a layer that is not there"),
        ("glm4_moe", ["--copy-expert", "1", "--layers", "0"], "no layer with experts"),
        ("deepseek_v3", ["--copy-expert", "1"], "groups of a group-limited router"),
        ("mixtral", ["--calibrate", "TEXT", "--copies", "9"], "more than there are"),
        ("mixtral", ["--copy-expert", "1", "--before", "x"], "does nothing without"),
        ("llama", ["--copy-expert", "1"], "has no experts"),
    ],
)
def test_refused_in_one_sentence(
    family: str,
    words: list[str],
    said: str,
    models: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    moetool: Run,
) -> None:
    told = [str(text) if w == "TEXT" else w for w in words]
    done = moetool("extend", models(family), tmp_path / "out", *told)
    assert done.returncode in (1, 2) and said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_changed_decisions_are_refused(
    models: Callable[..., Path], tmp_path: Path, moetool: Run
) -> None:
    source, out = models("mixtral"), tmp_path / "out"
    assert moetool("extend", source, out, "--copy-expert", "1").returncode == 0
    good = json.loads((out / "moetool.json").read_text())
    for wrong in ({"copies": {"0": [8]}}, {"copies": {"9": [1]}}, {"copies": 3}, {"copy": {}}, []):
        (out / "moetool.json").write_text(json.dumps(good | {"decisions": wrong}))
        done = moetool("verify", out, "--against", source, "--no-load")
        assert done.returncode in (1, 2, 4), (wrong, done.stderr)


def test_copied_bytes_of_quantized_experts(models: Callable[..., Path], tmp_path: Path) -> None:
    """Codes and scales move as they lie."""
    small, out = tmp_path / "small", tmp_path / "out"
    moetool.quantize(str(models("qwen3_moe")), str(small), format="int4/16", loader_check=False)
    report = moetool.extend(str(small), str(out), copy_expert="3")
    assert report["certificate"]["level"] == "none"
    one, two = Checkpoint.open(small), Checkpoint.open(out)
    for name in ("gate_proj", "down_proj"):
        for part in ("weight_packed", "weight_scale"):
            old, new = (f"model.layers.1.mlp.experts.{e}.{name}.{part}" for e in (3, 8))
            assert bytes(one.read(whole(one.stored[old]))) == bytes(
                two.read(whole(two.stored[new]))
            )
    assert torch.isfinite(logits(out)).all()
