"""Everything a hostile checkpoint, file or option can say, said: a sentence and the right exit code,
within ten seconds; no traceback, no "bug in moetool", no lie with exit code 0.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moetool.cli import main

SECONDS = 60  # of a machine that others use too


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
    path.write_text("".join(json.dumps({"input_ids": list(range(64))}) + "\n" for _ in "abc"))
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


TOO_MANY = {
    "layers": ["--layers", "0-99999999999"],
    "a layer": ["--layers", "9" * 4000],
    "a layer of many digits": ["--layers", "9" * 5000],
    "first and last": ["--layers", "99999999990-99999999999"],
    "every": ["--layers", "every:1+99999999999"],
    "experts": ["--experts", "1000000000", "--top-k", "1"],
    "parts": ["--experts", "99999999999", "--split", "99999999999", "--top-k", "2"],
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_options_are_not_gone_through_without_end(name: str, dense: Path, tmp_path: Path) -> None:
    refused(2, "upcycle", dense, tmp_path / "out", *TOO_MANY[name])


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
@pytest.mark.parametrize(
    "name",
    [
        *("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"),
        *("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"),
        "model.layers.1.mlp.experts.2.up_proj.weight",
    ],
)
def test_a_model_that_answers_nan_is_named(
    name: str, command: str, moe: Path, text: Path, tmp_path: Path
) -> None:
    for stored in sorted(moe.glob("*.safetensors")):
        spoil(stored, name, float("nan"))
    words = ["eval", moe, "--text", text] if command == "eval" else []
    words = words or ["prune", moe, tmp_path / "out", "--calibrate", text, "--max-kl", "9"]
    said = run(*words)
    assert said.code in (1, 4) and "NaN" in said.err and "report it" not in said.err
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


def test_strict_is_looked_at_before_text_is_sent(moe: Path, text: Path, tmp_path: Path) -> None:
    for stored in sorted(moe.glob("*.safetensors")):
        spoil(stored, "model.layers.2.mlp.experts.1.down_proj.weight", float("inf"))
    said = refused(1, "prune", moe, tmp_path / "out", "--calibrate", text, "--strict")
    assert "experts.1.down_proj" in said and "not finite" in said
    assert not list(tmp_path.glob(".out.moetool*"))


def pipe(path: Path) -> Path:
    """A named pipe that nobody writes to, in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("verb", ["inspect", "upcycle"])
def test_pipes_in_a_source(verb: str, name: str, dense: Path, tmp_path: Path) -> None:
    pipe(dense / name)
    out = [tmp_path / "out"] if verb == "upcycle" else []
    assert "named pipe" in refused(1, verb, dense, *out)


def test_a_pipe_as_index(dense: Path) -> None:
    pipe(dense / "model.safetensors.index.json")
    assert "named pipe" in refused(1, "inspect", dense)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/random"])
def test_what_is_no_file_is_not_waited_for(kind: str, moe: Path, tmp_path: Path) -> None:
    path = pipe(tmp_path / "x.txt") if kind == "pipe" else Path(kind)
    out = tmp_path / "out"
    random = ["prune", moe, out, "--method", "random", "--dry-run"]
    assert "no regular file" in refused(1, "eval", moe, "--text", path)
    assert "no regular file" in refused(1, "prune", moe, out, "--calibrate", path)
    assert "no regular file" in refused(1, "run", path)
    assert refused(2, *random, "--decisions", path) if kind == "pipe" else True
    refused(1, "inspect", path)


def test_pipes_among_our_own_files(dense: Path, moe: Path, text: Path, tmp_path: Path) -> None:
    assert run("upcycle", dense, tmp_path / "out").code == 0
    pipe(tmp_path / "out" / "moetool.json")
    refused(1, "verify", tmp_path / "out")
    assert run("profile", moe, tmp_path / "stats", "--calibrate", text).code == 0
    pipe(tmp_path / "stats" / "layer-00001.safetensors")
    words = ["prune", moe, tmp_path / "pruned", "--stats", tmp_path / "stats"]
    assert "named pipe" in refused(1, *words)
    pipe(tmp_path / "stats" / "profile.json")
    refused(1, *words)


RECORD = [
    *("method", "options", "seed", "max_shard", "sources", "tables", "config_sha256", "report"),
    *("report.plan_digest", "report.tensors", "report.certificate", "report.certificate.level"),
    "report.parameters",
]


@pytest.mark.parametrize("field", RECORD)
def test_hostile_records(field: str, dense: Path, tmp_path: Path) -> None:
    assert run("upcycle", dense, tmp_path / "out").code == 0
    path = tmp_path / "out" / "moetool.json"
    plain = path.read_text()
    for value in ["gone", None, "x", [], {}, [1], {"a": []}, -1, 10**30, True]:
        data = json.loads(plain)
        *above, last = field.split(".")
        part = data
        for name in above:
            part = part[name]
        part[last] = value
        if value == "gone":
            del part[last]
        path.write_text(json.dumps(data))
        said = run("verify", tmp_path / "out", "--against", dense, "--no-load")
        assert said.code in (0, 1, 2, 4)
        if said.code == 0:
            assert value in ({}, [], -1, 10**30) and field not in ("report", "report.plan_digest")


