"""Tokenizers in GGUF files: tokens, kinds, merges, special tokens and the rules that cut text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import SpecialVocab, TokenType
from surgery import tokenizers_by_hand as by_hand

from moetool.errors import MoetoolError
from moetool.surgery.gguf import tokenizer
from moetool.surgery.layout import DATA

TESTBED_RULES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def fields(folder: Path, count: int, config: dict[str, Any] | None = None) -> dict[str, Any]:
    return {f.key: f.value for f in tokenizer.read(folder, count, config or {}).fields}


def test_a_bpe_over_bytes(tmp_path: Path) -> None:
    made = by_hand.of_bytes(None)
    by_hand.save(made, tmp_path, bos_token="<|end|>", eos_token={"content": "<|end|>"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    count = made.get_vocab_size() + 3
    found = fields(tmp_path, count, {"pad_token_id": 1})
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    for text, number in made.get_vocab().items():
        assert tokens[number] == text
    assert tokens[-1] == f"[PAD{count - 1}]" and kinds[-3:] == [TokenType.UNUSED] * 3
    said = {tokens[i]: TokenType(k).name for i, k in enumerate(kinds[:-3]) if k != 1}
    assert said == {"<|end|>": "CONTROL", "<|im_start|>": "CONTROL", "<tool>": "USER_DEFINED"}
    theirs = SpecialVocab(tmp_path, load_merges=True)
    assert found["tokenizer.ggml.merges"] == theirs.merges
    assert found["tokenizer.ggml.bos_token_id"] == theirs.special_token_ids["bos"] == 0
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.padding_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_a_bpe_over_characters(tmp_path: Path) -> None:
    made = by_hand.of_characters()
    by_hand.save(made, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = fields(tmp_path, made.get_vocab_size())
    assert found["tokenizer.ggml.model"] == "llama"
    kinds, scores = found["tokenizer.ggml.token_type"], found["tokenizer.ggml.scores"]
    assert [TokenType(k).name for k in kinds[:4]] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert kinds.count(TokenType.BYTE) == 256
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    numbers = [made.token_to_id("".join(pair)) for pair in merges]
    assert [scores[n] for n in numbers] == sorted((scores[n] for n in numbers), reverse=True)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("rule", "ignores", "name"),
    [
        (None, False, "gpt-2"),
        (by_hand.QWEN2, False, "qwen2"),
        (by_hand.LLAMA3, True, "llama-bpe"),
        (by_hand.LLAMA3, False, "smaug-bpe"),
        (r"\w+", False, ""),
        (None, True, ""),
    ],
)
def test_rules_that_cut_text(tmp_path: Path, rule: str | None, ignores: bool, name: str) -> None:
    by_hand.save(by_hand.of_bytes(rule), tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["ignore_merges"] = ignores
    path.write_text(json.dumps(data))
    assert tokenizer.pre_tokenizer(data) == name
    read = tokenizer.read(tmp_path, 500, {})
    written = {f.key: f.value for f in read.fields}["tokenizer.ggml.pre"]
    assert written == (name or "default")
    assert [("`default` was written" in w) for w in read.warnings] == ([] if name else [True])


def test_the_rules_that_are_known_are_whole() -> None:
    known = json.loads((DATA / "gguf_pre.json").read_text(encoding="utf-8"))
    assert [set(k) for k in known] == [{"name", "ignore_merges", "rules"}] * len(known)
    assert len({(tuple(k["rules"]), k["ignore_merges"]) for k in known}) == len(known) == 8
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, TESTBED_RULES]}
    made = {"pre_tokenizer": steps, "model": {"ignore_merges": False}, "normalizer": None}
    assert tokenizer.pre_tokenizer(made) == "smollm"
    assert tokenizer.pre_tokenizer(made | {"normalizer": {"type": "NFKC"}}) == ""


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    read = tokenizer.read(tmp_path, 10, {})
    assert [f.value for f in read.fields] == ["none"]
    assert "no tokenizer.json" in read.warnings[0]


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    by_hand.save(by_hand.of_bytes(None), tmp_path)
    with pytest.raises(MoetoolError, match="none that a GGUF file can hold") as caught:
        tokenizer.read(tmp_path, 100, {})
    assert caught.value.where["expected"] == "at most 100 tokens, as the config says"
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(MoetoolError, match="none that a GGUF file can hold"):
        tokenizer.read(tmp_path, 100, {})


def test_a_space_in_a_merge(tmp_path: Path) -> None:
    """As the package writes it: a space inside a part is the byte's own letter."""
    data = {"model": {"type": "BPE", "vocab": {"a b": 0}, "merges": [["a ", "b"]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert fields(tmp_path, 1)["tokenizer.ggml.merges"] == ["aĠ b"]
    assert SpecialVocab(tmp_path, load_merges=True).merges == ["aĠ b"]
