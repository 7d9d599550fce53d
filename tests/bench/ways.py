"""What every way of prune and merge keeps, for `moetool methods list` and README: `python
tests/bench/compress.py TESTBED --only ways [--again]` writes moetool/methods/measured.json.

Ways are asked of the registries. Each removes 25 % and 50 % of the experts, once without and once
with refit, and is held against the whole model on the val files. Decided and solved on 32 x 256
tokens of the calibration file, domains in turn; ways that need no text get none but for the refit.
Rows that stand in the file are kept unless --again: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.quantize import LENGTH, SEQUENCES, Meter, texts

FILE = Path(__file__).resolve().parents[2] / "moetool" / "methods" / "measured.json"
MODEL = "qwen3moe-16x4"
RATIOS = (0.25, 0.5)
EACH = 1  # sequences of 512 tokens from each val file
SEEDS = 3  # draws of a way that is chance: its row is their mean


# What is told beside the name, where the registry has no way of that.
BESIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "svd, with text": ("prune", "svd", {"text": True}),
    "alike, features svd": (
        "merge",
        "alike",
        {"features": "svd", "rank_energy": 0.5, "cluster": "ward"},
    ),
}


class Case(NamedTuple):
    """One cell of the table. `row`: its place in the file; told: what BESIDE says."""

    row: tuple[str, str]
    verb: str
    name: str
    ratio: float
    refit: bool
    told: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.ratio:.0%}{' refit' if self.refit else ''}"


def cases() -> Iterator[Case]:
    """Without refit first, so that a table that is not finished is still a table."""
    from moetool import methods

    for refit in (False, True):
        for verb in ("prune", "merge"):
            for name in methods.load(verb).ways():
                for ratio in RATIOS:
                    yield Case((verb, name), verb, name, ratio, refit, {})
        for row, (verb, name, told) in BESIDE.items():
            for ratio in RATIOS:
                yield Case(("beside", row), verb, name, ratio, refit, told)


class Bench:
    """The testbed, and what has been measured of it."""

    def __init__(self, bed: Path, folder: Path, again: bool) -> None:
        from transformers import AutoTokenizer

        self.model, self.out = bed / MODEL, folder / "out"
        self.tokens, _ = texts(bed, folder, AutoTokenizer.from_pretrained(self.model))
        self.meter = Meter(self.model, sorted((bed / "text").glob("val.*.jsonl")), EACH)
        self.kl: dict[str, dict[str, dict[str, float | None]]] = {"prune": {}, "merge": {}}
        self.kl["beside"] = {}
        if FILE.exists() and not again:
            self.kl |= json.loads(FILE.read_text())["kl"]

    def fill(self) -> None:
        """Measure what is missing, a cell at a time."""
        for case in cases():
            table, name = case.row
            row = self.kl[table].setdefault(name, {})
            if case.key not in row:
                begun, cpu = time.perf_counter(), time.process_time()
                row[case.key] = self.cell(case)
                spent = (
                    f"{time.perf_counter() - begun:.0f} s, {time.process_time() - cpu:.0f} CPU s"
                )
                print(*case.row, case.key, row[case.key], spent, flush=True)
                self.save()

    def cell(self, case: Case) -> float | None:
        """KL(SRC || OUT); None where the way cannot be compared: it refuses this model, is told
        more than how many experts go, or refits by itself where nothing should be refitted.
        """
        from moetool import methods
        from moetool.errors import MoetoolError

        way = methods.load(case.verb).ways()[case.name]
        draws = range(SEEDS if way.chance else 1)
        try:
            found = [self.run(case, way.needs_text(), seed) for seed in draws]
        except MoetoolError as problem:
            print(case.verb, case.name, str(problem).splitlines()[0], flush=True)
            return None
        measured = [kl for kl in found if kl is not None]
        return float(f"{sum(measured) / len(found):.4g}") if measured else None

    def run(self, case: Case, needs_text: bool, seed: int) -> float | None:
        import moetool

        shutil.rmtree(self.out, ignore_errors=True)
        told: dict[str, Any] = {"refit": case.refit, "form": "full"} | case.told
        if told.pop("text", False) or needs_text or case.refit:
            told |= {"calibrate": [str(self.tokens)], "tokens": SEQUENCES * LENGTH}
            told |= {"seq_len": LENGTH, "pack": False}
        verb = getattr(moetool, case.verb)
        common = {"method": case.name, "ratio": case.ratio, "seed": seed}
        report = verb(str(self.model), str(self.out), **common, **told)
        return self.meter(self.out)[0] if case.refit or not report.get("refit") else None

    def save(self) -> None:
        about = {
            "model": f"{MODEL}: a Qwen3-MoE of 22 M parameters, 6 layers of 16 experts, top-4",
            "calibration": f"{SEQUENCES} x {LENGTH} tokens of six domains",
            "held out": f"{6 * EACH} x 512 tokens of the same domains",
            "command": "python tests/bench/compress.py TESTBED --only ways",
        }
        FILE.write_text(json.dumps(about | {"kl": self.kl}, indent=1) + "\n")


def measure(bed: Path, folder: Path, again: bool) -> None:
    """Fill the file."""
    Bench(bed, folder, again).fill()
