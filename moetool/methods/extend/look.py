"""What text says of experts before one is copied: how much each is used, and where routing shifted
(MoExtend, arXiv 2408.03511, section 3.3; the frequencies of the top-k choices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetool.errors import UsageError
from moetool.methods.contract import Decisions
from moetool.methods.reduce.asked import Evidence, calibration
from moetool.methods.reduce.decide import TORCH_RESERVE, evidence

if TYPE_CHECKING:
    import numpy as np

    from moetool.forward.stats import Profile
    from moetool.methods.contract import Settings
    from moetool.methods.extend.options import Extending
    from moetool.surgery.experts import Mixture


@dataclass(frozen=True)
class Usage:
    """`shares[layer]` [experts]: of a layer's choices, those that fell on each expert; `scores`:
    by which --layers auto takes layers. Both empty where nobody looked.
    """

    shares: Mapping[int, np.ndarray] = field(default_factory=dict)
    scores: Mapping[int, float] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True)
class Used(Decisions):
    """Decisions with what was seen on the way."""

    seen: Usage = field(default_factory=Usage)


def look(mixture: Mixture, options: Extending, settings: Settings) -> Usage:
    """Use of the experts on --stats or --calibrate. UsageError for a profile of another model."""
    if not options.looks:
        return Usage()
    found = _profile(mixture, options, settings)
    assert found.profile is not None
    shares = _shares(found.profile, mixture)
    before = None
    if options.before:
        before = _shares(_of_before(options.before, mixture), mixture)
    scores = {n: _score(row, before[n] if before else None) for n, row in shares.items()}
    return Usage(shares, scores, found)


def _profile(mixture: Mixture, options: Extending, settings: Settings) -> Evidence:
    from moetool.forward import profile as profiling
    from moetool.forward.stats import Profile, Wanted

    if options.stats:
        profile = Profile.open(options.stats)
        profile.check_model(mixture.source)
        return evidence(profile, TORCH_RESERVE)
    source, folder = mixture.source, Path(settings.work) / "stats"
    how = profiling.Making(
        folder, True, 0, settings.memory, settings.device, settings.tell, settings.stop
    )
    told = calibration(options, settings)
    made = profiling.make(source, source.folder, told, Wanted(1), how)
    return evidence(made, made.facts["peak_memory"])


def _of_before(folder: str, mixture: Mixture) -> Profile:
    """A profile to compare with: of the same experts, whatever their routers were."""
    from moetool.forward.stats import Profile

    profile = Profile.open(folder)
    known = (profile.facts["experts"], tuple(profile.facts["layers"]))
    if known != (mixture.experts, mixture.layers):
        raise UsageError(
            "the statistics of before are of a model with other experts",
            file=folder,
            expected=f"{mixture.experts} experts in {len(mixture.layers)} layers",
            found=f"{known[0]} experts in {len(known[1])} layers",
            hint="give the profile of this model on the old text, or of the one it was tuned from",
        )
    return profile


def _shares(profile: Profile, mixture: Mixture) -> dict[int, np.ndarray]:
    counts = {n: profile.layer(n).total("count")[: mixture.experts] for n in mixture.layers}
    return {n: count / max(1.0, float(count.sum())) for n, count in counts.items()}


def _score(shares: np.ndarray, before: np.ndarray | None) -> float:
    """The standard deviation over experts of how much their use changed; without a before, of
    their use itself (from an even one, the same number).
    """
    return float((shares if before is None else shares - before).std())
