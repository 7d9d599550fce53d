"""Which layers hold experts: every way of every family, read and written, and against the models
that transformers builds.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest

from moetool.surgery import sites
from moetool.surgery.layout import DATA, Layout, families
from moetool.surgery.sites import CannotHold, Sites

OVERLAY = json.loads((DATA / "overlay.json").read_text())
DATA_OF = {name: entry["sites"] for name, entry in OVERLAY.items() if "sites" in entry}
WAYS = {
    "every": Sites(),
    "dense_list": sites.DenseList("dense", "step"),
    "list": sites.MoeList("moe", "step"),
    "dense_prefix": sites.DensePrefix("first"),
    "period": sites.Period(("period", "offset")),
    "types": sites.Types("types", "wide"),
    "range": sites.Range(("start", "end", "step")),
}
COUNT = 5
SETS = [
    chosen
    for size in range(1, COUNT + 1)
    for chosen in [*itertools.combinations(range(COUNT), size)]
]


# Values of each way's fields; between them they say every set of layers that the way can say.
FEW = range(COUNT + 1)
TEXTS: dict[str, list[dict[str, Any]]] = {
    "every": [{}],
    "dense_list": [{"dense": [*s], "step": n} for s, n in itertools.product([(), *SETS], FEW)],
    "list": [{"moe": [*s]} for s in SETS],
    "dense_prefix": [{"first": n} for n in FEW],
    "period": [{"period": n, "offset": m} for n, m in itertools.product(FEW, FEW)],
    "types": [{"types": ["sparse" if i in s else "dense" for i in range(COUNT)]} for s in SETS],
    "range": [
        {"start": n, "end": m, "step": k} for n, m, k in itertools.product(FEW, range(COUNT), FEW)
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_read_back(way: str) -> None:
    """Every set of layers that some config says is written so that it comes back whole; every
    other one is refused with a sentence.
    """
    sayable = {frozenset(WAYS[way].layers(text, COUNT)) for text in TEXTS[way]}
    for chosen in SETS:
        try:
            made = WAYS[way].fields(chosen, COUNT, 96)
        except CannotHold as problem:
            assert len(str(problem)) > 20 and frozenset(chosen) not in sayable, chosen
        else:
            assert frozenset(chosen) in sayable, chosen
            assert WAYS[way].layers(made, COUNT) == set(chosen), made


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_config_has_experts_everywhere(way: str) -> None:
    """A field that is absent or null takes nothing away."""
    assert WAYS[way].layers({}, COUNT) == set(range(COUNT))
    nothing = dict.fromkeys(("dense", "moe", "step", "first", "period", "offset", "types", "start"))
    assert WAYS[way].layers({**nothing, "end": None}, COUNT) == set(range(COUNT))
    assert WAYS[way].layers({}, 0) == set()


@pytest.mark.parametrize(
    ("way", "text", "layers"),
    [
        ("dense_list", {"dense": [1], "step": 2}, {3}),
        ("dense_list", {"dense": [], "step": 1}, {0, 1, 2, 3, 4}),
        ("dense_list", {"dense": [9]}, {0, 1, 2, 3, 4}),
        ("list", {"moe": [0, 3]}, {0, 3}),
        ("list", {"step": 2}, {1, 3}),
        ("list", {"moe": [], "step": 2}, set()),
        ("dense_prefix", {"first": 3}, {3, 4}),
        ("dense_prefix", {"first": 9}, set()),
        ("period", {"period": 2, "offset": 1}, {1, 3}),
        ("period", {"period": 3}, {0, 3}),
        ("types", {"types": ["dense", "sparse", "dense", "sparse", "sparse"]}, {1, 3, 4}),
        ("range", {"start": 1, "end": 3, "step": 1}, {1, 2, 3}),
        ("range", {"start": 1, "end": -1, "step": 1}, {1, 2, 3, 4}),
        ("range", {"start": 0, "end": 4, "step": 2}, {1, 3}),
    ],
)
def test_layers(way: str, text: dict[str, Any], layers: set[int]) -> None:
    assert WAYS[way].layers(text, COUNT) == layers


def test_the_width_of_dense_layers_is_said_where_it_is_a_field_of_its_own() -> None:
    assert WAYS["types"].fields((0, 1, 2, 3, 4), COUNT, 96) == {"types": ["sparse"] * 5}
    assert WAYS["types"].fields((1, 2, 3, 4), COUNT, 96)["wide"] == 96
    assert "wide" not in sites.Types("types").fields((1,), COUNT, 96)


@pytest.mark.parametrize(
    ("way", "layers", "word"),
    [
        ("every", (0, 1), "3 of 5 would stay dense"),
        ("dense_prefix", (0, 1), "last:N"),
        ("range", (0, 1, 4), "stride"),
        ("period", (0, 1, 4), "stride"),
    ],
)
def test_what_cannot_be_held_is_said(way: str, layers: tuple[int, ...], word: str) -> None:
    with pytest.raises(CannotHold, match=word):
        WAYS[way].fields(layers, COUNT, 96)


@pytest.mark.parametrize("name", DATA_OF)
def test_every_entry_is_one_way_and_every_key_is_read(name: str) -> None:
    """An entry's keys are the fields of its class; the config fields it names are the family's."""
    made = sites.read(DATA_OF[name])
    assert {f.name for f in fields(made) if getattr(made, f.name) is not None} == set(DATA_OF[name])
    known = Layout.load(name).defaults
    for part in filter(None, Layout.load(name).text_config.split(".")):
        known = known[part]
    for value in DATA_OF[name].values():
        assert {value} if isinstance(value, str) else set(value) <= set(known), name


def test_every_way_has_a_family() -> None:
    used = Counter(type(sites.read(entry)).__name__ for entry in DATA_OF.values())
    assert set(used) == {type(w).__name__ for w in WAYS.values()} - {"Sites"}
    assert sum(used.values()) == len(DATA_OF) >= 30
    assert type(sites.read(None)) is Sites


@pytest.mark.parametrize(
    "entry", [{}, {"surprise": "x"}, {"dense_prefix": "a", "surprise": "b"}, {"list": "moe"}]
)
def test_unknown_keys_are_errors(entry: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        sites.read(entry)


# Families of which no config field says which layers: a pattern string decides, each half of an
# encoder and decoder has its own stride, or the experts are no list of matrices.
UNSAID = {"doge", "nemotron_h", "nllb-moe", "switch_transformers", "vitpose_backbone"}


@pytest.mark.parametrize("name", families()["moe"])
def test_layers_are_those_of_transformers(name: str) -> None:
    """The layers that hold experts in the model that transformers builds, from the layout alone."""
    import warnings

    import transformers

    from moetool.archs import generate, model

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    layout = Layout.load(name)
    probe = generate.Probe.of(generate.Family.of(name, layout.cls))
    config = json.loads(probe.config.to_json_string(use_diff=False))
    disk = model.disk(model.meta(probe.family.cls, probe.config))
    found = [f for n in disk if (f := layout.match(n)) and f.layer is not None]
    there = {f.layer for f in found if re.match(r"expert\.", str(f.slot.role))}
    said = layout.moe_layers(config)
    assert (said == there) != (name in UNSAID)
