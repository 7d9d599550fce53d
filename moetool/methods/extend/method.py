"""moetool extend: a mixture of experts with more experts, copies of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from moetool.methods.contract import (
    Decisions,
    Line,
    Made,
    Method,
    Report,
    Settings,
    Summary,
)
from moetool.methods.extend.options import AUTO, Extending
from moetool.methods.options import Gate
from moetool.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moetool.methods.extend.facts import Extended


class Extend(Method):
    """Add copies of experts to a mixture of experts, as room for something new: train them, and
    what the others know stays. Every old expert moves byte for byte.

    MoExtend (arXiv 2408.03511) adds one to the layers whose routing shifts most on the new text, a
    copy of the most used expert with its router row. A copy takes the slot of another expert, so
    the model computes something else until it is trained; --text FILE says by how much.
    """

    Options = Extending
    interruptible = True
    examples = (
        "moetool extend demo bigger --copy-expert 0",
        "moetool extend SRC OUT --stats stats/ --layers auto",
        "moetool extend SRC OUT --calibrate new.jsonl --copies 2 --text test.jsonl",
    )
    options: Extending

    @property
    def gate(self) -> Gate | None:
        return self.options if self.options.gated or self.options.text else None

    def decide(self, sources: Sequence[Checkpoint], settings: Settings) -> Decisions:
        """Which experts are copied, in which layers."""
        from moetool.methods.extend import choose, cut, look
        from moetool.methods.reduce.decide import mixture_of

        mixture = mixture_of(sources[0])
        cut.check_calibration(mixture, self.options.calibration)
        seen = look.look(mixture, self.options, settings)
        copies = choose.choose(mixture, self.options, seen)
        return look.Used(memory=seen.evidence.memory, chosen=copies.as_json(), seen=seen)

    def plan(self, sources: Sequence[Checkpoint], decisions: Decisions, settings: Settings) -> Made:
        """Old experts byte for byte, and copies of some."""
        from moetool.methods.extend import cut, facts
        from moetool.methods.extend.choose import Copies
        from moetool.methods.extend.look import Usage, Used
        from moetool.methods.reduce.writing import Writing
        from moetool.surgery import reform, shim
        from moetool.surgery.experts import Mixture

        mixture, router = Mixture.of(sources[0]), self.options.router
        copies = Copies.from_json(decisions.chosen)
        copies.check(mixture)
        cut.check_router(mixture, copies, router)
        writing = Writing(mixture, cut.decided(mixture, copies), {}, (), settings)
        held = cut.calibration(mixture, copies, self.options.calibration)
        cutter = cut.Extender(writing, router, held)
        plan = cutter.plan(self.options.form)
        seen = decisions.seen if isinstance(decisions, Used) else Usage()
        return Made(
            plan,
            cut.certificate(mixture, copies, router),
            plan.config,
            {},
            facts.of(writing, copies, cutter, plan, seen),
            (*seen.evidence.warnings, *reform.widened(sources, plan, self.options.form)),
            shim.beside(plan.config),
        )

    def lines(self, summary: Summary) -> list[Line]:
        return _extended(summary).lines()

    def card(self, report: Report) -> list[str]:
        facts = _extended(report)
        how = "the most used on the text" if self.options.copy_expert == AUTO else "as named"
        return [
            f"{facts.counted}: copies of experts ({how}), each with its expert's router row; "
            "every old expert is byte for byte"
        ]


def _extended(summary: Summary) -> Extended:
    return cast("Extended", summary.facts)
