"""Make a profile: the walk with a `Profiler` looking on, into a folder that can be taken up again
after each layer.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moetool import atomic, lock, strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.forward import batches as batching
from moetool.forward import drawn, own, text
from moetool.forward.drawn import Drawn
from moetool.forward.own import ANYWHERE, Running
from moetool.forward.stats import SCHEMA, LayerStats, Profile, Wanted, layer_file
from moetool.lock import Lock
from moetool.progress import Progress, silent
from moetool.surgery import identity
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.text_model import text_model

FEW = 64  # an expert that saw fewer tokens than this is named in a warning


@dataclass(frozen=True)
class Calibration:
    """The text and how it is cut: what decides a profile's numbers. trusted: code that comes with
    the model may run for its tokenizer; option: the one that names the text.
    """

    specs: tuple[str, ...]
    cut: batching.Cut
    field: str = ""
    trusted: bool = False
    option: str = "calibrate"
    running: Running = ANYWHERE  # for text that the model writes itself

    def read(self, source: Checkpoint) -> batching.Batches:
        """Token batches for this model. Raises for bad files before anything is computed."""
        at = text_model(source.config)
        words = at.layout.text(at.config)
        longest = words.get("max_position_embeddings")
        vocab = int(at.layout.field("vocab", at.config) or words.get("vocab_size") or 1 << 31)
        corpora = text.read(self.specs, field=self.field, option=self.option)
        if any(isinstance(c.documents, Drawn) for c in corpora):
            ids = drawn.of(source.folder, source.config, vocab, trusted=self.trusted)
            known = {drawn.RANDOM: ids, drawn.OWN: own.of(source, ids, self.running)}
            corpora = [
                replace(c, documents=known[c.documents.name])
                if isinstance(c.documents, Drawn)
                else c
                for c in corpora
            ]
        made = batching.make(
            corpora,
            source.folder,
            self.cut,
            vocab=vocab,
            longest=longest if isinstance(longest, int) else None,
            trusted=self.trusted,
        )
        return replace(made, peak=own.needed(source) if drawn.OWN in made.drawn else 0)


def digest(source: Checkpoint, batches: batching.Batches, wanted: Wanted, extra: str = "") -> str:
    """Names everything that decides the numbers of a walk; a work folder with another digest is
    not taken up.
    """
    body = json.dumps(
        [
            SCHEMA,
            source.fingerprint(),
            identity.content(source),
            source.config,
            batches.digest,
            batches.seq_len,
            asdict(wanted),
            extra,
        ],
        sort_keys=True,
    )
    return hashlib.sha256(body.encode()).hexdigest()


def claim(folder: Path, seal: str) -> None:
    """Make `folder` the work folder of the walk with this digest: what another walk left there is
    removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "walk.json"
    if not mark.exists() or mark.read_text() != seal:
        for left in [
            *folder.glob("hidden-*"),
            *folder.glob("layer-*"),
            *folder.glob("solved-*"),
            *folder.glob("note-*"),
            *folder.glob("done.json"),
            *folder.glob("profile.json"),
        ]:
            left.unlink()
        atomic.write(mark, seal)


@dataclass(frozen=True)
class Making:
    """Where and how a profile is made. replace: the folder is a work folder, whose finished profile
    of something else goes; buffers: bytes that whoever decides on it holds beside a layer.
    """

    folder: Path
    replace: bool = False
    buffers: int = 0
    memory: int | None = None
    device: str = "cpu"
    tell: Progress = silent
    stop: threading.Event | None = None


def make(
    source: Checkpoint, name: str, calibration: Calibration, wanted: Wanted, how: Making
) -> Profile:
    """Profile a MoE that the user calls `name`; layers that an earlier run of the same command
    finished are kept. Returns the finished profile.

    Raises MoetoolError where the folder holds anything else.
    """
    begun = time.perf_counter()
    mixture = Mixture.of(source)
    batches = calibration.read(source)  # bad text is said before anything heavy is imported
    sample = min(wanted.sample, batches.total)
    wanted = replace(wanted, files=len(batches.files), sample=sample)
    seal = digest(source, batches, wanted)
    _check_folder(how, seal)
    with Lock.take(how.folder, "these statistics"):
        _check_folder(how, seal)  # somebody may have been here meanwhile
        claim(how.folder, seal)
        if not (how.folder / "profile.json").exists():
            facts = describe(name, mixture, batches, wanted, calibration)
            facts["peak_memory"] = max(batches.peak, _walk(mixture, batches, wanted, how))
            facts["seconds"] = round(time.perf_counter() - begun, 3)
            _finish(how.folder, mixture, facts, batches)
    return Profile.open(how.folder)


