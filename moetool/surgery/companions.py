"""Files that go with weights: which travel into an output, and which stay behind.

Known ones only. A checkpoint may hold code, adapters, training states or somebody's notes, and a
link may lead to any file of this machine; an output is handed on to others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moetool.errors import MoetoolError
from moetool.reading import check_regular
from moetool.surgery import shim

# Files that are made anew for every output and so never travel.
OWN = {
    "config.json",
    "README.md",
    "moetool.json",
    "report.json",
    "decisions.json",
    "decisions.tensors",
    "experts.json",
    "experts.jsonl",
    "model.safetensors.index.json",
    shim.FILE,
}
ADAPTER = "adapter_config.json"  # made by those that write an adapter; one beside a model is not
ADAPTED = (ADAPTER, "adapter_model.safetensors")  # all that an adapter inside another has
_KNOWN = re.compile(
    r"""tokenizer[\w.-]*\.json | special_tokens_map\.json | added_tokens\.json | tekken\.json
      | (vocab|merges|normalizer|bpe)[\w.-]*\.(json|txt|bpe|codes)
      | [\w.-]+\.(model|spm|tiktoken|jinja) | chat_template\.json
      | generation_config\.json | ([\w-]+_)?(processor|preprocessor|feature_extractor)_config\.json
      | (LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY|USAGE_POLICY)[\w .-]*""",
    re.VERBOSE | re.IGNORECASE,
)
_WEIGHTS = re.compile(r"[\w.-]+\.(safetensors|gguf)|[\w.-]+\.safetensors\.index\.json")
SHOWN = 6


def travels(name: str) -> bool:
    """Whether a file of this name is a tokenizer, template, processor, generation config or
    licence.
    """
    return _KNOWN.fullmatch(name) is not None and name not in OWN


def is_output(name: str) -> bool:
    """Whether an output of moetool, or any plain checkpoint, may hold a file of this name."""
    return name in (*OWN, ADAPTER) or travels(name) or is_weights(name)


def is_weights(name: str) -> bool:
    """Whether it is the name of a weight file or of its index."""
    return _WEIGHTS.fullmatch(name) is not None


def travelling(folder: str | Path) -> list[str]:
    """Names of the files that travel, in order. MoetoolError for one that is a link out of the
    folder, a pipe or a device.
    """
    found = []
    for name in sorted(os.listdir(folder)):
        path = Path(folder) / name
        if travels(name) and not path.is_dir() and path.exists():
            check_inside(path, "companion file")
            check_regular(path, "companion file")
            found.append(name)
    return found


def left_behind(folder: str | Path) -> str:
    """One line that names what does not travel; empty where there is nothing to say."""
    seen = (n for n in os.listdir(folder) if not n.startswith("."))
    names = sorted(n for n in seen if n == ADAPTER or not is_output(n))
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"left behind, for only known companions travel: {', '.join(names[:SHOWN])}{more}"


def check_inside(path: Path, what: str) -> None:
    """A link must stay in its folder; those of a Hub cache lead to its own `blobs`."""
    if not path.is_symlink():
        return
    real, base = path.resolve(), path.parent.resolve()
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else None
    if real.parent not in (base, blobs):
        raise MoetoolError(
            f"a {what} is a link that leads out of the folder",
            file=path,
            found=real,
            hint="copy the file into the folder, or give the folder the link leads to",
        )
