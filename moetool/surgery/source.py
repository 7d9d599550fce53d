"""Where a source is: a local path, or a Hub id that huggingface_hub brings into its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moetool.errors import MoetoolError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Snapshot:
    """What is taken from a Hub repository, and the words for it when that fails."""

    kind: str  # as the Hub calls it: model | dataset
    patterns: tuple[str, ...]
    local: str
    expected: str
    gated: str


MODEL = Snapshot(
    "model",
    (
        "*.safetensors",
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "*.tiktoken",
        "LICENSE*",
        "NOTICE*",
    ),
    "path",
    "a folder, a .safetensors file or org/name[@revision]",
    "models",
)
DATASET = Snapshot(
    "dataset",
    ("*.jsonl", "*.parquet", "*.txt", "**/*.jsonl", "**/*.parquet"),
    "file",
    "a file, or a dataset org/name[@revision]",
    "data",
)


@dataclass(frozen=True)
class HubId:
    """`org/name[@revision]`, read."""

    repo: str
    revision: str | None = None

    @classmethod
    def read(cls, name: str) -> HubId | None:
        """None for what cannot be a Hub id: a path with more parts, a relative or absolute path."""
        found = _HUB_ID.fullmatch(name)
        if found is None or name.startswith((".", os.sep)):
            return None
        return cls(found["repo"], found["revision"])

    def download(self, wanted: Snapshot) -> Path:
        """The folder of the snapshot in the Hub's cache; MoetoolError when it cannot be had."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = snapshot_download(
                self.repo,
                repo_type=wanted.kind,
                revision=self.revision,
                allow_patterns=list(wanted.patterns),
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as problem:
            reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
            raise MoetoolError(
                f"{self.repo} is no local {wanted.local}, and the Hub does not give it: {reason}",
                expected=wanted.expected,
                hint="check the spelling, your network, "
                f"and `hf auth login` for gated {wanted.gated}",
            ) from None
        return Path(folder)


def locate(name: str) -> Path:
    """A local path for `name`: itself when it exists, the embedded model for `demo`, else the Hub
    snapshot of `org/name[@revision]`.

    Raises MoetoolError when it is neither, or the Hub does not answer.
    """
    path = Path(name).expanduser()
    if name == "demo" and not path.exists():
        return Path(__file__).resolve().parent.parent / "demo" / "model"
    hub = HubId.read(name)
    return path if path.exists() or hub is None else hub.download(MODEL)
