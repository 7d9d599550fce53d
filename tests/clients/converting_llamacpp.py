"""Runs llama.cpp's own convert_hf_to_gguf.py over many models in one process.

    python converting_llamacpp.py JOBS.json FOLDER

JOBS: {name: {"model": folder, "script": convert_hf_to_gguf.py, "file": out.gguf}}. What it said goes
to FOLDER/name.json. It knows tokenizers by a hash: of those with less than 1,000 tokens it is told
that they are GPT-2's, and the same where it would read a tokenizer.model. All else is stock.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

KEPT: list[str] = []
TOY = 1000


class Kept(logging.Handler):
    """What was said last, because the script exits with 1 and no word."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            KEPT.append(record.getMessage())


def know_toys(script: str) -> None:
    """Let toy tokenizers pass where the model's own would pass."""
    sys.path.insert(0, str(Path(script).parent))
    sys.path.insert(1, str(Path(script).parent / "gguf-py"))
    from conversion.base import TextModel

    known, pieces = TextModel.get_vocab_base_pre, TextModel._set_vocab_sentencepiece

    def toy(self: Any) -> bool:
        return self.hparams.get("vocab_size", TOY) < TOY

    def before(self: Any, tokenizer: Any) -> str:
        return "gpt-2" if toy(self) else known(self, tokenizer)

    def vocabulary(self: Any, add_to_gguf: bool = True) -> Any:
        if not (Path(self.dir_model) / "tokenizer.model").exists():
            raise FileNotFoundError("tokenizer.model")  # as it would, where sentencepiece is there
        if not toy(self):
            return pieces(self, add_to_gguf)
        return self._set_vocab_gpt2()

    TextModel.get_vocab_base_pre, TextModel._set_vocab_sentencepiece = before, vocabulary


def forget() -> None:
    """Nothing of the model before: its classes keep experts that were not merged."""
    from conversion.base import TextModel

    kinds = [TextModel]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        vars(kind).get("_experts_cache", {}).clear()


def convert(job: dict[str, str]) -> None:
    sys.argv = [job["script"], job["model"], "--outfile", job["file"], "--outtype", "f32"]
    # or a folder that is named after a model gets that model's special case
    sys.argv += ["--model-name", "toy"]
    runpy.run_path(job["script"], run_name="__main__")


def main() -> None:
    jobs, folder = map(Path, sys.argv[1:])
    asked = json.loads(jobs.read_text())
    know_toys(next(iter(asked.values()))["script"])
    logging.getLogger().addHandler(Kept())
    for name, job in asked.items():
        said = ""
        KEPT.clear()
        forget()
        try:
            convert(job)
        except (Exception, SystemExit) as problem:  # noqa: BLE001 - it is what we ask for
            said = f"{type(problem).__name__}: {problem} {' '.join(KEPT[-1:])}".strip()
        Path(folder, f"{name}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
