"""Small checkpoints and plans laid by hand, so that a test knows every byte of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Target, Task


def lay(folder: Path, arrays: dict[str, np.ndarray], file: str = "model.safetensors") -> Checkpoint:
    """A checkpoint whose one file holds float32 arrays in the given order."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data = {}, b""
    for name, array in arrays.items():
        raw = array.astype("<f4").tobytes()
        table[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(table).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(head)) + head + data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint.open(folder)


def numbered(*shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays t0, t1, ... whose values are all different."""
    made, first = {}, 0
    for number, shape in enumerate(shapes):
        count = int(np.prod(shape))
        made[f"t{number}"] = np.arange(first, first + count, dtype=np.float32).reshape(shape)
        first += count
    return made


def planned(
    source: Checkpoint, targets: list[Target], tasks: list[Task], *, max_shard: int = 10**9
) -> Plan:
    """A plan that reads one source."""
    wanted = Outputs({"model_type": "llama"}, targets, tasks, {})
    return Plan.build([source.fingerprint()], wanted, max_shard=max_shard)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads in a file."""
    from safetensors.numpy import load_file

    return dict(load_file(path))
