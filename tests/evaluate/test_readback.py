"""What was rounded is read back before it has a name: every format, in dense and MoE families; a
byte that changes between writing and reading is found, and nothing is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moetool import pipeline, quantize
from moetool.errors import MoetoolError, VerificationFailed
from moetool.methods.options import Common
from moetool.methods.prepared import Options, Prepared
from moetool.pipeline import Caller
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Target
from moetool.surgery.writer import Writer

FAMILIES = {
    "llama": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256},
    "qwen3_moe": {
        "hidden_size": 128,
        "head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
    },
    "mixtral": {"hidden_size": 128, "intermediate_size": 256},
}
LAYERS = {"num_hidden_layers": 2, "num_key_value_heads": 4}  # so that 128 divides every width
# What a form leaves beside codes, and what is held by values alone (no `unpack`).
WEAK = ("ternary", "bitnet")


def fitting(word: str) -> str:
    """The word with the first of its groups that 128 x 256 fits."""
    form, kind = forms.named(forms.formats()[word]), None
    kind = form.formats[word]
    target = Target("x.weight", "BF16", (128, 256))
    for group in kind.groups or (None,):
        params = kind.params if group is None else {**kind.params, "group": group}
        if form.fits(target, params) and (group is None or 128 % (group or 1) == 0):
            return word if group is None else f"{word}/{group or 'channel'}"
    return word


def asked(source: Path, out: Path, **values: Any) -> Options:
    return Options(str(out), (str(source),), "quantize", values, Common(jobs=2))


@pytest.fixture
def source(models: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda family: models(family, dtype="bfloat16", **LAYERS, **FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("word", sorted(forms.formats()))
def test_every_format_is_read_back(
    word: str, family: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each matrix of the source that is a linear stands in the proof, with the error that the
    decoded output has in float64.
    """
    if word.startswith("gguf"):
        pytest.skip("no safetensors")
    report = quantize(str(source(family)), str(tmp_path / "out"), format=fitting(word), force=True)
    proof, whole = report["proof"], json.loads((tmp_path / "out" / "report.json").read_text())
    errors = whole["proof"]["tensors"]
    assert proof["matrices"] == len(errors) == sum(r["matrices"] for r in report["roles"].values())
    assert report["experts_quantized"] == report["experts_total"]
    made, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source(family))
    for name in [proof["worst"]["tensor"], *sorted(errors)[:3]]:
        if name not in before.tensors:
            continue
        theirs = before.matrix(name).double()
        wanted = float((made.matrix(name).double() - theirs).norm() / theirs.norm())
        assert errors[name] == pytest.approx(wanted, rel=2e-3, abs=1e-6)
    assert 0 < proof["relative_error"] <= proof["worst"]["relative_error"] < 1
    assert proof["worst"]["relative_error"] == pytest.approx(max(errors.values()), abs=1e-6)


def test_the_demo_in_fp8(tmp_path: Path) -> None:
    """Rows wide enough that bfloat16, in which fp8 is rounded, puts some on the other side."""
    report = quantize("demo", str(tmp_path / "out"), format="fp8", loader_check=False)
    assert report["proof"]["matrices"] == sum(r["matrices"] for r in report["roles"].values())


def made(options: Options) -> tuple[Prepared, Writer]:
    prepared = pipeline.prepare(options)
    writer = Writer(options.out, prepared.plan, sources=prepared.sources)
    return prepared, writer


def damaged(prepared: Prepared, writer: Writer, part: str, at: float, bit: int) -> None:
    """Flip one bit of a tensor in a staged shard, at a share of its bytes."""
    shard = next(s for s in prepared.plan.shards if part in s.offsets)
    start, stop = shard.offsets[part]
    base = len(prepared.plan.header(shard)) + start
    with (writer.staging / shard.name).open("r+b") as handle:
        handle.seek(base + min(stop - start - 1, int((stop - start) * at)))
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ bit]))