def _finish(folder: Path, mixture: Mixture, facts: JsonObject, batches: batching.Batches) -> None:
    """Seal the layers' files and write profile.json, last of all."""
    files = {str(n): identity.of_file(folder / layer_file(n)) for n in mixture.layers}
    warnings = [*batches.notes, *few_tokens(mixture, Profile(folder, {}).layer)]
    done = facts | {"layer_files": files, "warnings": warnings}
    atomic.write(folder / "profile.json", strict_json.text(done, indent=1, ascii=True) + "\n")
    for left in folder.glob("hidden-*"):
        left.unlink()


def _check_folder(how: Making, seal: str) -> None:
    """Refuse a folder that holds anything but this very profile, begun or done."""
    folder, mark = how.folder, how.folder / "walk.json"
    if folder.exists() and not mark.exists():
        strangers = [p.name for p in folder.iterdir() if not _is_ours(p.name)]
        if strangers:
            raise MoetoolError(
                "the folder for the statistics is not empty",
                file=folder,
                found=strangers[0],
                hint="choose another folder",
            )
    if (folder / "profile.json").exists() and not how.replace and mark.read_text() != seal:
        raise MoetoolError(
            "the folder holds the statistics of another model, text or setting",
            file=folder,
            hint="choose another folder, or remove this one",
        )


def _is_ours(name: str) -> bool:
    return name == lock.NAME or name.endswith(atomic.SUFFIX)


def _walk(mixture: Mixture, batches: batching.Batches, wanted: Wanted, how: Making) -> int:
    """Send the text through; returns the promised peak."""
    from moetool.forward.profiler import Profiler
    from moetool.forward.walk import Budget, Walk

    hidden = int(mixture.layout.field("hidden", mixture.text_model.config))
    held = wanted.memory(mixture.experts, hidden, mixture.width(mixture.layers[0])) + how.buffers
    walk = Walk(
        mixture.source,
        batches,
        Budget(how.memory, how.folder, how.device, extra=held),
        tell=how.tell,
        stop=how.stop,
        name="profile",
    )
    walk.run(Profiler(wanted, how.folder))
    walk.hidden.close()
    return walk.peak


def describe(
    name: str,
    mixture: Mixture,
    batches: batching.Batches,
    wanted: Wanted,
    calibration: Calibration,
) -> JsonObject:
    """profile.json, without what only a finished walk knows."""
    return {
        "schema": SCHEMA,
        "model": {
            "name": name,
            "family": mixture.layout.model_type,
            "files": mixture.source.fingerprint(),
            "content": identity.content(mixture.source),
        },
        "layers": list(mixture.layers),
        "experts": mixture.experts,
        "top_k": mixture.top_k,
        "tokens": batches.total,
        "files": batches.described,
        "data_sha256": batches.digest,
        "seq_len": batches.seq_len,
        "pack": calibration.cut.pack,
        "shuffle": calibration.cut.shuffle,
        "seed": calibration.cut.seed,
        "sample": wanted.sample,
        "dense": wanted.dense,
        "covariance": wanted.covariance,
    }


def few_tokens(mixture: Mixture, layer: Callable[[int], LayerStats], least: int = FEW) -> list[str]:
    """A warning when experts saw fewer than `least` tokens: what is said of them is chance."""
    found: list[tuple[int, int, int]] = []
    for number in mixture.layers:
        seen = layer(number).total("count")[: mixture.count_in(number)]
        found += [(number, int(e), int(seen[e])) for e in (seen < least).nonzero()[0]]
    if not found:
        return []
    number, expert, count = min(found, key=lambda f: f[2])
    return [
        f"{len(found)} experts saw fewer than {least} tokens (layer {number}, expert {expert}: {count}): give more text, or text of the kind they are for"
    ]


def domains(profile: Profile, names: Sequence[str]) -> list[JsonObject]:
    """For each file: its share of tokens, and how far its use of experts is from the mix's (total
    variation, mean over layers; 0 same, 1 disjoint).
    """
    apart = [0.0] * len(names)
    layers = profile.facts["layers"]
    for number in layers:
        count = profile.layer(number).count
        mix = count.sum(0) / max(1.0, count.sum())
        for i, row in enumerate(count):
            apart[i] += 0.5 * float(abs(row / max(1.0, row.sum()) - mix).sum()) / len(layers)
    total = max(1, profile.facts["tokens"])
    return [
        {"file": n, "share": f["tokens"] / total, "apart": a}
        for n, f, a in zip(names, profile.facts["files"], apart, strict=True)
    ]
