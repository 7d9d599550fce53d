"""Pieces, targets and tasks are values: they count right, and survive JSON and pickle."""

from __future__ import annotations

import itertools
import json
import pickle
from math import prod

import pytest

from moetool.errors import MoetoolError
from moetool.surgery.spec import DTYPE_BITS, Piece, Stored, Target, Task, rows, size_of, whole

SHAPES = [(), (0,), (8,), (4, 6), (2, 3, 8)]


@pytest.mark.parametrize("dtype", DTYPE_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_of_a_tensor(dtype: str, shape: tuple[int, ...]) -> None:
    assert size_of(dtype, shape) == prod(shape) * DTYPE_BITS[dtype] // 8
    assert Target("t", dtype, shape).size == size_of(dtype, shape)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "I64", "U8", "I8", "F8_E4M3"])
def test_bits_are_those_of_numpy_or_torch(dtype: str) -> None:
    from moetool.kernels.codec import torch_dtype

    assert DTYPE_BITS[dtype] == torch_dtype(dtype).itemsize * 8


def test_an_unknown_dtype_is_a_sentence() -> None:
    with pytest.raises(MoetoolError, match="unknown dtype 'F7'") as refused:
        size_of("F7", (1,))
    assert "BF16" in refused.value.where["expected"] and refused.value.hint


@pytest.mark.parametrize("kind", [Stored, Target])
def test_rows_and_whole(kind: type) -> None:
    more = ("f", 0, 96) if kind is Stored else ()
    tensor = kind("t", "F32", (6, 2, 2), *more)
    assert whole(tensor, 3) == Piece("t", (6, 2, 2), 0, 3)
    assert rows(tensor, 2, 5, 1) == Piece("t", (3, 2, 2), 8, 1)
    assert rows(tensor, 0, 6) == whole(tensor)
    assert rows(tensor, 4, 4).count == 0


def test_rows_of_rows_count_from_the_tensor() -> None:
    tensor = Target("t", "U8", (10, 3))
    inner = rows(rows(tensor, 4, 9), 1, 3)
    assert inner == rows(tensor, 5, 7) and inner.offset == 15 and inner.count == 6


def test_neighbouring_rows_fill_a_tensor() -> None:
    tensor = Target("t", "BF16", (7, 5))
    cuts = [0, 2, 3, 7]
    pieces = [rows(tensor, a, b) for a, b in itertools.pairwise(cuts)]
    ends = [0, *(p.offset + p.count for p in pieces)]
    assert [p.offset for p in pieces] == ends[:-1] and ends[-1] == whole(tensor).count


TASKS = [
    Task("zeros", (), (Piece("a", (2,)),)),
    Task("copy", (Piece("in", (2, 3), 6, 1),), (Piece("out", (2, 3)),)),
    Task("mix", (Piece("x", ()),), (Piece("y", (0, 4)), Piece("z", (1,))), {"scale": 2.5, "s": []}),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.op)
def test_there_and_back(task: Task) -> None:
    assert Task.from_json(json.loads(json.dumps(task.as_json()))) == task
    assert pickle.loads(pickle.dumps(task)) == task
