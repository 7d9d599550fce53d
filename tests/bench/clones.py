"""Copies for nothing: `python tests/bench/clones.py FOLDER [--rounds 4]`, FOLDER on a file system that
shares blocks (a loop-mounted btrfs will do; 8 GB).

Eight copies of the FFNs of a random Llama (445 MB, four fifths of it FFNs) beside `cp` of the same
output, in turn, each from a clean disk; with the disk's own confirmation (`sync`) for both, and
without it for both. Prints medians, ratios pair by pair, and what the output takes of the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from upcycle import make_llama

SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "vocab_size": 2048,
}
OURS = [sys.executable, "-W", "ignore", "-m", "moetool", "--quiet", "upcycle", "src", "out"]
CASES = {
    "moetool": [*OURS, "--experts", "8"],
    "moetool, shards of 200 MB": [*OURS, "--experts", "8", "--max-shard-size", "200MB"],
    "cp and sync": ["sh", "-c", "cp -r --reflink=never full out && sync -f out"],
    "moetool --no-sync": [*OURS, "--experts", "8", "--no-sync"],
    "cp": ["cp", "-r", "--reflink=never", "full", "out"],
}
PAIRS = (
    ("moetool", "cp and sync"),
    ("moetool, shards of 200 MB", "cp and sync"),
    ("moetool --no-sync", "cp"),
)


def run(folder: Path, command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds, from a clean disk."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    subprocess.run(["sync", "-f", folder], check=True)
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def disk(folder: Path) -> int:
    """Bytes of `out` on the disk, its own and shared ones."""
    subprocess.run(["sync", "-f", folder], check=True)
    command = ["btrfs", "filesystem", "du", "-s", "--raw", str(folder / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, exclusive, shared = said.splitlines()[-1].split()[:3]
    return int(exclusive) + int(shared)


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__)
    said.add_argument("folder", type=Path)
    said.add_argument("--rounds", type=int, default=4)
    asked = said.parse_args()
    source = make_llama(asked.folder / "src", SIZE, 0)
    size = sum(f.stat().st_size for f in source.iterdir())
    for name in ("moetool, shards of 200 MB", "moetool"):
        run(asked.folder, CASES[name])
        print(f"{name}: {disk(asked.folder) / size:.2f} x the source on the disk")
    shutil.rmtree(asked.folder / "full", ignore_errors=True)
    command = ["cp", "-r", "--reflink=never", "out", "full"]
    subprocess.run(command, cwd=asked.folder, check=True)
    rounds = [{n: run(asked.folder, c) for n, c in CASES.items()} for _ in range(asked.rounds)]
    print("| | wall s | CPU s |\n|---|---|---|")
    for name in CASES:
        wall, cpu = (statistics.median(r[name][i] for r in rounds) for i in range(2))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")
    for one, other in PAIRS:
        wall, cpu = (statistics.median(r[one][i] / r[other][i] for r in rounds) for i in range(2))
        print(f"{one} / {other}: wall {wall:.2f}, CPU {cpu:.2f}")


if __name__ == "__main__":
    main()