def test_more_sources_than_there_were(dense: Path, tmp_path: Path) -> None:
    assert run("upcycle", dense, tmp_path / "out").code == 0
    refused(2, "verify", tmp_path / "out", "--against", dense, "--against", dense)


FACTS = ["model", "layers", "files", "tokens", "seq_len", "data_sha256", "warnings", "schema"]


@pytest.mark.parametrize("field", FACTS)
def test_hostile_profiles(field: str, moe: Path, text: Path, tmp_path: Path) -> None:
    assert run("profile", moe, tmp_path / "stats", "--calibrate", text).code == 0
    path = tmp_path / "stats" / "profile.json"
    plain = json.loads(path.read_text())
    for value in [None, "x", [], {}, 1.5, True]:
        path.write_text(json.dumps(plain | {field: value}))
        run("prune", moe, tmp_path / "out", "--stats", tmp_path / "stats", "--dry-run")
        run("profile", moe, tmp_path / "stats", "--calibrate", text)


ROWS = {
    "half a pair": {"text": "\ud800 x"},
    "half a pair in a chat": {"messages": [{"role": "user", "content": "\udfff"}]},
    "huge id": {"input_ids": [2**70]},
    "large id": {"input_ids": [2**31]},
    "true as an id": {"input_ids": [True, True]},
    "no text": {"text": 5},
    "nested": {"text": [[["x"]]]},
    "chat without words": {"messages": [{"role": "user"}]},
}


@pytest.mark.parametrize("name", ROWS)
def test_hostile_text(name: str, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    assert "t.jsonl:1" in refused(1, "eval", moe, "--text", tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"input_ids": [' + "9" * 5000 + "]}")
    assert "t.jsonl:1" in refused(1, "eval", moe, "--text", tmp_path / "t.jsonl")


RECIPES = {
    "a name twice": "method: upcycle\nmethod: upcycle\n",
    "an option twice": "method: upcycle\noptions:\n  experts: 4\n  experts: 8\n",
    "numbers as names": "1: 2\n",
    "null as a name": "null: 2\n",
    "list": "- a\n",
    "itself": "&a {options: *a}",
    "options a list": "method: upcycle\nsource: demo\nout: x\noptions: [1]\n",
    "options a text": "method: upcycle\nsource: demo\nout: x\noptions: word\n",
    "numbers in options": "method: upcycle\nsource: demo\nout: x\noptions: {1: 2}\n",
    "method a list": "method: [upcycle]\nsource: demo\nout: x\n",
    "method a mapping": "method: {a: 1}\nsource: demo\nout: x\n",
    "seed a text": "method: upcycle\nsource: demo\nout: x\nseed: word\n",
    "seed true": "method: upcycle\nsource: demo\nout: x\nseed: true\n",
    "infinite": "method: upcycle\nsource: demo\nout: x\noptions: {scale: .inf}\n",
    "no number": "method: prune\nsource: demo\nout: x\noptions: {max-kl: .nan}\n",
    "from a text": "method: upcycle\nsource: demo\nout: x\nfrom: word\n",
    "from numbers": "method: upcycle\nsource: demo\nout: x\nfrom: [1]\n",
    "Latin-1": "method: caf\xe9",
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(RECIPES[name].encode("latin-1"))
    refused(2, "run", "r.yaml")
    refused(2, "run", "r.yaml", "--set", "options.layers=[")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]


def mutations(tensor: Any) -> dict[str, Any]:
    """A tensor as a broken tool may have left it."""
    import torch

    return {
        "cut": tensor[:-1].contiguous(),
        "empty": tensor[:0].contiguous(),
        "a number": tensor.reshape(-1)[0].clone(),
        "flat": tensor.reshape(-1).contiguous(),
        "deeper": tensor[None].contiguous(),
        "whole numbers": tensor.to(torch.int64),
        "complex": tensor.to(torch.complex64),
        "gone": None,
    }


@pytest.mark.parametrize("name", ["mlp.experts.1.down_proj", "mlp.gate", "self_attn.q_proj"])
def test_hostile_tensors_are_looked_at(name: str, moe: Path) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = moe.glob("*.safetensors")
    plain, full = load_file(path), f"model.layers.1.{name}.weight"
    for made in mutations(plain[full]).values():
        rest = {n: t for n, t in plain.items() if n != full}
        save_file(rest if made is None else rest | {full: made}, path)
        assert run("inspect", moe).code == 0
