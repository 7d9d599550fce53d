"""Is a checkpoint what its own plan and its family's layout say? Headers and small files only."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from moetool.errors import VerificationFailed
from moetool.surgery.checkpoint import Checkpoint, read_json
from moetool.surgery.layout import Layout, text_model


def recorded(folder: str) -> dict[str, Any]:
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
    return read_json(path, what="record of moetool")


def check_structure(checkpoint: Checkpoint, record: dict[str, Any]) -> dict[str, Any]:
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
    config = hashlib.sha256((Path(checkpoint.folder) / "config.json").read_bytes()).hexdigest()
    if config != record["config_sha256"]:
        raise VerificationFailed(
            "config.json was changed",
            file=f"{checkpoint.folder}/config.json",
            expected=record["config_sha256"],
            found=config,
            hint="restore it, or make the output again",
        )
    if len(checkpoint.stored) != record["report"]["tensors"]:
        raise VerificationFailed(
            "the number of tensors is not the planned one",
            file=checkpoint.folder,
            expected=record["report"]["tensors"],
            found=len(checkpoint.stored),
            hint="make the output again",
        )
    return {
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.stored),
        "names_checked": check_names(checkpoint),
    }


def check_names(checkpoint: Checkpoint) -> int:
    """Compare names and shapes with the family's layout; returns how many slots were compared."""
    at = text_model(checkpoint.config)
    layout, config, prefix = at.layout, at.config, at.prefix
    fused = layout.fused()
    stacked = bool(fused) and any(
        checkpoint.tensors.get(prefix + t.replace("{layer}", str(i)))
        for t in fused.values()
        for i in layout.moe_layers(config)
    )
    compared = _check_stacked(checkpoint, layout, config, prefix) if stacked else 0
    for name, shape, slot in layout.slots(config):
        if stacked and str(slot.role).startswith("expert."):
            continue
        stored = checkpoint.tensors.get(prefix + name)
        if stored is None:
            raise VerificationFailed(
                "a tensor that the family needs is missing",
                file=checkpoint.folder,
                tensor=prefix + name,
                expected=list(shape or ()),
                found="nothing",
                hint="a loader would start it at random: make the output again",
            )
        if shape is not None and None not in shape and stored.shape != tuple(shape):
            raise VerificationFailed(
                "a tensor has a wrong shape",
                file=f"{checkpoint.folder}/{stored.file}",
                tensor=prefix + name,
                expected=list(shape),
                found=list(stored.shape),
                hint="make the output again",
            )
        compared += 1
    return compared


def _check_stacked(
    checkpoint: Checkpoint, layout: Layout, config: dict[str, Any], prefix: str
) -> int:
    """Stacked experts: present in every MoE layer, with as many slabs as the config has experts,
    gate and up twice as high as down is wide.
    """
    experts, layers = layout.field("experts", config), sorted(layout.moe_layers(config))
    for layer in layers:
        both, down = (
            checkpoint.tensors.get(prefix + layout.fused()[r].replace("{layer}", str(layer)))
            for r in ("gate_up", "down")
        )
        if both is None or down is None:
            raise VerificationFailed(
                "a tensor that the family needs is missing",
                file=checkpoint.folder,
                tensor=f"stacked experts of layer {layer}",
                found="nothing",
                hint="make the output again",
            )
        if both.shape != (experts, 2 * down.shape[2], down.shape[1]) or down.shape[0] != experts:
            raise VerificationFailed(
                "a tensor has a wrong shape",
                file=f"{checkpoint.folder}/{both.file}",
                tensor=both.name,
                expected=[experts, 2 * down.shape[-1], down.shape[1]],
                found=list(both.shape),
                hint="make the output again",
            )
    return 2 * len(layers)


def _digest(path: Path) -> str | None:
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    return (header.get("__metadata__") or {}).get("moetool_plan")
