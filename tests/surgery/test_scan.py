"""NaN and inf are found wherever they lie, and finite numbers, however large, are left alone."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from moetool.surgery import scan
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import Task, whole

PACKED = {"F16": ("<f2", 2), "F32": ("<f4", 4), "F64": ("<f8", 8)}


def packed(values: list[float], dtype: str) -> bytes:
    """Little-endian bytes; bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    with np.errstate(over="ignore"):
        return np.array(values, PACKED[dtype][0]).tobytes()


def largest(dtype: str) -> float:
    if dtype == "BF16":
        return float(np.array([0x7F7F0000], "<u4").view("<f4")[0])
    return float(np.finfo(PACKED[dtype][0]).max)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("place", [0, 5, -1])
def test_one_bad_value(dtype: str, bad: float, place: int) -> None:
    values = [0.0, -0.0, 1.5, -2.5, 1e-30, 3.0, largest(dtype), -largest(dtype)]
    assert not scan.bad_block(memoryview(packed(values, dtype)), dtype)
    values[place] = bad
    assert scan.bad_block(memoryview(packed(values, dtype)), dtype)


def test_negative_nan_too() -> None:
    """The sign bit moves the pattern beyond the signed maximum."""
    for bits in (0xFFC00000, 0x7FC00000, 0xFF800001, 0x7F800001):
        assert scan.bad_block(memoryview(struct.pack("<I", bits)), "F32")
    assert not scan.bad_block(memoryview(struct.pack("<I", 0xFF7FFFFF)), "F32")


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "I8"])
def test_dtypes_that_are_not_looked_at(dtype: str) -> None:
    assert not scan.bad_block(memoryview(b"\xff" * 64), dtype)
    assert scan.bad_ranges("/nowhere", 0, 64, dtype) == []


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [("F8_E4M3", (0x7F, 0xFF)), ("F8_E5M2", (0x7C, 0x7D, 0x7F, 0xFC, 0xFF))],
)
def test_eight_bits(dtype: str, bad: tuple[int, ...]) -> None:
    """E4M3 has NaN alone, E5M2 inf too; every other byte is a number."""
    import torch

    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    for byte in range(256):
        value = torch.tensor([byte], dtype=torch.uint8).view(kind).float()
        found = scan.bad_block(memoryview(bytes([0, byte, 1])), dtype)
        assert found == (not bool(torch.isfinite(value).all()))
    assert all(scan.bad_block(memoryview(bytes([b])), dtype) for b in bad)


def test_a_cut_value_at_the_end_is_not_read() -> None:
    data = packed([1.0], "F32") + packed([float("nan")], "F32")[:3]
    assert not scan.bad_block(memoryview(data), "F32") and not scan.bad_block(
        memoryview(b""), "F32"
    )


def lay(folder: Path, tensors: dict[str, tuple[str, list[float]]]) -> Checkpoint:
    """A checkpoint with flat tensors of these values, by hand, in the given order."""
    import json

    folder.mkdir()
    table, data = {}, b""
    for name, (dtype, values) in tensors.items():
        raw = packed(values, dtype)
        table[name] = {
            "dtype": dtype,
            "shape": [len(values)],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint.open(folder)


FINE, NAN = [1.0] * 300, [1.0] * 299 + [float("nan")]


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return lay(
        tmp_path / "model",
        {"a": ("F32", FINE), "b": ("F32", NAN), "c": ("BF16", FINE), "d": ("BF16", NAN)},
    )


def reading(source: Checkpoint, *names: str) -> list[Task]:
    return [Task("copy", (whole(source.tensors[n]),), ()) for n in names]


def test_suspects_name_the_tensors(source: Checkpoint) -> None:
    tasks = reading(source, "a", "b", "c", "d")
    told: list[tuple[str, int, int]] = []
    found = scan.suspects([source], tasks, workers=2, tell=lambda *a: told.append(a))
    bad = scan.named([source], tasks, found)
    assert [(b.name, b.what) for b in bad] == [("b", "NaN or inf"), ("d", "NaN or inf")]
    assert all(b.file.endswith("model.safetensors") for b in bad)
    assert told[-1][1] == told[-1][2] == 300 * 2 * (4 + 2)


def test_only_what_a_plan_reads_is_looked_at(source: Checkpoint) -> None:
    tasks = reading(source, "a", "c")
    assert scan.suspects([source], tasks) == set()
    # A range that another tensor made suspect does not blame its neighbours.
    everything = scan.suspects([source], reading(source, "a", "b"))
    assert everything and scan.named([source], tasks, everything) == []


def test_a_stopped_scan_ends(source: Checkpoint) -> None:
    stop = threading.Event()
    stop.set()
    assert scan.suspects([source], reading(source, "b"), stop=stop) == set()


def test_a_bad_value_behind_the_first_block(tmp_path: Path) -> None:
    """Files are read in blocks of half a megabyte."""
    values = [0.5] * 200_000
    values[-1] = float("inf")
    source = lay(tmp_path / "model", {"long": ("F32", values)})
    tensor = source.tensors["long"]
    path = f"{source.folder}/{tensor.file}"
    assert scan.bad_ranges(path, tensor.start, tensor.stop, "F32")
    assert scan.bad_ranges(path, tensor.start, tensor.stop - 4, "F32") == []
