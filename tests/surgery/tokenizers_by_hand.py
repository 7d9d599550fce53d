"""Small tokenizers of the kinds that models have, made by the `tokenizers` library."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = Path(__file__).parents[2] / "moetool" / "demo" / "text.txt"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def lines() -> list[str]:
    """What they are trained on."""
    return CORPUS.read_text(encoding="utf-8").splitlines()[:400]


def of_bytes(rule: str | None, size: int = 400) -> Tokenizer:
    """A BPE over bytes; `rule`: how text is cut (None: as GPT-2)."""
    made = Tokenizer(models.BPE())
    cut: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)
    if rule is not None:
        split = pre_tokenizers.Split(Regex(rule), "isolated")
        cut = pre_tokenizers.Sequence([split, cut])
    made.pre_tokenizer = cut
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>", "<|im_start|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(lines(), trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    return made


def of_characters(size: int = 600) -> Tokenizer:
    """A BPE over characters with bytes for unknown ones, as Llama 2's."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
    )
    words = chain.from_iterable(map(str.split, lines()))  # whole lines would take minutes
    made.train_from_iterator(("▁" + w for w in words), trainer)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def save(made: Tokenizer, folder: Path, **config: Any) -> None:
    """Beside a model, with its tokenizer_config.json. Bytes of a model over characters are no
    added tokens, only its first three are.
    """
    path = folder / "tokenizer.json"
    made.save(str(path))
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
