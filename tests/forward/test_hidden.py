"""Hidden states are the same in memory, spilled to a file, and taken up again by a later process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moetool.forward.batches import Batch
from moetool.forward.hidden import Hidden

WIDTH = 6
SIZES = [(2, 5), (1, 7), (3, 2)]  # sequences, length
DICE = np.random.default_rng(0)
BATCHES = [Batch(DICE.integers(0, 9, shape), np.full(shape[0], shape[1]), 0) for shape in SIZES]
KINDS = ["memory", "kept", "spilled"]


def rows(layer: int, number: int) -> np.ndarray:
    """What layer `layer` gives for a batch."""
    count = SIZES[number][0] * SIZES[number][1]
    return np.random.default_rng([layer, number]).standard_normal((count, WIDTH)).astype("<f4")


def hidden(kind: str, folder: Path) -> Hidden:
    return Hidden(
        BATCHES, WIDTH, folder=None if kind == "memory" else folder, spill=kind == "spilled"
    )


def layer_through(states: Hidden, layer: int, *, keep: bool) -> None:
    """Read everything, check it, write the next layer's input."""
    states.begin()
    for number in range(len(BATCHES)):
        assert (states.read(number) == rows(layer, number)).all(), (layer, number)
        states.write(number, rows(layer + 1, number))
    states.end(keep=keep)


def begun(kind: str, folder: Path) -> Hidden:
    states = hidden(kind, folder)
    assert states.resume() == 0
    states.first()
    for number in range(len(BATCHES)):
        states.write(number, rows(0, number))
    states.end(keep=kind == "kept")
    return states


@pytest.fixture(params=KINDS)
def states(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Hidden]]:
    made = begun(request.param, tmp_path / "work")
    yield request.param, made
    made.close()


def test_layers_follow_one_another(states: tuple[str, Hidden], tmp_path: Path) -> None:
    kind, made = states
    for layer in range(4):
        assert made.layer == layer
        layer_through(made, layer, keep=kind == "kept")
    assert made.layer == 4
    left = [p.name for p in (tmp_path / "work").glob("*")] if kind != "memory" else []
    assert left == ([] if kind == "memory" else ["hidden-00004.bin"]), "one layer lies on disk"


def test_batches_may_come_in_any_order(states: tuple[str, Hidden]) -> None:
    _, made = states
    made.begin()
    for number in (2, 0, 1):
        made.write(number, rows(1, number)) if made.spill else None
    if not made.spill:  # in memory the input is overwritten, so each is read first
        for number in (2, 0, 1):
            assert (made.read(number) == rows(0, number)).all()
            made.write(number, rows(1, number))
    made.end(keep=False)
    for number in (1, 2, 0):
        assert (made.read(number) == rows(1, number)).all()


@pytest.mark.parametrize("then", ["kept", "spilled"])
@pytest.mark.parametrize("first", ["kept", "spilled"])
def test_a_later_process_goes_on(first: str, then: str, tmp_path: Path) -> None:
    """Also with another --memory: what was spilled is read into memory, and the reverse."""
    folder = tmp_path / "work"
    made = begun(first, folder)
    layer_through(made, 0, keep=True)
    made.begin()  # killed in the middle of the second layer
    made.write(0, rows(2, 0))
    made.close()
    again = hidden(then, folder)
    assert again.resume() == 1
    assert [p.name for p in folder.iterdir()] == ["hidden-00001.bin"], "the half layer is swept"
    for layer in (1, 2):
        layer_through(again, layer, keep=True)
    again.clear()
    assert list(folder.iterdir()) == []


def test_a_file_of_another_size_is_not_taken_up(tmp_path: Path) -> None:
    """Another text, or a full disk."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "hidden-00003.bin").write_bytes(b"\0" * 12)
    assert hidden("kept", folder).resume() == 0 and list(folder.iterdir()) == []


def test_the_latest_whole_layer_counts(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    size = 4 * WIDTH * sum(a * b for a, b in SIZES)
    for layer, count in ((2, size), (5, size), (6, size - 4)):
        (folder / f"hidden-{layer:05d}.bin").write_bytes(bytes([layer]) * count)
    made = hidden("kept", folder)
    assert made.resume() == 5 and made.read(0).tobytes() == bytes([5]) * (4 * WIDTH * 10)
    assert [p.name for p in folder.iterdir()] == ["hidden-00005.bin"]


def test_without_a_folder_nothing_is_spilled() -> None:
    made = Hidden(BATCHES, WIDTH, folder=None, spill=True)
    assert not made.spill and made.resume() == 0
