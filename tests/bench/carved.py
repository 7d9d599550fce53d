"""What a carve is worth: `python tests/bench/carved.py SRC TESTBED [--tokens 8192] [--keep 2,6,10]`.

An FFN in 16 parts of which two and a few run. KL from SRC in nats a token on 1,024 tokens of each
of the six held-out texts of the testbed, of the same runtime with other carves: the parts of
`--carve activation` (cmoe), and neurons in the order of the file, drawn, or clustered by their
gate rows with the shared parts drawn; whoever stands for a part is, as in cmoe, the one nearest its
mean (there: of the rows). Prints one table; a command, not a test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moetool
from moetool.kernels import cluster, draw, fires
from moetool.kernels.fires import Carved
from moetool.modeling.block import blocks

TEXTS = ("bible", "c", "french", "german", "kernel", "python")
SPLIT, SHARED, EACH = 16, 2, 1024


def other(law: str, gate: np.ndarray) -> Carved:
    """Another order of neurons. gate [width, hidden]."""
    width = len(gate)
    wide = width // SPLIT
    order = np.arange(width) if law == "contiguous" else draw.permutation(width, 0, "bench")
    if law == "kmeans":
        always, rest = order[: SHARED * wide], np.sort(order[SHARED * wide :])
        labels = cluster.balanced_kmeans(gate[rest], SPLIT - SHARED, 0)
        order = np.concatenate([always, rest[labels.argsort(kind="stable")]])
    groups = [order[: SHARED * wide]]
    for part in range(SHARED, SPLIT):
        mine = order[part * wide : (part + 1) * wide]
        rows = gate[mine] / np.linalg.norm(gate[mine], axis=1, keepdims=True)
        lead = int((rows @ rows.mean(0)).argmax())
        groups.append(np.concatenate([mine[lead : lead + 1], np.delete(mine, lead)]))
    return Carved(np.concatenate(groups), 0.0)


def made(source: str, out: str, law: str, said: argparse.Namespace) -> Any:
    """The model, carved by one law."""
    from moetool.methods.upcycle import firing

    class Other(firing.Watching):
        def solve(self, layer: int, block: Any) -> Any:
            gate = self.gate.numpy()
            fires.parts = lambda *_: other(law, gate)  # type: ignore[assignment]
            return super().solve(layer, block)

    kept, own = firing.Watching, fires.parts
    if law != "activation":
        firing.Watching = Other  # type: ignore[misc]
    try:
        moetool.upcycle(
            source,
            out,
            carve="activation",
            split=SPLIT,
            carve_shared=SHARED,
            top_k=2,
            calibrate=[f"{said.testbed}/text/calibration.jsonl"],
            tokens=said.tokens,
            seq_len=512,
            sync=False,
        )
    finally:
        firing.Watching, fires.parts = kept, own  # type: ignore[misc]
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def held_out(source: str, testbed: str) -> list[torch.Tensor]:
    """Two sequences of each text."""
    ids = []
    read = transformers.AutoTokenizer.from_pretrained(source)
    for name in TEXTS:
        lines = Path(testbed, "text", f"val.{name}.jsonl").read_text().splitlines()
        text = "\n\n".join(json.loads(line)["text"] for line in lines)[: 8 * EACH]
        ids.append(torch.tensor(read(text).input_ids[:EACH]).view(2, -1))
    return ids


@torch.no_grad()
def kl(model: Any, ids: list[torch.Tensor], before: list[torch.Tensor]) -> float:
    """Mean over tokens."""
    found = []
    for x, old in zip(ids, before, strict=True):
        new = model(x).logits.log_softmax(-1)
        found.append(float((old.exp() * (old - new)).sum(-1).mean()))
    return sum(found) / len(found)


def main() -> None:
    """The table."""
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("source")
    read.add_argument("testbed")
    read.add_argument("--tokens", type=int, default=8192)
    read.add_argument("--keep", default="2,6,10")
    said = read.parse_args()
    ids = held_out(said.source, said.testbed)
    stock = transformers.AutoModelForCausalLM.from_pretrained(said.source, dtype=torch.float32)
    with torch.no_grad():
        before = [stock.eval()(x).logits.log_softmax(-1) for x in ids]
    del stock
    keeps = [int(k) for k in said.keep.split(",")]
    print("| carve |", " | ".join(f"2 + {k} of 16" for k in keeps), "|", flush=True)
    for law in ("activation", "kmeans", "random", "contiguous"):
        with tempfile.TemporaryDirectory() as folder:
            model, row = made(said.source, f"{folder}/out", law, said), []
            for keep in keeps:
                for block in blocks(model):
                    for _, law_of in block.held:
                        law_of.top_k = keep
                row.append(f"{kl(model, ids, before):.3f}")
            print(f"| {law} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
