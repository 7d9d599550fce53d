"""The data of loaders: read strictly, whole over every format, and its rules."""

from __future__ import annotations

import json
import re

import pytest

from moetool.errors import MoetoolError
from moetool.methods.options import CLIENTS
from moetool.surgery import clients, forms
from moetool.surgery.clients import Assigned

INT4 = {"bits": 4, "group": 128}
INT8 = {"bits": 8, "group": 128}
MODELS = {"version": "1", "works": ["mixtral"]}
WRONG = {"state": "wrong", "known": "run", "why": "x"}


def test_the_loaders_are_those_that_quantize_may_be_told_of() -> None:
    assert tuple(clients.clients()) == CLIENTS


@pytest.mark.parametrize("loader", CLIENTS)
def test_every_format_has_a_verdict_of_every_loader(loader) -> None:
    asked = [forms.asked(word) for word in forms.formats()]
    assert len(asked) >= 30
    for one in asked:
        for moe in (False, True):
            given = clients.verdict(loader, one.form, one.params, moe=moe)
            assert given.state in clients.STATES and given.version
            assert given.works or given.why
            cases = clients.client(loader).forms
            assert one.form in cases or "*" in cases, f"{loader} says nothing of {one.form}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour"),
        ({"forms": {"a": [{"both": {"state": "works", "known": "run", "more": 1}}]}}, "more"),
        ({"forms": {"a": [{"both": {"state": "works", "known": "run"}, "if": {}}]}}, "if"),
        ({"forms": {"a": [{"both": {"state": "refuses", "known": "run"}}]}}, "reason"),
        ({"forms": {"a": [{"both": {"state": "works", "known": "run", "why": "x"}}]}}, "reason"),
        ({"forms": {"a": [{"both": {"state": "perhaps", "known": "run"}}]}}, "perhaps"),
        (
            {
                "rules": [
                    {"kind": "none", "state": "wrong", "forms": [], "why": "x", "known": "run"}
                ]
            },
            "none",
        ),
        (
            {
                "rules": [
                    {"kind": "whole", "state": "wrong", "forms": [], "why": "", "known": "run"}
                ]
            },
            "reason",
        ),
        (
            {
                "rules": [
                    {
                        "kind": "whole",
                        "state": "wrong",
                        "forms": [],
                        "why": "x",
                        "known": "run",
                        "y": 1,
                    }
                ]
            },
            "y",
        ),
        ({"models": MODELS | {"colour": 1}}, "colour"),
        ({"models": MODELS | {"works": ["mixtrall"]}}, "no family mixtrall"),
        (
            {"models": MODELS | {"families": {"dots1": {"state": "wrong", "known": "run"}}}},
            "reason",
        ),
        ({"models": MODELS | {"rules": [WRONG | {"families": ["dots1"]}]}}, "no condition"),
        ({"models": MODELS | {"rules": [WRONG | {"when": {"sillu": [True]}}]}}, "sillu"),
        ({"models": MODELS | {"rules": [WRONG | {"token": "a", "but": ["nobody"]}]}}, "nobody"),
        ({"models": MODELS | {"rules": [WRONG | {"token": "a", "told": "b"}]}}, "told"),
    ],
)
def test_what_is_not_known_is_an_error(tmp_path, change, said) -> None:
    path = tmp_path / "clients.json"
    entry = {"about": "a loader", "version": "1", "forms": {}, "models": MODELS}
    path.write_text(json.dumps({"one": entry}))
    assert clients.read(path)["one"].version == "1"
    path.write_text(json.dumps({"one": entry | change}))
    with pytest.raises(MoetoolError, match=said):
        clients.read(path)


def test_an_unknown_loader_names_the_nearest() -> None:
    with pytest.raises(MoetoolError, match=r"did you mean vllm\?"):
        clients.verdict("vlm", "packed_int", INT4, moe=True)


def test_what_nobody_tried_says_so() -> None:
    given = clients.verdict("transformers5", "no_such_form", {}, moe=True)
    assert (given.state, given.known) == ("untried", "untried") and not given.works


def _experts(form, params, name="a", **more) -> Assigned:
    return Assigned("experts", form, params, name=name, **more)


