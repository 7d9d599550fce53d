"""Fields read what people write, or name themselves; groups of fields become dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from moetool.errors import UsageError
from moetool.methods.field import FINE, WHAT, Field
from moetool.methods.options import Common, Gate, Solving, Text, build, fields, option, read, same

FLAG = Field("flag", bool, False, "a switch")
COUNT = Field("count", int, 3, "a number", minimum=1)
REAL = Field("real", float, 0.5, "a number")
SHARE = Field("ratio", float, 0.25, "a share", unit="share")
SIZE = Field("memory", int, None, "a size", unit="bytes")
WORD = Field("word", str, "auto", "a word")
CHOICE = Field("way", str, "auto", "a way", choices=("auto", "reap", "frequency"))
TEXTS = Field("text", tuple, (), "texts")
WHOLE = Field("from_", tuple, (), "models", unit="whole")


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        (FLAG, True, True),
        (FLAG, "true", True),
        (FLAG, "False", False),
        (COUNT, 7, 7),
        (COUNT, "7", 7),
        (COUNT, 7.0, 7),
        (REAL, 1, 1.0),
        (REAL, "1e-3", 0.001),
        (SHARE, "25%", 0.25),
        (SHARE, "2.5 %", 0.025),
        (SHARE, 0.5, 0.5),
        (SHARE, "1", 1.0),
        (SIZE, "2GB", 2 * 10**9),
        (SIZE, "64MiB", 64 * 2**20),
        (SIZE, 1000, 1000),
        (SIZE, None, None),
        (SIZE, "", None),
        (WORD, "anything", "anything"),
        (WORD, 7, "7"),
        (WORD, [0, 1, 1], "0,1,1"),
        (CHOICE, "reap", "reap"),
        (TEXTS, "a.txt", ("a.txt",)),
        (TEXTS, "a.txt,b.txt", ("a.txt", "b.txt")),
        (TEXTS, ["a,b.txt", "c"], ("a,b.txt", "c")),
        (TEXTS, ("a", "b"), ("a", "b")),
        (TEXTS, "", ()),
        (WHOLE, "from=a,b", ("from=a,b",)),
    ],
)
def test_what_fields_read(field: Field, given: object, value: object) -> None:
    found = field.read(given)
    assert found == value and type(found) is type(value)
    assert field.read(found) == found  # what was read is read again as it is


def test_a_comma_in_the_name_of_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise texts are joined by commas, as in 0.2.0."""
    files = Field("calibrate", tuple, (), "texts", unit="files")
    monkeypatch.chdir(tmp_path)
    assert files.read("a,b.txt") == ("a", "b.txt")
    (tmp_path / "a,b.txt").write_text("one text")
    assert files.read("a,b.txt") == ("a,b.txt",) == files.read(["a,b.txt"])
    assert files.read("a,b.txt:0.3") == ("a,b.txt:0.3",)


@pytest.mark.parametrize("field", [FLAG, COUNT, REAL, SHARE, WORD, CHOICE, TEXTS])
def test_a_default_reads_as_itself(field: Field) -> None:
    assert field.read(field.default) == field.default


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        (FLAG, "yes", "true or false"),
        (FLAG, 1, "true or false"),
        (FLAG, None, "true or false"),
        (COUNT, 0, "too small"),
        (COUNT, "x", "a whole number"),
        (COUNT, 1.5, "a whole number"),
        (COUNT, True, "a number"),
        (COUNT, [1], "a number"),
        (COUNT, float("nan"), "a whole number"),
        (REAL, "x", "finite number"),
        (REAL, "nan", "finite number"),
        (REAL, float("inf"), "finite number"),
        (SHARE, "half", "not a percentage"),
        (SHARE, "-1%", "not a percentage"),
        (SIZE, "lots", "not a size"),
        (SIZE, "0", "not a size"),
        (SIZE, {}, "a number"),
        (WORD, True, "text"),
        (WORD, {}, "text"),
        (CHOICE, "reep", "did you mean reap"),
        (CHOICE, "nothing like it", "known: auto, frequency, reap"),
        (TEXTS, 7, "list of texts"),
        (TEXTS, [7], "list of texts"),
    ],
)
def test_what_fields_refuse(field: Field, given: object, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        field.read(given)
    assert said in str(refused.value) and f"--{field.spelled}" in str(refused.value)
    assert refused.value.hint


def test_spelling() -> None:
    assert [f.spelled for f in (WHOLE, Field("total_sparsity", float, 0.0, ""))] == [
        "from",
        "total-sparsity",
    ]


@dataclass(frozen=True)
class Sample:
    """One of each."""

    count: int = option(2, "how many", WHAT, minimum=1)
    rate: float | None = option(None, "how fast", unit="share", was="speed")
    kind: Literal["a", "b"] = option("a", "which", choices=("a", "b"))
    names: tuple[str, ...] = option((), "who")
    asked: str = option("x", lambda: "said when asked", choices=lambda: ["x", "y"])
    seed: int = same(Common, "seed", default=7, help="another text")
    plain: int = 3  # no option


def test_fields_of_a_dataclass() -> None:
    found = {f.name: f for f in fields(Sample)}
    assert list(found) == ["count", "rate", "kind", "names", "asked", "seed"]
    assert [f.type for f in found.values()] == [int, float, str, tuple, str, int]
    assert (found["count"].panel, found["rate"].panel) == (WHAT, FINE)
    assert (found["asked"].help, found["asked"].choices) == ("said when asked", ("x", "y"))
    assert (found["seed"].default, found["seed"].help) == (7, "another text")
    assert found["seed"].panel == next(f.panel for f in fields(Common) if f.name == "seed")
    assert fields(Sample, ("way",))[0].of == ("way",)


@dataclass(frozen=True)
class Wrong:
    """No option can be a table."""

    table: dict[str, int] = option(None, "a table")  # noqa: RUF009


def test_an_option_has_a_plain_type() -> None:
    with pytest.raises(TypeError, match="an option cannot be"):
        fields(Wrong)


def test_build() -> None:
    assert build(Sample, {}, "it") == Sample()
    made = build(Sample, {"count": "4", "rate": "5%", "names": "a,b"}, "it")
    assert made == Sample(count=4, rate=0.05, names=("a", "b"))
    assert build(Sample, {"speed": 0.5}, "it").rate == 0.5  # by its older name
    with pytest.raises(UsageError, match="it has no option 'cuont'") as refused:
        build(Sample, {"cuont": 1}, "it")
    assert "count" in refused.value.hint


def test_read_by_any_spelling() -> None:
    known = fields(Common)
    assert read(known, {"max-shard-size": "1GB"}, "x") == {"max_shard_size": 10**9}
    assert read(known, {"max_shard": 5}, "x") == {"max_shard_size": 5}


def test_groups_do_not_share_a_name() -> None:
    names: list[str] = []
    for group in (Common, Text, Solving, Gate):
        names += [f.name for f in fields(group)]
    assert len(names) == len(set(names)) == 29
    assert all(f.help and not f.help.endswith(".") for f in fields(Common))


@pytest.mark.parametrize(
    ("gate", "gated"),
    [
        ({}, False),
        ({"max_kl": 0.1}, True),
        ({"max_perplexity_increase": 0.0}, True),
        ({"text": ("a",)}, False),
    ],
)
def test_when_a_gate_stands(gate: dict[str, Any], gated: bool) -> None:
    assert Gate(**gate).gated is gated
