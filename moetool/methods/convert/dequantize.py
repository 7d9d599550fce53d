"""moetool dequantize: every matrix of a quantized checkpoint in full again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.methods.contract import (
    Builder,
    Certificate,
    Decisions,
    Line,
    Made,
    Method,
    ModelFacts,
    Settings,
    Summary,
)
from moetool.methods.convert import layout, lie
from moetool.methods.field import WHAT
from moetool.methods.options import Served, option
from moetool.surgery import forms, groups, reform
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.experts import Mixture
from moetool.surgery.plain_experts import PlainExperts
from moetool.surgery.plan import Outputs, Plan
from moetool.surgery.spec import Stored, whole
from moetool.surgery.text_model import text_model

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Dequantizing(Served):
    """The options of dequantize."""

    dtype: str = option(
        "auto",
        "how decoded matrices are stored; auto: as the config says",
        WHAT,
        choices=("auto", *_DTYPES),
    )


class Dequantize(Method):
    """Write every matrix of a quantized checkpoint in full again; all other tensors move byte for
    byte.
    """

    Options = Dequantizing
    examples = (
        "moetool dequantize small full",
        "moetool dequantize small full --dtype float32",
        "moetool dequantize small full --dry-run",
    )
    options: Dequantizing
    lays = True

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Nothing to decide."""
        return Decisions()

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Matrices decoded, everything else as it is."""
        (source,) = sources
        if not source.told:
            raise MoetoolError(
                "nothing in this checkpoint is quantized",
                file=source.folder,
                hint="`moetool quantize` does it; `moetool inspect` says what is there",
            )
        other = lie.other(self.options, source)
        build = layout.laid(PlainExperts.of(source), other, self._dtype) if other else Builder()
        for name, stored in source.tensors.items() if not other else ():
            build.copy(whole(stored), whole(build.target(name, self._dtype(stored), stored.shape)))
        config = _told(source.config, self.options.dtype)
        wanted = Outputs(config, build.targets, build.tasks, {})
        plan = reform.plan([source], wanted, max_shard=settings.max_shard, form="full")
        return Made(plan, self._certificate(source), plan.config, {}, _facts(source, plan))

    def _certificate(self, source: Checkpoint) -> Certificate:
        """Exact where everything only moves."""
        held = sorted({self._dtype(t) for t in source.tensors.values() if t.parts})
        if self.options.dtype == "auto" and all(map(forms.lies_plain, source.tensors.values())):
            return Certificate("exact", "only names and places change")
        why = f"decoded values fit {' and '.join(held)}, to which others are rounded"
        return Certificate("exact_if", why)

    def _dtype(self, stored: Stored) -> str:
        """How a tensor is written."""
        asked = stored.parts and self.options.dtype != "auto"
        return _DTYPES[self.options.dtype] if asked else stored.dtype

    def lines(self, summary: Summary) -> list[Line]:
        """The family, the experts, and how many parameters run."""
        return ModelFacts.of(summary.facts).lines()


def _told(config: JsonObject, dtype: str) -> JsonObject:
    """The config, naming the dtype of the decoded matrices where that was asked for."""
    if dtype == "auto":
        return config
    made = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            made[key] = dtype
        elif isinstance(value, dict):
            made[key] = _told(value, dtype)
    return made


def _facts(source: Checkpoint, plan: Plan) -> ModelFacts:
    at = text_model(source.config)
    mixture = Mixture.of(source) if at.layout.kind == "moe" else None
    family = groups.name_of(source.config, at.layout.model_type)
    return ModelFacts(
        source_type=family,
        target_type=family,
        layers=mixture.layers if mixture else (),
        experts=mixture.experts if mixture else 0,
        top_k=mixture.top_k if mixture else 0,
        expert_width=mixture.width(mixture.layers[0]) if mixture else 0,
        layout="full",
        parameters=plan.parameters,
        active_parameters=plan.active_parameters,
    )
