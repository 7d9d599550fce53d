"""Files that lie, in every way we could think of: a sentence with the file in it, exit code 1,
nothing written.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moetool.errors import MoetoolError
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.spec import rows, whole


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        write(path, header, data)

    return apply


NAME = "model.norm.weight"


def _offsets(header: dict[str, Any], start: int, stop: int) -> None:
    header[NAME]["data_offsets"] = [
        header[NAME]["data_offsets"][0] + start,
        header[NAME]["data_offsets"][1] + stop,
    ]


def _twice(path: Path) -> None:
    header, data = header_of(path)
    body = json.dumps(header)[:-1] + f', "{NAME}": {json.dumps(header[NAME])}' + "}"
    write(path, body.encode(), data)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "too short"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "too short"),
    "random bytes": (
        lambda p: p.write_bytes(bytes(range(256)) * 40),
        "header length is not possible",
    ),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "truncated in the header": (
        lambda p: p.write_bytes(p.read_bytes()[:100]),
        "header length is not possible",
    ),
    "trailing bytes": (
        lambda p: p.write_bytes(p.read_bytes() + b"x"),
        "bytes after its last tensor",
    ),
    "huge header length": (
        lambda p: write(p, *header_of(p), length=2**63),
        "header length is not possible",
    ),
    "not JSON": (lambda p: write(p, b"{nonsense", header_of(p)[1]), "not JSON"),
    "not UTF-8": (lambda p: write(p, b"\xff\xfe" * 8, b""), "not JSON"),
    "a list": (lambda p: write(p, [1, 2], b""), "not a JSON object"),
    "deep nesting": (lambda p: write(p, b"[" * 100_000, b""), "not JSON"),
    "duplicate name": (_twice, "stands twice"),
    "unknown dtype": (edit(lambda h: h[NAME].update(dtype="F99")), "unknown dtype"),
    "overlap": (edit(lambda h: _offsets(h, -8, -8)), "overlaps|hole"),
    "out of range": (edit(lambda h: _offsets(h, 1 << 40, 1 << 40)), "hole"),
    "hole": (edit(lambda h: h.pop(NAME)), "hole|after its last"),
    "shape does not fit": (edit(lambda h: h[NAME].update(shape=[7])), "does not fit its shape"),
    "negative shape": (edit(lambda h: h[NAME].update(shape=[-64])), "malformed"),
    "shape of text": (edit(lambda h: h[NAME].update(shape=["64"])), "malformed"),
    "no offsets": (edit(lambda h: h[NAME].pop("data_offsets")), "malformed"),
    "entry is a number": (edit(lambda h: h.update({NAME: 3})), "malformed"),
    "boolean offsets": (edit(lambda h: h[NAME].update(data_offsets=[False, True])), "malformed"),
}


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header(kind: str, copy: Path) -> None:
    change, word = HOSTILE[kind]
    change(copy / "model.safetensors")
    with pytest.raises(MoetoolError, match=word) as refused:
        Checkpoint.open(copy)
    assert refused.value.exit_code == 1 and refused.value.hint
    assert "model.safetensors" in refused.value.where["file"]


@pytest.mark.parametrize("kind", ["empty", "truncated", "overlap", "duplicate name"])
def test_the_command_says_it_in_a_sentence(
    kind: str, copy: Path, tmp_path: Path, moetool: Callable[..., Any]
) -> None:
    change, _ = HOSTILE[kind]
    change(copy / "model.safetensors")
    done = moetool("upcycle", copy, tmp_path / "out", "--json")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.json["file"].endswith("model.safetensors") and done.json["hint"]


def sharded(folder: Path) -> None:
    """Split a one-file model in two shards with an index."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, mine in parts.items():
        save_file({n: tensors[n] for n in mine}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: f for f, ns in parts.items() for n in ns}})
    )


def _index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def _link(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


BAD_INDEX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "weight file is missing",
    ),
    "parent folder": (
        lambda f: _index(f, lambda m: m.update({NAME: "../model.safetensors"})),
        "leads out of the folder",
    ),
    "absolute": (
        lambda f: _index(f, lambda m: m.update({NAME: "/etc/passwd"})),
        "leads out of the folder",
    ),
    "symlink": (_link, "link that leads out"),
    "names a tensor nobody has": (
        lambda f: _index(f, lambda m: m.update({"ghost": "model-00001-of-00002.safetensors"})),
        "does not hold",
    ),
    "wrong shard": (
        lambda f: _index(
            f,
            lambda m: m.update(
                {
                    n: "model-00002-of-00002.safetensors"
                    for n in list(m)[:1]
                    if m[n].startswith("model-00001")
                }
                or {NAME: "model-00001-of-00002.safetensors"}
            ),
        ),
        "disagree|does not hold",
    ),
    "forgets a tensor": (lambda f: _index(f, lambda m: m.pop(NAME)), "does not name"),
    "no weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "no weight_map",
    ),
    "not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_bad_index(kind: str, copy: Path) -> None:
    sharded(copy)
    Checkpoint.open(copy)
    change, word = BAD_INDEX[kind]
    change(copy)
    with pytest.raises(MoetoolError, match=word) as refused:
        Checkpoint.open(copy)
    assert refused.value.where["file"] and refused.value.hint


def test_missing_shard_without_index(copy: Path) -> None:
    sharded(copy)
    (copy / "model.safetensors.index.json").unlink()
    Checkpoint.open(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MoetoolError, match="shard is missing"):
        Checkpoint.open(copy)


def test_hub_cache_links_are_followed(llama: Path, tmp_path: Path) -> None:
    """snapshots/REV/model.safetensors -> ../../blobs/HASH is how the Hub cache looks."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(llama / "model.safetensors", blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    shutil.copy(llama / "config.json", snapshot)
    assert len(Checkpoint.open(snapshot).tensors) > 20


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda f: (f / "config.json").unlink(), "config is missing"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (
            lambda f: (
                (f / "model.safetensors").unlink(),
                (f / "pytorch_model.bin").write_bytes(b"\x80\x04"),
            ),
            "pickle",
        ),
        (
            lambda f: ((f / "model.safetensors").unlink(), (f / "m.gguf").write_bytes(b"GGUF")),
            "GGUF",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
    ],
)
def test_incomplete_folders(make: Callable[[Path], Any], word: str, copy: Path) -> None:
    make(copy)
    with pytest.raises(MoetoolError, match=word) as refused:
        Checkpoint.open(copy)
    assert refused.value.hint


def test_bytes_are_what_safetensors_says(llama: Path) -> None:
    checkpoint, truth = Checkpoint.open(llama), load_file(llama / "model.safetensors")
    assert set(checkpoint.tensors) == set(truth) and len(truth) > 20
    for name, stored in checkpoint.tensors.items():
        assert bytes(checkpoint.read(whole(stored))) == truth[name].numpy().tobytes()
    stored = checkpoint.tensors["model.embed_tokens.weight"]
    assert bytes(checkpoint.read(rows(stored, 3, 9))) == truth[stored.name][3:9].numpy().tobytes()


def test_a_single_file_is_a_source(llama: Path) -> None:
    assert Checkpoint.open(llama / "model.safetensors").tensors == Checkpoint.open(llama).tensors


def test_travelling_files(copy: Path) -> None:
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "LICENSE",
        "README.md",
        "notes.bin",
        ".hidden.json",
    ):
        (copy / name).write_text("{}")
    os.mkdir(copy / "folder.json")
    assert Checkpoint.open(copy).travelling() == [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