@pytest.mark.parametrize("format", ["int4/32", "int8/channel", "int3/64"])
@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_byte_that_is_another(
    suffix: str, at: float, format: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared, writer = made(asked(source("qwen3_moe"), tmp_path / "out", format=format))
    part = f"model.layers.1.mlp.experts.5.up_proj.{suffix}"
    with pytest.raises(VerificationFailed) as problem, writer:
        pipeline.make(prepared, writer, Caller())
        damaged(prepared, writer, part, at, 0x40)
        pipeline.measure(prepared, writer, Caller())
    assert problem.value.exit_code == 4
    assert "experts.5.up_proj" in problem.value.where["tensor"]
    assert prepared.lock is not None
    prepared.lock.release()
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors"]


@pytest.mark.parametrize("search", ["mse", "none"])
@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("fp8", "weight"),
        ("w8a8", "weight"),
        ("mxfp4", "weight_packed"),
        ("nf4", "weight"),
        ("fp4", "weight"),
        ("bnb-int8", "weight"),
    ],
)
def test_a_bit_of_other_formats(
    format: str, suffix: str, search: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    asked_for = {"format": format, "search": search, "force": True}
    prepared, writer = made(asked(source("llama"), tmp_path / "out", **asked_for))
    part = f"model.layers.1.mlp.up_proj.{suffix}"
    with writer:
        pipeline.make(prepared, writer, Caller())
        found = pipeline.measure(prepared, writer, Caller())
        assert found.proof is not None
        damaged(prepared, writer, part, 0.5, 0x20)
        with pytest.raises(VerificationFailed, match="nearest"):
            pipeline.measure(prepared, writer, Caller())


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"])
def test_what_is_only_moved_is_compared(
    part: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared, writer = made(asked(source("mixtral"), tmp_path / "out", format="int4/32"))
    part = part.replace("mlp.gate", "block_sparse_moe.gate")
    with pytest.raises(VerificationFailed, match="bytes are not what the plan makes"), writer:
        pipeline.make(prepared, writer, Caller())
        damaged(prepared, writer, part, 0.5, 1)
        pipeline.measure(prepared, writer, Caller())
    assert not writer.staging.exists()


def test_a_header_that_is_another(source: Callable[[str], Path], tmp_path: Path) -> None:
    prepared, writer = made(asked(source("llama"), tmp_path / "out", format="int4/32"))
    with pytest.raises(VerificationFailed), writer:
        pipeline.make(prepared, writer, Caller())
        path = writer.staging / prepared.plan.shards[0].name
        data = bytearray(path.read_bytes())
        data[data.index(b"down_proj")] ^= 1
        path.write_bytes(data)
        pipeline.measure(prepared, writer, Caller())
    assert not writer.staging.exists()


def test_decoding_wrongly_is_found(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the disk, but moetool itself: rounding under scales that are not the stored ones."""
    from moetool.kernels import rounding
    from moetool.kernels.rounding import Rounded

    right = rounding.searched

    def wrong(*args: Any) -> Rounded:
        found = right(*args)
        return Rounded(found.codes, found.scales * 1.5)

    monkeypatch.setattr(rounding, "searched", wrong)
    with pytest.raises(VerificationFailed, match="nearest"):
        quantize(str(source("llama")), str(tmp_path / "out"), format="int4/32")
    assert not (tmp_path / "out").exists()


def test_verify_says_it_again(source: Callable[[str], Path], tmp_path: Path) -> None:
    from moetool import verify

    quantize(str(source("mixtral")), str(tmp_path / "out"), format="int4/32")
    said = json.loads((tmp_path / "out" / "report.json").read_text())["proof"]
    found = verify(str(tmp_path / "out"), against=[str(source("mixtral"))])
    assert found["proof"]["worst"] == said["worst"] and found["proof"]["roles"] == said["roles"]
    alone = verify(str(tmp_path / "out"))
    assert alone["forms"] == {"packed_int": said["matrices"]}


def test_memory_of_reading_back_is_promised(source: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(MoetoolError, match="--memory"):
        quantize(str(source("llama")), str(tmp_path / "out"), format="int4/32", memory="100MB")
