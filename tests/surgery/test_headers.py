"""Headers as a broken or hostile tool may write them: what moetool accepts, the safetensors library
accepts too, with the same names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.headers import read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BYTES = bytes(range(8))
DTYPES = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I16"]
DTYPES += ["U16", "F16", "BF16", "I32", "U32", "F32", "I64", "U64", "F64", "C64", "F8_E5M2FNUZ"]


def body(**changes: Any) -> bytes:
    return json.dumps({"a": {**ONE, **changes}}).encode()


def text(metadata: str = "", entry: str = "") -> bytes:
    """A header spelled by hand."""
    plain = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
    return f'{{{metadata}"a":{{{entry or plain}}}}}'.encode()


def entry(
    dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = ""
) -> bytes:
    return text(entry=f'"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}')


HEADERS: dict[str, tuple[bytes, bytes]] = {
    "plain": (body(), BYTES),
    "empty": (b"{}", b""),
    "padded with spaces": (body() + b"   ", BYTES),
    "padded with newlines": (body() + b"\n\t\r", BYTES),
    "padded with zeros": (body() + b"\0\0", BYTES),
    "begins with a space": (b" " + body(), BYTES),
    "UTF-16": (body().decode().encode("utf-16"), BYTES),
    "UTF-16 without mark": (body().decode().encode("utf-16-le"), BYTES),
    "UTF-32": (body().decode().encode("utf-32"), BYTES),
    "byte order mark": (b"\xef\xbb\xbf" + body(), BYTES),
    "Latin-1 name": (b'{"\xe9":' + json.dumps(ONE).encode() + b"}", BYTES),
    "UTF-8 name": (json.dumps({"é": ONE}, ensure_ascii=False).encode(), BYTES),
    "escaped name": (json.dumps({"é": ONE}).encode(), BYTES),
    "pair of surrogates": (json.dumps({"😀": ONE}).encode(), BYTES),
    "half a surrogate pair": (b'{"\\ud800":' + json.dumps(ONE).encode() + b"}", BYTES),
    "half a pair in metadata": (text('"__metadata__":{"a":"\\ud800"},'), BYTES),
    "half a pair as metadata key": (text('"__metadata__":{"\\udc00":"b"},'), BYTES),
    "empty name": (json.dumps({"": ONE}).encode(), BYTES),
    "control character": (b'{"a\x01":' + json.dumps(ONE).encode() + b"}", BYTES),
    "metadata": (text('"__metadata__":{"format":"pt"},'), BYTES),
    "metadata empty": (text('"__metadata__":{},'), BYTES),
    "metadata null": (text('"__metadata__":null,'), BYTES),
    "metadata a list": (text('"__metadata__":[],'), BYTES),
    "metadata a text": (text('"__metadata__":"pt",'), BYTES),
    "metadata number": (text('"__metadata__":{"a":1},'), BYTES),
    "metadata null value": (text('"__metadata__":{"a":null},'), BYTES),
    "metadata nested": (text('"__metadata__":{"a":{"b":"c"}},'), BYTES),
    "metadata twice": (text('"__metadata__":{},"__metadata__":{},'), BYTES),
    "metadata key twice": (text('"__metadata__":{"a":"1","a":"2"},'), BYTES),
    "an extra field": (entry(more=',"x":1'), BYTES),
    "extra NaN": (entry(more=',"x":NaN'), BYTES),
    "extra deep": (entry(more=',"x":' + "[" * 500 + "]" * 500), BYTES),
    "very deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", BYTES),
    "dtype twice": (entry(more=',"dtype":"F32"'), BYTES),
    "shape twice": (entry(more=',"shape":[2]'), BYTES),
    "offsets twice": (entry(more=',"data_offsets":[0,8]'), BYTES),
    "dtype escaped": (text(entry='"dty\\u0070e":"F32","shape":[2],"data_offsets":[0,8]'), BYTES),
    "no dtype": (text(entry='"shape":[2],"data_offsets":[0,8]'), BYTES),
    "no shape": (text(entry='"dtype":"F32","data_offsets":[0,8]'), BYTES),
    "no offsets": (text(entry='"dtype":"F32","shape":[2]'), BYTES),
    "name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), BYTES),
    "entry a list": (b'{"a":["F32",[2],[0,8]]}', BYTES),
    "entry null": (b'{"a":null}', b""),
    "entry a number": (b'{"a":1}', b""),
    "header a list": (b"[]", b""),
    "header nothing": (b"", b""),
    "header cut": (body()[:-1], BYTES),
    "header and more": (body() + b"{}", BYTES),
    "comment": (b"{/**/" + body()[1:], BYTES),
    "trailing comma": (body()[:-1] + b",}", BYTES),
    "dtype lower": (entry(dtype='"f32"'), BYTES),
    "dtype null": (entry(dtype="null"), BYTES),
    "dtype list": (entry(dtype='["F32"]'), BYTES),
    "dtype object": (entry(dtype='{"F32":null}'), BYTES),
    "shape null": (entry(shape="null"), BYTES),
    "shape text": (entry(shape='"2"'), BYTES),
    "shape object": (entry(shape='{"2":2}'), BYTES),
    "shape float": (entry(shape="[2.0]"), BYTES),
    "shape 2e0": (entry(shape="[2e0]"), BYTES),
    "shape true": (entry(shape="[true,2]"), BYTES),
    "shape negative": (entry(shape="[-2]"), BYTES),
    "shape twice negative": (entry(shape="[-1,-2]"), BYTES),
    "shape minus zero": (entry(shape="[-0]", offsets="[0,0]"), b""),
    "shape leading zero": (entry(shape="[02]"), BYTES),
    "shape plus": (entry(shape="[+2]"), BYTES),
    "shape NaN": (entry(shape="[NaN]"), BYTES),
    "shape of 2**64": (entry(shape=f"[{2**64},0]", offsets="[0,0]"), b""),
    "shape of 2**63": (entry(shape=f"[{2**63},0]", offsets="[0,0]"), b""),
    "shape overflows": (entry(shape=f"[{2**40},{2**40},0]", offsets="[0,0]"), b""),
    "shape overflows to fit": (entry(shape=f"[{2**32},{2**32},2]"), BYTES),
    "bits overflow": (entry(shape=f"[{2**60}]", offsets="[0,0]"), b""),
    "5000 digits": (entry(shape="[" + "9" * 5000 + "]"), BYTES),
    "scalar": (entry(dtype='"F64"', shape="[]"), BYTES),
    "no elements": (entry(shape="[0]", offsets="[0,0]"), b""),
    "no elements far out": (entry(shape="[0]", offsets="[9,9]"), b""),
    "1000 dimensions": (entry(shape=str([1] * 999 + [2])), BYTES),
    "offsets float": (entry(offsets="[0.0,8.0]"), BYTES),
    "offsets text": (entry(offsets='["0","8"]'), BYTES),
    "offsets three": (entry(offsets="[0,8,8]"), BYTES),
    "offsets one": (entry(offsets="[8]"), BYTES),
    "offsets turned": (entry(offsets="[8,0]"), BYTES),
    "offsets minus zero": (entry(offsets="[-0,8]"), BYTES),
    "offsets of 2**64": (entry(offsets=f"[{2**64},{2**64 + 8}]"), BYTES),
    "offset begins late": (entry(offsets="[8,16]"), BYTES * 2),
    "data too short": (body(), BYTES[:-1]),
    "data too long": (body(), BYTES + b"\0"),
    "two alike": (json.dumps({"a": ONE, "b": ONE}).encode(), BYTES),
    "F4 odd": (entry(dtype='"F4"', shape="[3]", offsets="[0,1]"), b"\0"),
    "F4 odd, longer": (entry(dtype='"F4"', shape="[3]", offsets="[0,2]"), b"\0\0"),
    "F4 even": (entry(dtype='"F4"', shape="[4]", offsets="[0,2]"), b"\0\0"),
    "F6 of 1": (entry(dtype='"F6_E2M3"', shape="[1]", offsets="[0,0]"), b""),
    "F6 of 2": (entry(dtype='"F6_E2M3"', shape="[2]", offsets="[0,1]"), b"\0"),
    "F6 of 4": (entry(dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]"), b"\0\0\0"),
    **{
        f"dtype {d}": (entry(dtype=f'"{d}"', shape="[8]", offsets=f"[0,{n}]"), b"\0" * n)
        for d, n in zip(
            DTYPES,
            [8, 8, 8, 8, 8, 8, 4, 6, 6, 16, 16, 16, 16, *[32] * 3, *[64] * 4, 8],
            strict=True,
        )
    },
}
# Refused although the library takes it: two tools may read two tensors, or none.
STRICTER = {
    "name twice",
    "metadata key twice",
    "an extra field",
    "entry a list",
    "dtype object",
    "dtype F8_E5M2FNUZ",
}


def theirs(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        return {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(data)}
    except SafetensorError:
        return None


def ours(path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    data = path.read_bytes()
    try:
        stored, *_ = read_header(path)
    except MoetoolError as problem:
        assert problem.hint and str(path) in str(problem)
        return None
    return {t.name: (t.dtype, list(t.shape), data[t.start : t.stop]) for t in stored}


@pytest.mark.parametrize("name", HEADERS)
def test_same_verdict_as_the_library(name: str, tmp_path: Path) -> None:
    header, data = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    mine, other = ours(path), theirs(path.read_bytes())
    if mine is not None:
        assert mine == other
    if other is not None and name not in STRICTER:
        assert mine is not None


def test_the_battery_is_whole() -> None:
    assert len(HEADERS) == 114


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "model.safetensors"])
def test_a_single_file_beside_an_index(other: str, llama: Path, tmp_path: Path) -> None:
    """transformers takes the single file, other readers the index: only where both mean the same
    can it be told what the model is.
    """
    import shutil

    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    if other != "model.safetensors":
        shutil.copy(folder / "model.safetensors", folder / other)
    names = dict.fromkeys(Checkpoint.open(llama).tensors, other)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    if other == "model.safetensors":
        assert len(Checkpoint.open(folder).tensors) == len(names)
        return
    with pytest.raises(MoetoolError, match="two models in one folder") as caught:
        Checkpoint.open(folder)
    assert "transformers reads model.safetensors" in caught.value.hint
    (folder / "model.safetensors").unlink()
    assert len(Checkpoint.open(folder).tensors) == len(names)
