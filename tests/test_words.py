"""Sizes, shares and times as people write them; errors as people read them."""

from __future__ import annotations

import json
import pickle

import pytest

from moetool import errors, units
from moetool.errors import (
    MoetoolError,
    Stopped,
    Unfit,
    UsageError,
    VerificationFailed,
    did_you_mean,
)

SIZES = {
    "1": 1,
    " 12 B ": 12,
    "1k": 1000,
    "1KB": 1000,
    "1KiB": 1024,
    "1.5 MiB": 1_572_864,
    "2gb": 2 * 10**9,
    "0.5GiB": 2**29,
    "3T": 3 * 10**12,
    "1TiB": 2**40,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text: str) -> None:
    assert units.parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "B", "-1", "1 G B", "1e9", "1,000", "two", "0", "0.0GB", "1PB", "NaN", "1.5.2k"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as refused:
        units.parse_bytes(text)
    assert repr(text) in str(refused.value) and "2GB" in refused.value.hint


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (10**6, "1 MB"),
        (65_400_000, "65.4 MB"),
        (5 * 10**9, "5 GB"),
        (12_500_000_000, "12.5 GB"),
        (3.2e12, "3.2 TB"),
        (-2e6, "-2 MB"),
    ],
)
def test_shown_bytes(count: float, shown: str) -> None:
    assert units.show_bytes(count) == shown


@pytest.mark.parametrize("text", ["1B", "2kB", "3MB", "45MB", "6GB", "7TB"])
def test_what_is_shown_can_be_read(text: str) -> None:
    assert units.parse_bytes(units.show_bytes(units.parse_bytes(text))) == units.parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 K"),
        (853_100, "853.1 K"),
        (7e9, "7.0 B"),
        (1e12, "1.0 T"),
    ],
)
def test_shown_counts(count: float, shown: str) -> None:
    assert units.show_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0s"),
        (59.94, "59.9s"),
        (60, "1m00s"),
        (119.6, "2m00s"),
        (3599.4, "59m59s"),
        (3600, "1h00m"),
        (90_000, "25h00m"),
    ],
)
def test_shown_seconds(seconds: float, shown: str) -> None:
    assert units.show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("25%", 0.25),
        ("0.25", 0.25),
        (0.25, 0.25),
        (" 2 % ", 0.02),
        ("100%", 1.0),
        ("1e-3", 1e-3),
        (".5", 0.5),
        (1, 1.0),
        ("0%", 0.0),
    ],
)
def test_shares(text: str | float, share: float) -> None:
    assert units.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "a quarter", "25 percent", "-1%", "nan", "inf", "1/4"])
def test_no_shares(text: str) -> None:
    with pytest.raises(UsageError):
        units.parse_share(text)


KINDS = {MoetoolError: 1, Unfit: 1, UsageError: 2, Stopped: 3, VerificationFailed: 4}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_a_paragraph_and_a_dictionary(kind: type[MoetoolError]) -> None:
    problem = kind("it broke", hint="mend it", file="a.bin", tensor="x", expected=3, found=None)
    assert str(problem) == "it broke\n  file: a.bin\n  tensor: x\n  expected: 3\n  next: mend it"
    assert problem.as_dict() == {
        "error": kind.__name__,
        "message": "it broke",
        "file": "a.bin",
        "tensor": "x",
        "expected": "3",
        "hint": "mend it",
        "exit_code": KINDS[kind],
    }
    assert json.loads(json.dumps(problem.as_dict()))["exit_code"] == kind.exit_code
    assert isinstance(problem, MoetoolError)


def test_without_facts_it_is_the_message() -> None:
    assert str(MoetoolError("it broke")) == "it broke"


def test_every_kind_is_in_the_table() -> None:
    """The module's own docstring lists them with their codes, and so does README."""
    kinds = {
        k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, MoetoolError)
    }
    assert kinds == set(KINDS)
    for kind, code in KINDS.items():
        assert kind.exit_code == code and kind.__name__ in (errors.__doc__ or "")


def test_a_worker_can_send_an_error_home() -> None:
    """Ray pickles what a worker raises."""
    back = pickle.loads(pickle.dumps(VerificationFailed("bytes differ", hint="look", file="f")))
    assert type(back) is VerificationFailed and back.message == "bytes differ"
    assert back.hint == "look" and back.where == {"file": "f"}


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("upcicle", ["upcycle", "prune"], "did you mean upcycle?"),
        ("reax", ["ream", "reap", "naee"], "did you mean reap or ream?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("", ["x"], "known: x"),
    ],
)
def test_did_you_mean(word: str, known: list[str], said: str) -> None:
    assert did_you_mean(word, known) == said
