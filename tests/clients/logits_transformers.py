"""Asks transformers (4 or 5, the one of the python that runs this) for logits in float32.

    python logits_transformers.py JOBS.json FOLDER

JOBS: {name: {"model": folder, "rows": [[token, ...], ...]}}. FOLDER/name.npy is the answer [rows,
places, vocabulary], or FOLDER/name.json what the client said instead; each is written at once, so
that whoever asks sees at which model a process died.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def load(folder: str) -> Any:
    """The stock class of a checkpoint, in float32; attention in plain arithmetic."""
    import torch
    import transformers

    said = json.loads((Path(folder) / "config.json").read_text())
    kind = getattr(transformers, said["architectures"][0], transformers.AutoModelForCausalLM)
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    return kind.from_pretrained(folder, **how).eval()


def logits(folder: str, rows: list[list[int]]) -> Any:
    """Numpy float32 [rows, places, vocabulary]."""
    import torch

    with torch.no_grad():
        return load(folder)(input_ids=torch.tensor(rows)).logits.numpy()


def answer(asked: Any, jobs: str, folder: str) -> None:
    """One answer a job, of `asked(model, rows)`; shared by the scripts of the other clients."""
    import numpy as np

    for name, job in json.loads(Path(jobs).read_text()).items():
        try:
            made = asked(job["model"], job["rows"])
        except (Exception, SystemExit) as problem:  # noqa: BLE001 - it is what we ask for
            said = f"{type(problem).__name__}: {problem}"
            Path(folder, f"{name}.json").write_text(json.dumps(said))
        else:
            np.save(Path(folder, f"{name}.npy"), np.asarray(made, np.float32))


if __name__ == "__main__":
    answer(logits, *sys.argv[1:])
