"""Where a source is: a local path, or a Hub id that huggingface_hub brings into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moetool.errors import MoetoolError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
]


def locate(name: str) -> Path:
    """A local path for `name`: itself when it exists, the embedded model for `demo`, else the Hub
    snapshot of `org/name[@revision]`.

    Raises MoetoolError when it is neither, or the Hub does not answer.
    """
    path = Path(name).expanduser()
    if name == "demo" and not path.exists():
        return Path(__file__).resolve().parent.parent / "demo" / "model"
    found = _HUB_ID.fullmatch(name)
    if path.exists() or found is None or name.startswith((".", os.sep)):
        return path
    return _download(found["repo"], found["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as problem:
        reason = (
            str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        )
        raise MoetoolError(
            f"{repo} is no local path, and the Hub does not give it: {reason}",
            expected="a folder, a .safetensors file or org/name[@revision]",
            hint="check the spelling, your network, and `hf auth login` for gated models",
        ) from None
