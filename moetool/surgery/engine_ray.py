"""The same worker on a Ray cluster whose nodes share a file system: `--engine ray [--ray-address
ADDRESS]`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from moetool.errors import MoetoolError, Stopped, UsageError
from moetool.surgery.engine import Job, Tell, make_shard
from moetool.surgery.scan import Suspect


def run_ray(
    jobs: Sequence[Job],
    done: Callable[[Job, list[Suspect]], None],
    *,
    address: str | None,
    tell: Tell,
    stop: threading.Event,
) -> list[str]:
    """Hand one shard at a time to the cluster's nodes; returns the node ids that worked.

    Raises UsageError when Ray is not installed or the cluster cannot be reached; a failing shard's
    own error otherwise.
    """
    try:
        import ray
    except ImportError:
        raise UsageError(
            "Ray is not installed", hint="pip install 'moetool[ray]', or leave out --engine ray"
        ) from None
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as problem:
            raise UsageError(
                f"cannot reach the Ray cluster: {problem}",
                hint="check --ray-address, or start one with `ray start --head`",
            ) from None
    try:
        return _drain(ray, jobs, done, tell, stop)
    finally:
        if started:
            ray.shutdown()


def _drain(
    ray: Any,
    jobs: Sequence[Job],
    done: Callable[[Job, list[Suspect]], None],
    tell: Tell,
    stop: threading.Event,
) -> list[str]:
    def work(job: Job) -> tuple[list[Suspect], str]:
        return make_shard(job), ray.get_runtime_context().get_node_id()

    remote = ray.remote(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")(work)
    waiting = {remote.remote(job): job for job in jobs}
    nodes = set()
    while waiting:
        if stop.is_set():
            for reference in waiting:
                ray.cancel(reference, force=True)
            raise Stopped("stopped")
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
        for reference in ready:
            job = waiting.pop(reference)
            try:
                found, node = ray.get(reference)
            except ray.exceptions.RayTaskError as problem:
                raise (
                    problem.cause
                    if isinstance(problem.cause, MoetoolError | OSError)
                    else MoetoolError(
                        f"a Ray worker failed: {problem.cause}",
                        file=job.path,
                        hint="see the Ray logs; finished shards are kept",
                    )
                ) from None
            nodes.add(node)
            tell(job.size)
            done(job, found)
    return sorted(nodes)
