"""Quantized checkpoints as their makers ship them, written byte by byte without moetool, and the
float32 twin that says what each must be read as.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
Arrays = dict[str, np.ndarray]


def e4m3() -> np.ndarray:
    """The value of every byte, from the definition (OCP 8-bit floating point, table 1)."""
    made = np.empty(256, np.float32)
    for byte in range(256):
        exponent, fraction = byte >> 3 & 15, byte & 7
        size = (
            fraction / 8 * 2.0**-6 if not exponent else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        )
        made[byte] = np.nan if byte & 127 == 127 else -size if byte & 128 else size
    return made


def fp8(matrix: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, scales, what they say) of a matrix [rows, columns]."""
    table, (rows, columns) = e4m3(), matrix.shape
    scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    codes, says = np.empty(matrix.shape, np.uint8), np.empty(matrix.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = scale = np.float32(np.abs(matrix[at]).max() / 448 or 1.0)
            near = np.abs(np.abs(matrix[at] / scale)[..., None] - table[:127]).argmin(-1)
            codes[at] = near | np.where(matrix[at] < 0, 128, 0)
            says[at] = table[codes[at]] * scale
    return codes, scales, says


def mxfp4(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(blocks, scales, what they say) of a stack [experts, in, out]."""
    experts, columns, rows = stack.shape
    groups = stack.transpose(0, 2, 1).reshape(experts, rows, columns // 32, 32)
    most = np.abs(groups).max(-1)
    exponents = np.floor(np.log2(np.where(most > 0, most, 1.0))).astype(int) - 2
    scale = np.exp2(exponents).astype(np.float32)[..., None]
    codes = np.abs(np.abs(groups / scale)[..., None] - FP4).argmin(-1)
    says = np.where(groups < 0, -1, 1) * FP4[codes] * scale
    codes |= np.where(groups < 0, 8, 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    says = says.reshape(experts, rows, columns).transpose(0, 2, 1).astype(np.float32)
    return blocks, (exponents + 127).astype(np.uint8), says


def linear(name: str) -> bool:
    """Whether fp8 checkpoints quantize this tensor: every linear but router and head."""
    kept = ("lm_head.weight", "embed_tokens.weight", ".gate.weight", "norm.weight")
    return name.endswith(".weight") and not name.endswith((*kept, "shared_expert_gate.weight"))


def save_fp8(source: Path, folder: Path, block: tuple[int, int] = (32, 32), **said: Any) -> Path:
    """A float32 checkpoint in DeepSeek-V3's fp8; its twin lies beside it (`twin`)."""
    made, twin = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        made[name] = twin[name] = tensor
        if linear(name) and tensor.ndim == 2:
            codes, scales, twin[name] = fp8(tensor, block)
            made[name], made[name + "_scale_inv"] = codes, scales
    quantized = {n for n in made if n + "_scale_inv" in made}
    told = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
        **said,
    }
    return _write(source, folder, made, twin, told, dict.fromkeys(quantized, "F8_E4M3"))


def save_mxfp4(source: Path, folder: Path) -> Path:
    """A float32 gpt-oss with its experts in mxfp4; its twin lies beside it (`twin`)."""
    made, twin = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            made[name + "_blocks"], made[name + "_scales"], twin[name] = mxfp4(tensor)
        else:
            made[name] = twin[name] = tensor
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    told = {"quant_method": "mxfp4", "modules_to_not_convert": [*skipped, "lm_head"]}
    return _write(source, folder, made, twin, told, {})


def twin(folder: Path) -> Path:
    """The same model in float32."""
    return folder.with_name(folder.name + "-twin")


def values(folder: Path) -> Arrays:
    """Every tensor of a checkpoint by name, fp8 as bytes."""
    found: Arrays = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= {n: read(path, n) for n in header(path)}
    return found


def header(path: Path) -> dict[str, Any]:
    """The tensors that a file's header names."""
    with path.open("rb") as handle:
        table = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    table.pop("__metadata__", None)
    return dict(table)


def read(path: Path, name: str) -> np.ndarray:
    """One tensor: numpy's dtypes as they are, bfloat16 as float32, all others as bytes."""
    with path.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        entry = header(path)[name]
        first, last = entry["data_offsets"]
        handle.seek(start + first)
        data = handle.read(last - first)
    if entry["dtype"] == "BF16":
        made = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        return made.reshape(entry["shape"])
    kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}
    kind |= {"I32": np.int32, "I8": np.int8}
    return np.frombuffer(data, kind.get(entry["dtype"], np.uint8)).reshape(entry["shape"])


def _write(
    source: Path,
    folder: Path,
    made: Arrays,
    twin_of: Arrays,
    told: dict[str, Any],
    dtypes: dict[str, str],
) -> Path:
    config = json.loads((source / "config.json").read_text())
    for place, tensors, more in (
        (folder, made, {"quantization_config": told}),
        (twin(folder), twin_of, {}),
    ):
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors*"))
        contiguous = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
        save_file(contiguous, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    _retype(folder / "model.safetensors", dtypes)
    return folder


def _retype(path: Path, dtypes: dict[str, str]) -> None:
    """Say in the header what numpy has no dtype for."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    for name, dtype in dtypes.items():
        table[name]["dtype"] = dtype
    body = json.dumps(table).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data[8 + length :])
