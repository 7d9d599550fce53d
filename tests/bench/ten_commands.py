"""Ten commands, and a sha256 of the tensors that each of them writes: `python
tests/bench/ten_commands.py [CHECKOUT ...]`.

Five upcycles, three prunes and two merges of the embedded model, each run as a user would, with every
CHECKOUT (a folder with moetool/; by default the one this file lies in) in turn. Prints one table; ends
with 1 when two checkouts differ. A digest is over name, dtype, shape and bytes of every tensor in name
order: headers and shard names are left out, because a plan may say the same thing in other words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = ("--calibrate", "demo", "--tokens", "8192", "--seq-len", "256")


@dataclass(frozen=True)
class Command:
    """`moetool VERB SRC OUT OPTIONS`; OUT is its name. `portable`: no sum of floats decides a byte,
    so the digest is the same on every machine.
    """

    name: str
    verb: str
    source: str
    options: tuple[str, ...]
    portable: bool = False


COMMANDS = (
    Command("copies", "upcycle", "demo", ("--experts", "8", "--top-k", "2"), portable=True),
    Command(
        "groups",
        "upcycle",
        "demo",
        ("--experts", "16", "--split", "4", "--top-k", "4", "--router", "group:0.02"),
        portable=True,
    ),
    Command(
        "shared",
        "upcycle",
        "demo",
        ("--experts", "8", "--shared", "--split", "4", "--target", "glm4_moe"),
        portable=True,
    ),
    Command(
        "drop",
        "upcycle",
        "demo",
        ("--diversify", "permute+drop:0.5", "--router", "uniform:0.02"),
    ),
    Command(
        "clusters",
        "upcycle",
        "demo",
        ("--experts", "4", "--split", "4", "--top-k", "4", "--carve", "kmeans:gate"),
    ),
    Command("router", "prune", "drop", ("--ratio", "0.25")),
    Command("reap", "prune", "drop", ("--ratio", "0.5", *TEXT)),
    Command("naee", "prune", "drop", ("--ratio", "0.5", "--method", "naee", "--refit", *TEXT)),
    Command(
        "alike",
        "merge",
        "drop",
        (
            "--ratio",
            "0.5",
        ),
    ),
    Command("sub", "merge", "drop", ("--ratio", "0.5", "--method", "sub-moe", *TEXT)),
)


def tensors(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name, and digest of dtype, shape and bytes, of every tensor in the folder's files."""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, facts in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in facts["data_offsets"])
                said = f"{facts['dtype']} {facts['shape']}\n".encode()
                yield name, hashlib.sha256(said + data[begin:end]).digest()


def digest(folder: Path) -> str:
    """One sha256 over all tensors of a checkpoint, in name order."""
    found = dict(tensors(folder))
    assert found, f"no tensors in {folder}"
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + b"\n" + found[name])
    return whole.hexdigest()


def run(commands: Sequence[Command], folder: Path, checkout: Path) -> dict[str, str]:
    """Run commands with a checkout's moetool in a folder: name -> digest of what each wrote."""
    env = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = {}
    for command in commands:
        words = [command.verb, command.source, command.name, *command.options, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "moetool", *words],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"moetool {' '.join(words)}\n{done.stderr}"
        found[command.name] = digest(folder / command.name)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run all ten with each checkout and print the table; 1 when two differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    found = []
    for checkout in parser.parse_args(argv).checkouts:
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(COMMANDS, Path(folder), checkout.resolve()))
    print("| command | sha256 of all tensors | |\n|---|---|---|")
    for command in COMMANDS:
        digests = [one[command.name] for one in found]
        same = "same" if len(set(digests)) == 1 else f"DIFFERS: {' '.join(digests[1:])}"
        words = " ".join((command.verb, command.source, *command.options))
        print(f"| {words} | {digests[0]} | {same if len(found) > 1 else ''} |")
    return int(any(one != found[0] for one in found))


if __name__ == "__main__":
    sys.exit(main())
