"""Everything a hostile checkpoint, file or option can say, said: a sentence and the right exit code,
within ten seconds; no traceback, no "bug in moetool", no lie with exit code 0.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moetool.cli import main

SECONDS = 10


@dataclass(frozen=True)
class Said:
    """What one command did."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """A hang is a failure, not a long test."""

    def late(*_: object) -> None:
        raise AssertionError(f"still not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*args: object) -> Said:
    """`moetool ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in args])
    said = Said(code, out.getvalue(), err.getvalue())
    assert "a bug in moetool" not in said.err and "Traceback" not in said.err, said.err
    assert code == 0 or "next:" in said.err, said
    return said


def refused(code: int, *args: object) -> str:
    """The sentence of a command that must not succeed."""
    said = run(*args)
    assert said.code == code, said
    return said.err


@pytest.fixture
def dense(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama to be spoiled."""
    shutil.copytree(models("llama"), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def moe(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny Qwen3-MoE to be spoiled."""
    shutil.copytree(models("qwen3_moe"), tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Token ids, so that no tokenizer is needed."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"input_ids": list(range(20, 84))}) + "\n" for _ in "abc"))
    return path


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NUMBERS = {
    "scale nan": ["upcycle", "--scale", "nan"],
    "scale inf": ["upcycle", "--scale", "inf"],
    "scale -inf": ["upcycle", "--scale=-inf"],
    "scale 1e400": ["upcycle", "--scale", "1e400"],
    "scale 1e39": ["upcycle", "--scale", "1e39"],
    "router 1e400": ["upcycle", "--router", "normal:1e400"],
    "router 1e39": ["upcycle", "--router", "normal:1e39"],
    "router digits": ["upcycle", "--router", "normal:" + "9" * 400],
    "noise digits": ["upcycle", "--diversify", "noise:" + "9" * 400],
    "noise 1e39": ["upcycle", "--diversify", "noise:1" + "0" * 39],
    "drop nan": ["upcycle", "--diversify", "drop:nan"],
    "shard digits": ["upcycle", "--max-shard-size", "9" * 400],
    "memory digits": ["upcycle", "--memory", "9" * 400 + "GB"],
    "memory nan": ["upcycle", "--memory", "nan"],
    "max-kl nan": ["prune", "--max-kl", "nan"],
    "max-kl inf": ["prune", "--max-kl", "inf"],
    "max-kl 1e400": ["prune", "--max-kl", "1e400"],
    "increase nan": ["prune", "--max-perplexity-increase", "nan"],
    "increase digits": ["prune", "--max-perplexity-increase", "9" * 400 + "%"],
    "ratio nan": ["prune", "--ratio", "nan"],
    "ratio inf": ["prune", "--ratio", "inf"],
    "merge ratio nan": ["merge", "--ratio", "nan"],
    "merge density nan": ["merge", "--density", "nan"],
    "merge rank-energy nan": ["merge", "--rank-energy", "nan"],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name: str, dense: Path, moe: Path, text: Path, tmp_path: Path) -> None:
    verb, *options = NUMBERS[name]
    source = [dense] if verb == "upcycle" else [moe]
    given = [] if verb == "upcycle" else ["--calibrate", text]
    refused(2, verb, *source, tmp_path / "out", *given, *options)
    assert not (tmp_path / "out").exists()


def spoil(path: Path, name: str, value: float) -> None:
    """One number of a tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name].view(-1)[7] = value
    save_file(tensors, path, {"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_says_nan(value: float, dense: Path, tmp_path: Path) -> None:
    spoil(dense / "model.safetensors", DOWN, value)
    assert run("upcycle", dense, tmp_path / "out").code == 0  # and a warning
    said = refused(4, "verify", tmp_path / "out", "--against", dense)
    assert "NaN" in said


@pytest.mark.parametrize("command", ["eval", "prune"])
def test_a_model_that_answers_nan_is_named(
    command: str, moe: Path, text: Path, tmp_path: Path
) -> None:
    for stored in sorted(moe.glob("*.safetensors")):
        spoil(stored, "model.norm.weight", float("nan"))
    words = ["eval", moe, "--text", text] if command == "eval" else []
    words = words or ["prune", moe, tmp_path / "out", "--calibrate", text, "--max-kl", "9"]
    said = run(*words)
    assert said.code in (1, 4) and "NaN" in said.err
    assert not (tmp_path / "out").exists()


HOSTILE: list[Any] = [-5, -1, 0, 1, 10**7, 10**9, 2**63, 10**30, 1.5, 1e400, "4", "", True, None]
HOSTILE += [[], [1], [0, "x"], [None], [[1]], {}, {"a": 1}, "\u00e9" * 300]
FIELDS = {
    "dense": [
        *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "hidden_act"),
        *("max_position_embeddings", "rope_parameters", "tie_word_embeddings", "rms_norm_eps"),
        *("text_config", "vision_config", "quantization_config", "per_layer_config", "dtype"),
        *("attention_bias", "mlp_bias", "auto_map", "_name_or_path", "pad_token_id"),
    ],
    "moe": [
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("decoder_sparse_step", "mlp_only_layers", "num_hidden_layers", "per_layer_config"),
        *("quantization_config", "text_config", "hidden_size", "num_local_experts"),
    ],
}


@pytest.mark.parametrize("field", FIELDS["dense"])
def test_hostile_configs_of_a_dense_model(field: str, dense: Path, tmp_path: Path) -> None:
    plain = json.loads((dense / "config.json").read_text())
    for number, value in enumerate(HOSTILE):
        (dense / "config.json").write_text(json.dumps(plain | {field: value}))
        run("inspect", dense)
        run("upcycle", dense, tmp_path / f"out{number}", "--dry-run")


@pytest.mark.parametrize("field", FIELDS["moe"])
def test_hostile_configs_of_a_moe(field: str, moe: Path, tmp_path: Path) -> None:
    plain = json.loads((moe / "config.json").read_text())
    for number, value in enumerate(HOSTILE):
        (moe / "config.json").write_text(json.dumps(plain | {field: value}))
        run("inspect", moe)
        run("convert-layout", moe, tmp_path / f"a{number}", "--to", "fused", "--dry-run")
        run("prune", moe, tmp_path / f"b{number}", "--method", "random", "--dry-run")


@pytest.mark.parametrize("field", ["max_position_embeddings", "rope_parameters", "num_experts"])
def test_hostile_configs_with_text(field: str, moe: Path, text: Path) -> None:
    plain = json.loads((moe / "config.json").read_text())
    for value in HOSTILE:
        (moe / "config.json").write_text(json.dumps(plain | {field: value}))
        run("eval", moe, "--text", text)


TOO_MUCH = {
    "layers": {"num_hidden_layers": 10_000_000},
    "experts": {"num_local_experts": 10**9},
    "both": {"num_hidden_layers": 4000, "num_local_experts": 30_000},
    "positions": {"max_position_embeddings": -5},
    "moe layers": {"mlp_only_layers": 7},
    "deep": {"a": json.loads('{"b":' * 200 + "1" + "}" * 200)},
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_configs_out_of_all_bounds_are_refused(name: str, moe: Path) -> None:
    change(moe / "config.json", **TOO_MUCH[name])
    assert "config.json" in refused(1, "inspect", moe)
