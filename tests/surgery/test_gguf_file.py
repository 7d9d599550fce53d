"""GGUF files byte for byte against the `gguf` package: what we write it writes, what it reads we
read, and what no reader should believe is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moetool import atomic
from moetool.errors import MoetoolError
from moetool.surgery import engine
from moetool.surgery.containers import Whole, wire
from moetool.surgery.containers import gguf as ours
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Target, Task, whole

FIELDS = [
    ["general.architecture", "str", "qwen3moe"],
    ["a.u8", "u8", 3],
    ["a.i16", "i16", -3],
    ["a.u32", "u32", 4_000_000_000],
    ["a.i64", "i64", -(2**40)],
    ["a.f32", "f32", 0.1],
    ["a.f64", "f64", 0.1],
    ["a.bool", "bool", True],
    ["a.text", "str", "Grüße \U0001f999"],
    ["a.words", "[str]", ["", "Ġa", "b b"]],
    ["a.numbers", "[i32]", [1, -2, 3]],
    ["a.floats", "[f32]", [0.5, -1e30]],
]
TENSORS = {
    "token_embd.weight": (Target("token_embd.weight", "U8", (5, 2 * 34)), "q8_0"),
    "blk.0.ffn_up_exps.weight": (Target("blk.0.ffn_up_exps.weight", "U8", (3, 7, 18)), "q4_0"),
    "odd.bias": (Target("odd.bias", "F32", (3,)), None),
    "blk.0.attn_q.weight": (Target("blk.0.attn_q.weight", "F16", (4, 6)), None),
    "blk.0.attn_k.weight": (Target("blk.0.attn_k.weight", "BF16", (4, 6)), None),
}


def plan(max_shard: int = 10**9) -> Plan:
    """Tensors of zeros: only the header says anything."""
    types = {n: k for n, (_, k) in TENSORS.items() if k}
    container = {"name": "gguf", "types": types, "fields": FIELDS}
    targets = [t for t, _ in TENSORS.values()]
    tasks = [Task("zeros", (), (whole(t),)) for t in targets]
    config: dict[str, Any] = {"model_type": "qwen3_moe"}
    return Plan.build(
        [], Outputs(config, targets, tasks, {}, container), max_shard=max_shard, tables={}
    )


def written(made: Plan, folder: Path) -> list[Path]:
    """The plan's files."""
    for job in engine.jobs_of(made, [], made.shards, str(folder)):
        engine.make_shard(job)
        atomic.publish(Path(job.path))
    return sorted(folder.iterdir())


def test_the_whole_file_is_what_gguf_writes(tmp_path: Path) -> None:
    made = plan()
    (tmp_path / "mine").mkdir()
    written(made, tmp_path / "mine")
    (mine,) = (tmp_path / "mine").iterdir()
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen3moe")
    kinds = gguf.GGUFValueType
    names = {"u": "UINT", "i": "INT", "f": "FLOAT"}
    for key, kind, value in [*FIELDS[1:], [ours.DIGEST, "str", made.digest]]:
        inner = kind.strip("[]")
        word = {"str": "STRING", "bool": "BOOL"}.get(inner) or names[inner[0]] + inner[1:]
        if inner == kind:
            writer.add_key_value(key, value, kinds[word])
        else:
            writer.add_key_value(key, value, kinds.ARRAY, kinds[word])
    for name, (target, kind) in TENSORS.items():
        dtype = {"F32": np.float32, "F16": np.float16}.get(target.dtype, np.uint8)
        shape = (4, 12) if target.dtype == "BF16" else target.shape
        raw = None if dtype != np.uint8 else gguf.GGMLQuantizationType[(kind or "bf16").upper()]
        writer.add_tensor(name, np.zeros(shape, dtype), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert mine.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = plan()
    (path,) = written(made, tmp_path)
    head = ours.read_head(path)
    assert [list(f) for f in head.fields.values()][:-1] == [
        [k, kind, pytest.approx(v) if kind in ("f32", "[f32]") else v] for k, kind, v in FIELDS
    ]
    assert head.value(ours.DIGEST) == made.digest and head.value("nothing") is None
    assert {t.name: (t.dtype, t.shape) for t in head.tensors} == {
        n: (t.dtype, t.shape) for n, (t, _) in TENSORS.items()
    }
    assert head.types == {n: k for n, (_, k) in TENSORS.items() if k}
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for tensor in head.tensors:
        assert theirs[tensor.name].data_offset == tensor.start
        assert theirs[tensor.name].n_bytes == tensor.stop - tensor.start


def test_several_files_say_which_they_are(tmp_path: Path) -> None:
    made = plan(max_shard=250)
    paths = written(made, tmp_path)
    assert [p.name for p in paths] == [
        f"model-{i}-of-00003.gguf" for i in ("00001", "00002", "00003")
    ]
    for number, path in enumerate(paths):
        head = ours.read_head(path)
        assert [head.value(f"split.{w}") for w in ("no", "count", "tensors.count")] == [
            number,
            3,
            len(TENSORS),
        ]
        assert (head.value("a.u32") is None) == (number > 0)
        assert head.value(ours.DIGEST) == made.digest
    found = [t.name for p in paths for t in ours.read_head(p).tensors]
    assert found == list(TENSORS)


def _cut(data: bytes) -> bytes:
    return data[:60]


def _other_magic(data: bytes) -> bytes:
    return b"GGML" + data[4:]


def _too_many(data: bytes) -> bytes:
    return data[:8] + struct.pack("<Q", 2**60) + data[16:]


def _version(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 9) + data[8:]


def _short(data: bytes) -> bytes:
    return data[:-200]


def _kind(data: bytes) -> bytes:
    at = data.index(b"odd.bias") + 8 + 4 + 8
    return data[:at] + struct.pack("<I", 77) + data[at + 4 :]


def _over(data: bytes) -> bytes:
    at = data.index(b"odd.bias") + 8 + 4 + 8 + 4
    return data[:at] + struct.pack("<Q", 0) + data[at + 8 :]


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_cut, "ends inside its header"),
        (_other_magic, "does not begin with GGUF"),
        (_too_many, "more entries than it has bytes"),
        (_version, "version 9"),
        (_short, "behind the end"),
        (_kind, "ggml's kind 77"),
        (_over, "lies over another tensor"),
    ],
)
def test_what_no_reader_should_believe(
    tmp_path: Path, harm: Callable[[bytes], bytes], why: str
) -> None:
    (path,) = written(plan(), tmp_path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(MoetoolError, match=why):
        ours.read_head(path)


def test_every_kind_has_the_numbers_of_ggml() -> None:
    for name, kind in ours.KINDS.items():
        theirs = gguf.GGMLQuantizationType[name.upper()]
        assert (kind.number, kind.size, kind.held) == (theirs, *gguf.GGML_QUANT_SIZES[theirs])
    file_types = {n.upper(): v for n, v in ours.FILE_TYPES.items()}
    for name, number in file_types.items():
        theirs = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert gguf.LlamaFileType[theirs + "_MOE" * (name == "MXFP4")] == number
    assert [gguf.GGUFValueType(i).name for i in range(len(wire.KINDS))][9] == "ARRAY"


def test_a_header_is_the_same_however_often_it_is_asked_for() -> None:
    made = plan()
    (shard,) = made.shards
    whole_ = Whole(made.digest, made.targets, made.shards, made.container)
    assert ours.GgufFile().header(shard, whole_) == made.header(shard) == made.header(shard)
    assert Plan.from_json(made.as_json()).header(shard) == made.header(shard)
