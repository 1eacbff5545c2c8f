"""Requests that come as independent users send them: steps against whole requests in a batch."""

import contextlib
from typing import Any

from benchmarks.gpu.bench import MIXED_GUIDANCE, Bench
from benchmarks.gpu.grouping import Grouping
from benchmarks.gpu.load import send
from benchmarks.gpu.service import Grouped, Service
from benchmarks.gpu.speed import measure_capacity, measure_solo
from benchmarks.gpu.summary import SLO_FACTOR, VISIT, describe_load
from benchmarks.workload import make_requests, poisson_arrivals

WINDOW_S = 0.05
"""How long a request-level batcher waits for equal requests."""
DRAIN_SHARE = 0.3
"""Of the time for a load, to wait for its last answers after its last arrival, at the most."""
RESERVE_S = 5.0
"""Of the time that is left, for whatever comes after."""


def load(bench: Bench) -> dict[str, Any]:
    """The same arrivals for each policy, at shares of the capacity that was measured before."""
    scale, choices = bench.scale, bench.choices
    shares = choices.shares or scale.shares
    capacity, solo = measure_capacity(bench), measure_solo(bench)
    num_runs = len(shares) * len(choices.policies)
    time_s = max(0.0, bench.session.left_s - RESERVE_S) / num_runs
    window_s = min(scale.load_s, time_s / (1 + DRAIN_SHARE))
    loads = []
    for number, share in enumerate(shares):
        arrivals = poisson_arrivals(share * capacity, window_s, seed=number)
        if len(arrivals) < 2:
            bench.session.note(f"load: in {window_s:.1f} s there come {len(arrivals)} requests")
            continue
        requests = make_requests(
            len(arrivals),
            seed=1000 + number,
            steps=scale.mixed_steps,
            guidance_scales=MIXED_GUIDANCE,
        )
        by_policy = {}
        for policy in choices.policies:
            bench.ours().recorder.clear()
            with _service(bench, policy) as service:
                visits, end_s = send(service, requests, arrivals, DRAIN_SHARE * window_s)
            rows = [step.num_rows for step in bench.ours().recorder.steps]
            by_policy[policy] = {
                **describe_load(
                    visits,
                    end_s=end_s,
                    window_s=window_s,
                    solo_s=lambda visit: solo.seconds(visit.num_steps, is_guided=visit.is_guided),
                ),
                "mean_rows": round(sum(rows) / len(rows), 3) if rows else None,
            }
        loads.append({"share": share, "policies": by_policy})
    return {
        "capacity_per_s": capacity,
        "window_s": round(window_s, 2),
        "drain_s": round(DRAIN_SHARE * window_s, 2),
        "grouping_window_s": WINDOW_S,
        "slo": f"{SLO_FACTOR:g} times what the request takes alone",
        "visit": VISIT,
        "loads": loads,
    }


def _service(bench: Bench, policy: str) -> contextlib.AbstractContextManager[Service]:
    ours = bench.ours()
    if policy == "step-level":
        return contextlib.nullcontext(ours)
    if policy == "request-level":
        return Grouped(ours, Grouping(bench.max_rows, WINDOW_S))
    return Grouped(ours, Grouping(bench.max_rows, 0.0, max_pictures=1))
