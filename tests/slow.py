"""Which parts of the long batteries run by default; `pytest -m slow` runs the rest.

A battery is a parametrised test over every family, method or moment. Here stands what of it always
runs: words of the test's id (`test_prune[0.5-mixtral]` has `mixtral`). A new family or method is slow
until somebody names it here; a battery that is not named here runs whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# One of each kind: softmax; sigmoid with a bias and groups; stacked, interleaved, with biases.
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")

BATTERIES: dict[str, tuple[str, ...]] = {
    "archs/test_archs.py::test_generated_files_are_current": ("few",),
    "every/test_extend.py::test_extend": FAMILIES,
    "every/test_faults.py::test_kill_at_every_rename": ("before",),
    "every/test_faults.py::test_random_kills_and_resume": ("copies", "drop"),
    "every/test_faults.py::test_workers_and_hash_seeds_change_nothing": ("copies", "drop"),
    "every/test_memory.py::test_measured_within_promise": ("split", "kmeans"),
    "every/test_pairwise.py::test_pairwise": ("few",),
    "every/test_ragged.py::test_ragged": FAMILIES,
    "every/test_ragged_families.py::test_every_family_builds_them_or_says_why_not": FAMILIES,
    "every/test_reduce_faults.py::test_kill_at_every_rename": ("refit",),
    "every/test_reduce_faults.py::test_workers_and_hash_seeds_change_nothing": ("refit",),
    "every/test_reductions.py::test_merge": FAMILIES,
    "every/test_reductions.py::test_merge_methods": ("qwen3_moe", "deepseek_v3"),
    "every/test_reductions.py::test_prune": FAMILIES,
    "every/test_reductions.py::test_prune_methods": ("qwen3_moe", "gpt_oss"),
    "modeling/test_calibration.py::test_extended_models": ("mixtral",),
    "modeling/test_interop.py::test_peft_trains_the_attention_and_saves": ("lora",),
    "modeling/test_qlora.py::test_groups_stand_over_a_base_in_four_bits": ("lora",),
    "modeling/test_towers.py::test_exact_at_birth_and_what_experts_in_full_would_compute": (
        "bert",
        "clip",
        "dinov2",
        "distilbert",
        "llava",
        "opt",
        "t5",
        "vit",
    ),
}


def battery(node: str) -> str:
    """`tests/every/FILE.py::NAME[a-b]` -> `every/FILE.py::NAME`."""
    return node.partition("[")[0].removeprefix("tests/")


def is_slow(node: str) -> bool:
    """Whether a test is one of a battery's that do not run by default."""
    kept = BATTERIES.get(battery(node))
    words = node.partition("[")[2].rstrip("]").split("-")
    return kept is not None and not any(word in kept for word in words)


def faults(nodes: Iterable[str]) -> Sequence[str]:
    """What is wrong with the table, given all tests of a run: batteries that are not there, or of
    which nothing runs by default, or everything.
    """
    found: dict[str, set[bool]] = {name: set() for name in BATTERIES}
    for node in nodes:
        if battery(node) in found:
            found[battery(node)].add(is_slow(node))
    said = {0: "not there", 1: "all slow, or nothing"}
    return [f"{name}: {said[len(kinds)]}" for name, kinds in found.items() if len(kinds) < 2]
