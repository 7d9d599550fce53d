"""Which files of a folder hold the weights: what the index promises, or what lies there. Pickles
and GGUF are refused with what to do instead.
"""

from __future__ import annotations

import os
from pathlib import Path

from moetool import strict_json
from moetool.errors import MoetoolError
from moetool.surgery import companions
from moetool.surgery.containers.safetensors import INDEX
from moetool.surgery.spec import Stored

__all__ = ["INDEX", "compare_index", "refuse_other", "weight_files"]

SUFFIXES = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files, and where there is an index what it says of each tensor: {name: file}."""
    index = folder / INDEX
    if index.exists():
        promised = strict_json.load(index, "weight index").get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(v, str) for v in promised.values()):
            raise MoetoolError(
                "the index has no weight_map",
                file=index,
                hint="restore the index from the original model",
            )
        companions.check_inside(index, "weight index")
        for shard in sorted(set(promised.values())):
            _stay_inside(folder, shard, index)
        _check_single(folder, set(promised.values()))
        return sorted(set(promised.values())), promised
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if not found and (folder / "config.json").is_file():
        found = sorted(p.name for p in folder.glob("*.gguf"))
    if not found:
        refuse_other(folder)
    for shard in found:
        _stay_inside(folder, shard, folder)
    if len(found) > 1 and "model.safetensors" not in found and not any("-of-" in f for f in found):
        raise MoetoolError(
            "several weight files but no index",
            file=folder,
            found=", ".join(found[:4]),
            hint=f"give one of the files, or add {INDEX}",
        )
    for name in found:
        total = name.rpartition("-of-")[2].rpartition(".")[0]
        if "-of-" in name and total.isdigit() and int(total) != sum("-of-" in f for f in found):
            raise MoetoolError(
                "a shard is missing and there is no index",
                file=folder,
                expected=f"{int(total)} shards",
                found=f"{len(found)}: {', '.join(found[:4])}",
                hint="download the missing shards",
            )
    return ["model.safetensors"] if "model.safetensors" in found else found, None


def _check_single(folder: Path, shards: set[str]) -> None:
    """transformers reads a model.safetensors and overlooks an index beside it; other readers do the
    contrary. Which of the two is meant cannot be told.
    """
    single = folder / "model.safetensors"
    if single.exists() and shards != {single.name}:
        raise MoetoolError(
            "there are a model.safetensors and an index of other files: two models in one folder",
            file=folder,
            expected="one of them",
            found=f"{INDEX} names {', '.join(sorted(shards)[:3])}",
            hint="transformers reads model.safetensors, other readers the index: move away the "
            "one that is not meant",
        )


def _stay_inside(folder: Path, shard: str, said_by: Path) -> None:
    """A shard must lie in its folder; the links of a Hub cache lead to its own `blobs`."""
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard or os.path.isabs(shard):
        raise MoetoolError(
            "a shard name leads out of the folder",
            file=said_by,
            expected="a plain file name",
            found=shard,
            hint="do not use this checkpoint unless you trust it; correct the index",
        )
    companions.check_inside(folder / shard, "shard")


def refuse_other(path: Path) -> None:
    """Say what lies there instead of safetensors, and what to do with it."""
    names = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir())
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise MoetoolError(
            "only pickle weights here, and moetool never unpickles: it would run code from the file",
            file=path,
            found=", ".join(pickles[:3]),
            expected="*.safetensors",
            hint="in a sandbox: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW), then use NEW",
        )
    if any(n.endswith(".gguf") for n in names):
        raise MoetoolError(
            "only GGUF weights here, and no config.json beside them",
            file=path,
            expected="*.safetensors, or a GGUF file with the config.json of the original model",
            hint="put config.json beside it, or convert with transformers: from_pretrained(DIR, gguf_file=..., quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW)",
        )
    raise MoetoolError(
        "no weights here",
        file=path,
        expected="model.safetensors or its shards",
        found=", ".join(names[:4]) or "nothing",
        hint="check the path",
    )


def compare_index(folder: Path, promised: dict[str, str], tensors: dict[str, Stored]) -> None:
    """Index and shards must name the same tensors in the same files."""
    for name, shard in promised.items():
        if name not in tensors:
            raise MoetoolError(
                "the index names a tensor that its shard does not hold",
                file=folder / shard,
                tensor=name,
                hint="download the shard and the index again",
            )
        if tensors[name].file != shard:
            raise MoetoolError(
                "the index and the shards disagree",
                file=folder / INDEX,
                tensor=name,
                expected=shard,
                found=tensors[name].file,
                hint="download the index again",
            )
    for name, tensor in tensors.items():
        if name not in promised:
            raise MoetoolError(
                "a shard holds a tensor that the index does not name",
                file=folder / tensor.file,
                tensor=name,
                hint="download the index again",
            )
