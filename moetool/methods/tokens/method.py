"""moetool add-tokens: rows for new tokens in embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moetool import atomic
from moetool.data import JsonObject
from moetool.errors import MoetoolError, UsageError
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    Method,
    Settings,
    Summary,
)
from moetool.methods.tokens import rows as making
from moetool.methods.tokens.options import GW, MEAN, AddingTokens
from moetool.methods.upcycle.own import kept
from moetool.surgery import reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.headers import WeightFiles
from moetool.surgery.plan import Outputs
from moetool.surgery.reform import Into
from moetool.surgery.spec import Piece, Stored, rows, whole
from moetool.surgery.vocabulary import Vocabulary
from moetool.units import show_count

if TYPE_CHECKING:
    import numpy as np

_FILE = "tokens.safetensors"
_RESERVE = 200_000_000  # numpy imported, and blocks of a table


@dataclass(frozen=True)
class Enlarged:
    """The facts of add-tokens. `loss` and `likeness` of --init gw: the plan's Gromov-Wasserstein
    loss (of distances over their mean), and the correlation of the new rows' distances with those
    of the vectors.
    """

    source_type: str
    target_type: str
    tokens_before: int
    tokens: int
    tables: tuple[str, ...]
    init: str
    parameters: int
    active_parameters: int
    loss: float | None = None
    likeness: float | None = None
    experts: int | None = None
    top_k: int | None = None
    expert_width: int | None = None

    def as_json(self) -> JsonObject:
        """The keys that stand in the report; what was not looked at is left out."""
        said = asdict(self) | {"tables": list(self.tables), "first_id": self.tokens_before}
        return {name: value for name, value in said.items() if value is not None}

    def lines(self) -> list[Line]:
        """As the screen says them."""
        ids = f"ids {self.tokens_before:,} to {self.tokens - 1:,}"
        how = f"{self.tokens_before:,} -> {self.tokens:,} of {self.source_type}: {ids}, by {self.init}"
        told = [Line("tokens", how), Line("parameters", show_count(self.parameters))]
        if self.likeness is None:
            return told
        like = f"distances among new rows correlate {self.likeness:.2f} with those of the vectors"
        return [*told, Line("geometry", f"{like} (Gromov-Wasserstein loss {self.loss:.3g})")]


class Coupled(NamedTuple):
    """Rows of each table, what is said of them, and the promised memory."""

    rows: dict[str, np.ndarray]
    report: JsonObject
    memory: int


class AddTokens(Method):
    """Add rows for new tokens to embeddings and head; all that is there stays byte for byte, and so
    do the answers of before.

    With the vectors of an image tokenizer, new rows stand to each other as these do, among the rows
    of text: a Gromov-Wasserstein plan (Peyré et al., ICML 2016; Dutt et al., arXiv 2503.22517).
    """

    Options = AddingTokens
    examples = (
        "moetool add-tokens demo more --tokens 64",
        "moetool add-tokens SRC OUT --vectors codebook.safetensors",
        "moetool add-tokens SRC OUT --tokens 8 --init mean --dry-run",
    )
    options: AddingTokens
    reads_groups = True

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Make the new rows, into a file of the work folder."""
        (source,) = sources
        found, said = Vocabulary.of(source), self.options
        folder = Path(settings.work, "tokens")
        folder.mkdir(parents=True, exist_ok=True)
        report: JsonObject = {}
        if said.way == GW:
            coupled = self._coupled(source, found, settings)
            made, report, needed = coupled.rows, coupled.report, coupled.memory
        else:
            count = self._count(settings)
            needed = _promised(max(prod(t.shape[1:]) for t in found.tables) * count, settings)
            each = ((t, making.spread(source, t)) for t in found.tables)
            made = {
                t.name: _even(s.mean, count)
                if said.way == MEAN
                else making.drawn(s, count, settings.seed)
                for t, s in each
            }
        _save(
            folder / _FILE, {t.name: made[t.name].reshape(-1, *t.shape[1:]) for t in found.tables}
        )
        extra = Checkpoint.seen(str(folder), {}, WeightFiles.read(folder, [_FILE]))
        return Decisions(report=report, memory=needed, extra=(extra,), chosen=report)

    def _count(self, settings: Settings) -> int:
        """How many tokens."""
        said = self.options
        return said.tokens or making.vectors(*self._file()).shape[0]

    def _file(self) -> tuple[Checkpoint, str]:
        """The file of vectors, and its path."""
        path = Path(self.options.vectors)
        if not path.is_file():
            raise UsageError(
                "--vectors names no file",
                file=str(path),
                expected="a .safetensors file",
                hint="give the file of the new tokens' vectors",
            )
        folder = path.resolve().parent
        read = WeightFiles.read(folder, [path.resolve().name])
        return Checkpoint.seen(str(folder), {}, read), str(path)

    def _coupled(self, source: Checkpoint, found: Vocabulary, settings: Settings) -> Coupled:
        """Rows by a Gromov-Wasserstein plan."""
        import numpy as np

        from moetool.kernels import gromov

        file, path = self._file()
        stored = making.vectors(file, path)
        first = found.embedding
        count = min(self.options.anchors, first.shape[0])
        needed = _promised(6 * stored.shape[0] * count, settings)
        chosen = making.anchors(source, first, count, settings.seed)
        points = file.numbers(whole(stored))
        if not np.isfinite(points).all():
            raise UsageError(
                "--vectors holds what is no number",
                file=path,
                tensor=stored.name,
                expected="finite numbers",
                found="NaN or inf",
                hint="save it again",
            )
        coupling = gromov.couple(points, making.picked(source, first, chosen))
        made = {
            t.name: making.placed(coupling.plan, making.picked(source, t, chosen))
            for t in found.tables
        }
        report = {
            "loss": float(f"{coupling.loss:.6g}"),
            "likeness": float(f"{making.likeness(points, made[first.name]):.6g}"),
        }
        return Coupled(made, report, needed)

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Tables with more rows, everything else as it is."""
        (source,), (extra,) = sources, decisions.extra
        found, build, into = Vocabulary.of(source), Builder(), dict[str, Into]()
        tables = {table.name for table in found.tables}
        for name in sorted(source.tensors):
            if name in tables:
                _longer(build, source.tensors[name], whole(extra.tensor(name), 1))
            else:
                into |= kept(build, source.tensors[name])
        count = found.count + extra.tensor(found.tables[0].name).shape[0]
        config = found.enlarged(source.config, count)
        wanted = Outputs(config, build.targets, build.tasks, {})
        plan = reform.plan((source, extra), wanted, max_shard=settings.max_shard, into=into)
        facts = Enlarged(
            source_type=str(source.config.get("model_type")),
            target_type=str(plan.config["model_type"]),
            tokens_before=found.count,
            tokens=count,
            tables=tuple(sorted(tables)),
            init=self.options.way,
            parameters=plan.parameters,
            active_parameters=plan.active_parameters,
            **decisions.chosen,
        )
        told = (f"the tokenizer has no words for ids {found.count:,} to {count - 1:,}",)
        why = "all that was there stays, byte for byte, and new tokens stand beside it"
        return Made(plan, Certificate("exact", why), plan.config, {}, facts, told)

    def lines(self, summary: Summary) -> list[Line]:
        """Tokens, parameters, and how like the new rows are to the vectors."""
        assert isinstance(summary.facts, Enlarged)
        return summary.facts.lines()


def _longer(build: Builder, table: Stored, more: Piece) -> None:
    """A table, and the new rows behind it."""
    count = table.shape[0] + more.shape[0]
    target = build.target(table.name, table.dtype, (count, *table.shape[1:]))
    build.copy(whole(table), rows(target, 0, table.shape[0]))
    build.task("affine", [more], [rows(target, table.shape[0], count)], scale=1.0)


def _even(row: np.ndarray, count: int) -> np.ndarray:
    import numpy as np

    return np.tile(row, (count, 1))


def _promised(numbers: int, settings: Settings) -> int:
    """Peak bytes of so many float64 numbers; refused when --memory is less."""
    needed = _RESERVE + 8 * numbers
    if settings.memory is not None and needed > settings.memory:
        raise MoetoolError(
            "the new rows do not fit into --memory",
            expected=f"at least {needed:,} bytes",
            found=f"{settings.memory:,} bytes",
            hint="raise --memory, or lower --anchors",
        )
    return needed


def _save(path: Path, made: dict[str, np.ndarray]) -> None:
    import numpy as np
    from safetensors.numpy import save

    data = save({n: np.ascontiguousarray(v, np.float32) for n, v in made.items()})
    with atomic.writing(path, keep_same=True) as temporary:
        temporary.write_bytes(data)
