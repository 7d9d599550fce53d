"""Tables of whole numbers (neuron orders) as one file: safetensors, int32, each under its name.

As JSON the orders of 48 layers of 128 experts would be ten megabytes. The file's name must not end
in .safetensors where it lies beside weights: servers load everything that does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from moetool.errors import MoetoolError


def pack(tables: Mapping[str, Sequence[int]]) -> bytes:
    """The file's bytes; the same tables give the same."""
    import numpy as np
    from safetensors.numpy import save

    return save({name: np.asarray(tables[name], np.int32) for name in sorted(tables)})


def unpack(path: Path, seal: str) -> dict[str, list[int]]:
    """The tables of a file whose sha256 is `seal`; MoetoolError for another file, or none."""
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
    except OSError as problem:
        raise MoetoolError(
            f"the tables are not readable: {problem.strerror or problem}",
            file=path,
            hint="it belongs to the JSON file that names it: copy both",
        ) from None
    found = sealed(data)
    if found != seal:
        raise MoetoolError(
            "the tables are not those that were written",
            file=path,
            expected=f"sha256 {seal}",
            found=found,
            hint="it belongs to the JSON file that names it: copy both, or make both again",
        )
    return {name: array.tolist() for name, array in sorted(load(data).items())}


def sealed(data: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()
