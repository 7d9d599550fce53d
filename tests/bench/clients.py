"""What every client makes of every output: `python tests/bench/clients.py [--only WORDS] [--clients
NAMES] [--trained] [--root FOLDER] [--save FILE] [--before FILE]`.

Clients live in environments that MOETOOL_CLIENTS names (tests/clients/__init__.py); one that is not
there is untested. Outputs are tiny (tests/clients/outputs.py); `--trained`: upcycles of SmolLM2-135M
instead, one after another, and how far each is from the dense model. `--root` keeps what is written
and takes what lies there. `--save` keeps what was measured, and `--before` shows beside it what another version had. Prints one table,
and every cell that differs from the data of clients; a command, not a test.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients import asking
from clients.outputs import OUTPUTS, TRAINED, Output

SHORT = 44
Rows = dict[str, dict[str, dict[str, str]]]  # output -> client -> state, shown, says


def measure(outputs: list[Output], names: list[str], root: Path) -> Rows:
    """Every cell, with what the data says of it."""
    rows: Rows = {output.name: {} for output in outputs}
    for client in names:
        start = time.monotonic()
        found = asking.measured([client], outputs, root).get(client, {})
        print(f"{client}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        for output in outputs:
            cell = found.get(output.name, asking.Measured("untested"))
            says = asking.said(client, output.write(root))
            rows[output.name][client] = {"state": cell.state, "shown": str(cell), "says": says}
    return rows


def shown(cell: dict[str, str], before: dict[str, str] | None) -> str:
    """One cell: in short, what another version had first, where that was another thing."""
    now = brief(cell)
    return now if before is None or kind(before) == kind(cell) else f"{brief(before)} → {now}"


def kind(cell: dict[str, str]) -> tuple[str, bool]:
    """What two versions must share to be said once."""
    return cell["state"], "NaN" in cell["shown"]


def brief(cell: dict[str, str]) -> str:
    """`ok`, `ok to 1e-04`, `WRONG 0.69`, `FAIL: its words`."""
    what = cell["shown"].partition(": ")[2]
    gap = cell["shown"].removeprefix("equal (").removesuffix(")")
    near = cell["state"] != "works" or float(gap) <= asking.NEAR
    told = {
        "works": "ok" if near else f"ok to {gap}",
        "untested": "untested",
        "wrong": f"**WRONG** {what}",
    }
    return told.get(cell["state"]) or f"FAIL {short(what)}"


def short(said: str) -> str:
    """The first words of a message, fit for a table."""
    said = re.sub(r"^((convert_hf_to_gguf.py|RuntimeError|llama_model_load): *)+", "", said)
    said = said.replace("|", "/").strip()
    return said if len(said) <= SHORT else said[: SHORT - 3] + "..."


def table(rows: Rows, names: list[str], before: Rows) -> str:
    """Markdown."""
    lines = [f"| output | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for output, row in rows.items():
        cells = [shown(row[client], before.get(output, {}).get(client)) for client in names]
        lines.append(f"| {output} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--only", default="")
    asked.add_argument("--clients", default=",".join(asking.SCRIPTS))
    asked.add_argument("--trained", action="store_true")
    asked.add_argument("--root", type=Path)
    asked.add_argument("--save", type=Path)
    asked.add_argument("--before", type=Path)
    told = asked.parse_args()
    names = told.clients.split(",")
    words = told.only.split(",")
    known = TRAINED if told.trained else OUTPUTS
    outputs = [o for o in known.values() if any(word in o.name for word in words)]
    rows: Rows = {}
    for some in [[o] for o in outputs] if told.trained else [outputs]:
        with tempfile.TemporaryDirectory() as scratch:
            rows |= measure(some, names, told.root or Path(scratch))
            if told.trained:
                print(
                    f"{some[0].name}: {asking.from_dense(some[0], Path(scratch)):.1e} of the dense"
                )
    if told.save:
        told.save.write_text(json.dumps(rows, indent=1))
    print(table(rows, names, json.loads(told.before.read_text()) if told.before else {}))
    for output, row in rows.items():
        for client, cell in row.items():
            if cell["state"] not in (cell["says"], "untested"):
                print(f"{output}, {client}: the data says {cell['says']}, measured {cell['shown']}")


if __name__ == "__main__":
    main()
