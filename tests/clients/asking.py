"""Asks every client for what it computes of many models, one process a client where it lives, and
compares that with the installed transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.logits_vllm import AGAIN, MORE, TOP
from clients.outputs import Output, trained
from moetool.surgery import clients
from moetool.surgery.checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "transformers5": "logits_transformers.py",
    "transformers4": "logits_transformers.py",
    "mlx": "logits_mlx.py",
    "llama.cpp": "logits_llamacpp.py",
    "vllm": "logits_vllm.py",
}
Jobs = Mapping[str, Mapping[str, object]]
ROWS = [[10 + (7 * i + 3 * i * i + 50 * row) % 140 for i in range(24)] for row in range(2)]
NEAR = 1e-5  # of the largest logit
# Of a log-probability, where a client gives no logits; NEAR where logits are larger than five.
NEAR_LOG = 5e-5
# Arithmetic of less than float32, which is no other function: families of a client, and how near.
ROUGHLY = {
    "mlx": ("gemma", "gemma3_text", "starcoder2"),
    "llama.cpp": ("gemma", "gemma2", "gemma3_text", "starcoder2"),
}
ROUGH = 6e-4
# vLLM's models of images want torchvision; its CPU build has one attention in 16 bits alone, and no
# routing by sigmoid without groups.
LACKS = (
    "failed to be inspected",
    "expect weight to be bfloat16",
    'assert self.scoring_func == "softmax"',
)
LONG = 7200  # seconds after which a client is stuck


@dataclass(frozen=True)
class Measured:
    """What a client makes of a model: `state` works, refuses or wrong; `said`: its own words; `gap`:
    the largest difference by the largest logit (vLLM: of a log-probability).
    """

    state: str
    said: str = ""
    gap: float = 0.0

    def __str__(self) -> str:
        if self.state == "works":
            return f"equal ({self.gap:.0e})"
        return f"{self.state}: {self.said or format(self.gap, '.1e')}"


@dataclass(frozen=True)
class Reference:
    """What the installed transformers makes of a model, and the tokens it adds greedily."""

    logits: np.ndarray
    words: np.ndarray

    @classmethod
    def of(cls, folder: Path) -> Reference:
        """In this process. AssertionError where it misses a tensor, or finds one too many."""
        import tiny
        import torch

        model, rows = tiny.load(folder), torch.tensor(ROWS)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = model(input_ids=rows).logits.numpy()
            for _ in range(MORE):  # `generate` may stop early, or use a cache that windows end
                last = model(input_ids=rows).logits[:, -1:].argmax(-1)
                rows = torch.cat([rows, last], 1)
        return cls(logits, rows[:, -MORE:].numpy())


def home(client: str) -> Path | None:
    """The python of a client's environment; None where there is none. The installed transformers is
    one of the clients, unless there is another one of its own.
    """
    found = Path(os.environ.get("MOETOOL_CLIENTS", "/nowhere"), client, "bin", "python")
    if client == "transformers5" and not found.exists():
        return Path(sys.executable)
    return found if found.exists() else None


def ask(client: str, models: Mapping[str, Path], work: Path) -> dict[str, np.ndarray | str]:
    """Logits, or what the client said instead, of every model."""
    jobs = {name: {"model": str(path), "rows": ROWS} for name, path in models.items()}
    if client != "llama.cpp":
        return _each(client, SCRIPTS[client], jobs, work)
    work.mkdir(parents=True, exist_ok=True)
    script, said = _converter(), {}
    for name, job in jobs.items():
        said[name] = {**job, "script": script, "file": str(work / f"{name}.gguf")}
    # the transformers that its requirements name
    made = _each("transformers4", "converting_llamacpp.py", said, work / "converting")
    refused = {name: f"convert_hf_to_gguf.py: {words}" for name, words in made.items() if words}
    files = {n: {"model": said[n]["file"], "rows": ROWS} for n in models if n not in refused}
    return refused | _each(client, SCRIPTS[client], files, work / "reading")


def _converter() -> str:
    """The script in the sdist of llama-cpp-python."""
    where = "import importlib.util as u; print(u.find_spec('llama_cpp').origin)"
    told = subprocess.run([home("llama.cpp"), "-c", where], capture_output=True, text=True)
    return str(Path(told.stdout.strip()).parents[1] / "vendor/llama.cpp/convert_hf_to_gguf.py")


def _each(client: str, script: str, jobs: Jobs, work: Path) -> dict[str, np.ndarray | str]:
    """What a script answers to every job; one that kills it is left out of its next run."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found: dict[str, np.ndarray | str] = {}
    while rest := {name: job for name, job in jobs.items() if name not in found}:
        code = _run(home(client), script, rest, work)
        answers = {name: made for name in rest if (made := _answer(work / name)) is not None}
        found |= answers
        left = next((name for name in rest if name not in found), None)
        if left and not (answers and code == AGAIN):
            found[left] = f"the process dies ({code})"
    return found


