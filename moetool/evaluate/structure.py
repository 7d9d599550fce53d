"""Is a checkpoint what its own plan and its family's layout say? Headers and small files only."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError, VerificationFailed
from moetool.methods.certificates import LEVELS
from moetool.surgery import complete, sound
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.containers import gguf, peft
from moetool.surgery.headers import WeightFiles

_STEP = {"method": str, "options": dict, "seed": int, "max_shard": int, "tables": dict}
_RECORD = {
    **_STEP,
    "sources": list,
    "config_sha256": str,
    "report": {
        "plan_digest": str,
        "tensors": int,
        "parameters": int,
        "certificate": {"level": str, "why": str},
    },
}


def recorded(folder: str) -> JsonObject:
    """The contents of moetool.json; VerificationFailed when it is not there."""
    path = Path(folder) / "moetool.json"
    if not path.exists():
        raise VerificationFailed(
            "this checkpoint was not written by moetool",
            file=path,
            expected="moetool.json",
            found="nothing",
            hint="`moetool inspect` looks at any checkpoint",
        )
    found = strict_json.load(path, "record of moetool", file_names=True)
    strict_json.check_shape(found, _RECORD, path, "record of moetool")
    for part in found["sources"]:
        strict_json.check_shape(part, {"name": str, "files": list}, path, "record of moetool")
    for step in found.get("before", ()):
        strict_json.check_shape(step, {**_STEP, "extra": list}, path, "record of moetool")
    level = found["report"]["certificate"]["level"]
    if level not in LEVELS:
        raise VerificationFailed(
            "the record of moetool holds a certificate that there is not",
            file=path,
            expected=", ".join(LEVELS),
            found=level,
            hint="restore moetool.json, or make the output again",
        )
    return found


def check_structure(checkpoint: Checkpoint, record: JsonObject) -> JsonObject:
    """Digest in every shard, config unchanged, exactly the layout's names and shapes. Raises
    VerificationFailed.
    """
    digest = record["report"]["plan_digest"]
    for name in checkpoint.files:
        found = _digest(Path(checkpoint.folder) / name)
        if found != digest:
            raise VerificationFailed(
                "a shard is not of this plan",
                file=f"{checkpoint.folder}/{name}",
                expected=digest,
                found=found,
                hint="the shard was replaced: make the output again",
            )
    check_config(checkpoint.folder, record)
    if len(checkpoint.stored) != record["report"]["tensors"]:
        raise VerificationFailed(
            "the number of tensors is not the planned one",
            file=checkpoint.folder,
            expected=record["report"]["tensors"],
            found=len(checkpoint.stored),
            hint="make the output again",
        )
    check_parts(checkpoint)
    return {
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.stored),
        "names_checked": check_names(checkpoint),
    }


def opened(folder: str | Path) -> Checkpoint:
    """The checkpoint. VerificationFailed where it cannot be read by a config that was changed."""
    at = Path(folder)
    try:
        if (at / peft.CONFIG).is_file() and not (at / "config.json").exists():
            config = read_json(at / peft.CONFIG, what="adapter config")
            inside = sorted(p.parent.name for p in at.glob(f"*/{peft.WEIGHTS}"))
            names = [peft.WEIGHTS, *(f"{name}/{peft.WEIGHTS}" for name in inside)]
            return Checkpoint.seen(str(at), config, WeightFiles.read(at, names))
        return Checkpoint.open(folder)
    except MoetoolError:
        if (at / "moetool.json").exists() and (at / "config.json").exists():
            check_config(str(folder), recorded(str(folder)))
        raise


def check_config(folder: str, record: JsonObject) -> None:
    """The config is the one that was written. Raises VerificationFailed."""
    path = _config(Path(folder))
    config = hashlib.sha256(path.read_bytes()).hexdigest()
    if config != record["config_sha256"]:
        raise VerificationFailed(
            f"{path.name} was changed",
            file=path,
            expected=record["config_sha256"],
            found=config,
            hint="restore it, or make the output again",
        )


def _config(folder: Path) -> Path:
    """The file that made the folder whole."""
    names = ("config.json", peft.CONFIG)
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def check_parts(checkpoint: Checkpoint) -> None:
    """The small parts of packed matrices: shapes as they are, scales that are numbers. Raises
    VerificationFailed.
    """
    packed = sound.parts(checkpoint, lambda form: form.container == "safetensors")
    for part, wrong in sound.flaws(checkpoint, packed):
        raise VerificationFailed(
            "a part of a packed matrix was changed",
            file=f"{checkpoint.folder}/{part.file}",
            tensor=part.name,
            expected=wrong[0],
            found=wrong[1],
            hint="make the output again",
        )


def check_names(checkpoint: Checkpoint) -> int:
    """Compare names and shapes with the family's layout; returns how many slots were compared (none
    of an adapter, whose names are its base's).
    """
    if _config(Path(checkpoint.folder)).name == peft.CONFIG:
        return 0
    compared = complete.compare(checkpoint)
    if compared.fault is not None:
        fault = compared.fault
        raise VerificationFailed(
            fault.what,
            file=fault.file,
            tensor=fault.tensor,
            expected=fault.expected,
            found=fault.found,
            hint="a loader would start it at random: make the output again"
            if fault.what == complete.MISSING
            else "make the output again",
        )
    return compared.right


def _digest(path: Path) -> object:
    if path.suffix == ".gguf":
        return gguf.read_head(path).value(gguf.DIGEST)
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: JsonObject = json.loads(handle.read(length))
    return (header.get("__metadata__") or {}).get("moetool_plan")