@pytest.mark.parametrize(
    ("loader", "scheme", "said"),
    [
        ("transformers5", [_experts("packed_int", INT4), Assigned("attn", "packed_int", INT8)], ""),
        ("transformers5", [_experts("packed_int", INT4), Assigned("attn", "full")], ""),
        (
            "transformers5",
            [_experts("packed_int", INT4), _experts("packed_int", INT8, "b")],
            "experts in two formats",
        ),
        (
            "transformers5",
            [_experts("full", {}, "x"), Assigned("attn", "packed_int", INT4)],
            r"experts left full beside packed_int attn \(x\)",
        ),
        ("transformers5", [_experts("full", {}), Assigned("attn", "nf4", {})], ""),
        (
            "transformers5",
            [_experts("full", {}, shape=(8, 32, 32)), Assigned("attn", "packed_int", INT4)],
            "",
        ),
        ("transformers5", [Assigned("embed", "nf4", {})], "does not read nf4 embed"),
        ("transformers5", [Assigned("embed", "bnb_int8", {})], "reads bnb_int8 embed"),
        ("transformers5", [Assigned("embed", "nvfp4", {})], "reads nvfp4 embed"),
        ("transformers5", [Assigned("embed", "mxfp8", {})], "reads mxfp8 embed"),
        (
            "transformers5",
            [_experts("full", {}, "x"), Assigned("attn", "nvfp4", {})],
            r"experts left full beside nvfp4 attn \(x\)",
        ),
        ("transformers5", [_experts("full", {}), Assigned("attn", "mxfp8", {})], ""),
        (
            "transformers5",
            [Assigned("embed", "packed_int", INT8)],
            "reads packed_int embed wrongly",
        ),
        ("transformers5", [Assigned("embed", "fp8_block", {})], "may not read fp8_block embed"),
        ("transformers5", [Assigned("lm_head", "packed_int", INT8)], ""),
        ("transformers5", [Assigned("lm_head", "bitnet", {})], "does not read bitnet lm_head"),
        ("transformers5", [_experts("full", {}), Assigned("attn", "fp8", {})], ""),
        ("transformers5", [Assigned("attn", "bitnet", {}, bias=True)], "bitnet attn with a bias"),
        ("transformers5", [_experts("nvfp4", {})], "reads nvfp4 experts"),
        ("transformers5", [Assigned("attn", "nvfp4", {})], ""),
        (
            "transformers5",
            [Assigned("attn", "nvfp4", {}, dtype="F16")],
            "does not read nvfp4 attn of a model in float16",
        ),
        ("transformers5", [Assigned("attn", "mxfp8", {}, dtype="BF16")], ""),
        ("transformers5", [_experts("mxfp4_packed", {}, dtype="F16")], ""),
        (
            "transformers4",
            [_experts("mxfp4_packed", {}, dtype="F32")],
            "does not read mxfp4_packed experts of a model in float32",
        ),
        (
            "transformers5",
            [Assigned("attn", "fp8_block", {"block": [128, 128]}, "fp8-block", "kv", (576, 512))],
            r"fp8-block attn kv \[576, 512\], which \[128, 128\] does not divide",
        ),
        (
            "transformers5",
            [Assigned("attn", "fp8_block", {"block": [128, 128]}, shape=(256, 512))],
            "",
        ),
        ("transformers4", [_experts("packed_int", INT4), _experts("packed_int", INT8)], ""),
        (
            "vllm",
            [_experts("packed_int", INT4, layer=0), _experts("packed_int", INT8, layer=1)],
            "",
        ),
        (
            "vllm",
            [_experts("packed_int", INT4, layer=3), _experts("packed_int", INT8, layer=3)],
            "experts of layer 3 in two formats",
        ),
        ("vllm", [_experts("packed_int", {"bits": 3, "group": 128})], "4 or 8 bits"),
        ("vllm", [Assigned("attn", "packed_int", {"bits": 3, "group": 128})], ""),
        ("llama.cpp", [Assigned("attn", "packed_int", INT4, "int4/128")], "GGUF files alone"),
    ],
)
def test_what_is_written_together_is_held_against_the_rules(loader, scheme, said) -> None:
    found = clients.refusals(loader, scheme)
    assert len(found) == bool(said)
    assert not said or re.search(said, found[0].said), found


def test_a_reason_stands_once_however_many_matrices_there_are() -> None:
    scheme = [_experts("nvfp4", {}, str(n)) for n in range(400)]
    (found,) = clients.refusals("transformers5", scheme)
    assert found.state == "wrong" and "tried with transformers 5" in found.said
