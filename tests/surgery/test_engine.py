"""Bytes move right whichever way they go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tree

import moetool
from moetool.errors import MoetoolError
from moetool.surgery.mover import Copy, Mover


@pytest.fixture
def files(tmp_path: Path) -> tuple[int, int, bytes]:
    data = os.urandom(3_000_017)
    (tmp_path / "from").write_bytes(data)
    return (
        os.open(tmp_path / "from", os.O_RDONLY),
        os.open(tmp_path / "to", os.O_RDWR | os.O_CREAT),
        data,
    )


@pytest.mark.parametrize("rates", [{True: 1.0, False: 0.0}, {True: 0.0, False: 1.0}, {}])
def test_both_ways(rates: dict[bool, float], files: tuple[int, int, bytes]) -> None:
    source, target, data = files
    mover = Mover(target)
    mover._rates = dict(rates)
    mover.move(source, Copy("from", 1001, 77, 2_500_000, "U8"))
    assert os.pread(target, 2_500_000, 77) == data[1001 : 1001 + 2_500_000]


def test_fallback_where_the_kernel_refuses(
    files: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, data = files

    def refuse(*args: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    Mover(target).move(source, Copy("from", 0, 0, len(data), "U8"))
    assert os.pread(target, len(data), 0) == data


def test_a_real_error_is_not_swallowed(
    files: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        Mover(files[1]).move(files[0], Copy("from", 0, 0, 100, "U8"))


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_shrinks(kernel: bool, files: tuple[int, int, bytes]) -> None:
    mover = Mover(files[1])
    mover._rates = {kernel: 1.0, not kernel: 0.0}
    with pytest.raises(MoetoolError, match="shorter"):
        mover.move(files[0], Copy("from", 0, 0, len(files[2]) + 1, "U8"))


def test_copies_import_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = f"""
import sys, moetool
moetool.upcycle({str(llama)!r}, {str(tmp_path / "out")!r}, experts=4)
moetool.convert_layout({str(tmp_path / "out")!r}, {str(tmp_path / "fused")!r}, to="fused")
moetool.inspect({str(tmp_path / "fused")!r})
moetool.verify({str(tmp_path / "out")!r})
bad = [m for m in ("torch", "transformers", "sklearn", "scipy", "pydantic", "huggingface_hub") if m in sys.modules]
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_ray_writes_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    """A local cluster of two nodes: both work, and the result is the local engine's."""
    import ray
    from ray.cluster_utils import Cluster

    options = {"experts": 8, "split": 2, "top_k": 4, "max_shard": 60_000}
    (tmp_path / "local").mkdir()
    (tmp_path / "ray").mkdir()
    moetool.upcycle(str(llama), str(tmp_path / "local" / "out"), **options)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        report = moetool.upcycle(str(llama), str(tmp_path / "ray" / "out"), engine="ray", **options)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(report["ray_nodes"]) == 2
    a, b = tree(tmp_path / "local" / "out"), tree(tmp_path / "ray" / "out")
    assert {k for k in a if a[k] != b.get(k)} <= {
        "moetool.json",
        "README.md",
    } and a.keys() == b.keys()
    assert sum(k.endswith(".safetensors") for k in a) > 8


def test_unknown_engine(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(moetool.UsageError, match="'slurm' is not known"):
        moetool.upcycle(str(llama), str(tmp_path / "out"), engine="slurm")


def test_output_opens_in_safetensors_itself(models: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    moetool.upcycle(
        str(models("qwen3", dtype="bfloat16")), str(tmp_path / "out"), target="glm4_moe", experts=4
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as handle:
        names = list(handle.keys())
        assert len(names) > 60 and all(handle.get_tensor(n).isfinite().all() for n in names)
        assert (
            handle.get_tensor("model.layers.0.mlp.gate.e_score_correction_bias").dtype.itemsize == 4
        )
