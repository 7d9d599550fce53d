"""Between the bytes of safetensors and tensors. bfloat16 rounds to nearest even, as torch does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

from moetool.errors import MoetoolError

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; MoetoolError when moetool computes with none."""
    import torch

    if name not in _TORCH:
        raise _unknown(name, _TORCH)
    found: torch.dtype = getattr(torch, _TORCH[name])
    return found


def _unknown(name: str, known: Iterable[str]) -> MoetoolError:
    return MoetoolError(
        f"a tensor's dtype is none to compute with: {name}",
        expected=", ".join(known),
        found=name,
        hint="save the checkpoint with float weights",
    )


def decode(
    data: bytearray, dtype: str, shape: tuple[int, ...], device: str = "cpu"
) -> torch.Tensor:
    """Bytes -> torch tensor [*shape], sharing memory on the CPU."""
    import torch

    if not data:
        return torch.empty(shape, dtype=torch_dtype(dtype), device=device)
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(shape).to(device)


def meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor without memory, for rehearsals."""
    import torch

    return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")


def encode(value: torch.Tensor | np.ndarray, dtype: str) -> memoryview:
    """torch tensor or float32 numpy array -> bytes in a safetensors dtype."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(_numpy_bytes(value, dtype)).data.cast("B")
    import torch

    flat = value.to(torch_dtype(dtype)).contiguous().cpu()
    return flat.reshape(-1).view(torch.uint8).numpy().data


def _numpy_bytes(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        bits = value.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return value.astype({"F32": np.float32, "F64": np.float64, "F16": np.float16}[dtype])


def as_float64(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """Bytes of a floating dtype -> float64 array, without torch (F64, F32, BF16, F16)."""
    if dtype == "BF16":
        return (
            (np.frombuffer(data, np.uint16).astype(np.uint32) << 16)
            .view(np.float32)
            .astype(np.float64)
        )
    plain = {"F32": np.float32, "F64": np.float64, "F16": np.float16}
    if dtype not in plain:
        raise _unknown(dtype, ["BF16", *plain])
    return np.frombuffer(data, plain[dtype]).astype(np.float64)