def _answer(path: Path) -> np.ndarray | str | None:
    made, said = Path(f"{path}.npy"), Path(f"{path}.json")
    if made.exists():
        return np.load(made)
    return str(json.loads(said.read_text())) if said.exists() else None


def _run(python: Path | None, script: str, jobs: Jobs, work: Path) -> int:
    """Run a script of this folder in a client's environment; its exit code."""
    asked = work / "jobs"
    asked.write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (work / "log").open("a") as log:
        run = subprocess.run(
            ["nice", str(python or sys.executable), "-W", "ignore", HERE / script, asked, work],
            stdout=log,
            stderr=log,
            env=env,
            timeout=LONG,
            check=False,
        )
    return run.returncode


def judged(
    client: str, made: np.ndarray | str, reference: Reference, near: float = NEAR
) -> Measured:
    """Whether an answer is the reference's, within `near` of its largest logit."""
    if isinstance(made, str) and any(words in made for words in LACKS):
        return Measured("untested", "its environment lacks what this needs")
    if isinstance(made, str):
        return Measured("refuses", made.replace("\n", " ")[:200])
    if client == "vllm":
        return _judged_top(made, reference)
    if made.shape != reference.logits.shape:
        return Measured("wrong", f"logits {made.shape}, not {reference.logits.shape}")
    if not np.isfinite(made).all():
        return Measured("wrong", "NaN")
    gap = float(np.abs(made - reference.logits).max() / np.abs(reference.logits).max())
    return Measured("works" if gap <= near else "wrong", gap=gap)


def _judged_top(made: np.ndarray, reference: Reference) -> Measured:
    """[rows, tokens, log-probabilities, decoded tokens] as logits_vllm.py gives them."""
    full = reference.logits[:, :-1].astype(np.float64)
    full = full - np.log(np.exp(full - full.max(-1, keepdims=True)).sum(-1, keepdims=True))
    full -= reference.logits[:, :-1].max(-1, keepdims=True)
    rows, places, _ = full.shape
    many = places * TOP
    tokens = made[:, :many].reshape(rows, places, TOP).astype(int)
    found = made[:, many : 2 * many].reshape(rows, places, TOP)
    if not np.isfinite(found).all():
        return Measured("wrong", "NaN")
    gap = np.abs(np.take_along_axis(full, tokens, -1) - found).max()
    best = np.abs(np.sort(full, -1)[..., : -TOP - 1 : -1] - found).max()
    worst = float(max(gap, best))
    if worst > max(NEAR_LOG, NEAR * np.abs(reference.logits).max()):
        return Measured("wrong", gap=worst)
    same = np.array_equal(made[:, 2 * many :].astype(int), reference.words)
    return Measured("works" if same else "wrong", "" if same else "other greedy tokens", worst)


def said(client: str, folder: Path) -> str:
    """What the report of an output says that a client makes of it; of a source, what the data says."""
    report = folder / "moetool.json"
    if report.exists():
        return json.loads(report.read_text())["report"]["clients"][client]["state"]
    source = Checkpoint.open(folder)
    output = clients.traits(source.config, source.tensors, folder=str(folder))
    return clients.model(client, output).state


def from_dense(output: Output, root: Path) -> float:
    """How far an upcycle lies from what it was made of, by the largest logit."""
    made, dense = Reference.of(output.write(root)).logits, Reference.of(trained()).logits
    return float(np.abs(made - dense).max() / np.abs(dense).max())


def measured(
    names: Iterable[str], outputs: Iterable[Output], root: Path
) -> dict[str, dict[str, Measured]]:
    """client -> output -> what it makes of it; clients that are not there are left out."""
    outputs = list(outputs)
    models = {output.name: output.write(root) for output in outputs}
    references = {name: Reference.of(path) for name, path in models.items()}
    made = {}
    for client in (name for name in names if home(name)):
        answers = ask(client, models, root / "answers" / client)
        rough = ROUGHLY.get(client, ())
        made[client] = {
            o.name: judged(
                client,
                answers[o.name],
                references[o.name],
                ROUGH if o.family in rough else NEAR,
            )
            for o in outputs
        }
    return made
