"""Commands write the bytes that they wrote in 0.2.0: recorded sha256 of all tensors (`shared` has a
gate of 1e-20 instead of 0 since, and an idle width of 128).

Only commands in which no sum of floats decides a byte, so that the figures hold on every machine;
`python tests/bench/ten_commands.py OLD NEW` compares two checkouts on the others too.
"""

from __future__ import annotations

from pathlib import Path

from bench.ten_commands import COMMANDS, ROOT, Command, digest, run

RECORDED = {
    "copies": "d26a43ca061458073ebeb0897964b05b6a0e10eed94950d477da8b6ae5c77e2c",
    "groups": "39309c5beb15c6ba14e3aa4868836faf4de4f95d262fcc13cd296968d1dcd06b",
    "shared": "da7693b00023cc71e1c6473746a32faf38de813faa14e9af090e489381970b90",
    "permuted": "570f842bbcce07d59158ea7ccbe77ff9e3df6330def19818b9fe1d898247617c",
    "fused": "7e3be0ad45c4ca1d750ee944c3e0733760191315a479d87374b6527415794cec",
    "random": "dee89f3a324f5eb16183f0e10d00d2d23e7f4ff7913501333fd2078dd9234c86",
}
MORE = (
    Command("permuted", "upcycle", "demo", ("--diversify", "permute", "--router", "kaiming")),
    Command("fused", "convert-layout", "permuted", ("--to", "fused")),
    Command("random", "prune", "permuted", ("--ratio", "0.5", "--method", "random")),
)


def test_bytes_are_those_of_0_2_0(tmp_path: Path) -> None:
    commands = [*(c for c in COMMANDS if c.portable), *MORE]
    assert run(commands, tmp_path, ROOT) == RECORDED
    # A digest sees one changed byte of a tensor, and does not see the header's own words.
    path = next((tmp_path / "copies").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert digest(tmp_path / "copies") != RECORDED["copies"]
