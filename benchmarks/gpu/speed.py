"""How fast it is: the networks alone, the engine's steps, lone requests, and a full engine."""

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu import networks
from benchmarks.gpu.bench import GUIDANCE_SCALE, MIXED_GUIDANCE, OFF, Bench
from benchmarks.gpu.card import PeakMemory
from benchmarks.gpu.grouping import is_guided
from benchmarks.gpu.peers import Pipeline, modes
from benchmarks.gpu.service import ANSWER_TIMEOUT_S, OUTPUT_FORMAT, Ours, keep_full
from benchmarks.gpu.summary import Solo, spread, steady_rate
from benchmarks.measurements import Answer, Join
from benchmarks.workload import Request, make_requests

NETWORK_ROUNDS = 3
"""In which the configurations take turns."""
STEPS_OF_A_RUN = 12
"""Of the batches whose steps are timed."""
NUM_UNCOUNTED = 3
"""Steps at the start of such a batch."""
SOLO_REPEATS = 3
WARM_SHARE = 0.25
"""Of the time for which the engine is kept full, before its answers count."""
PEER_PICTURES = 8
"""Of diffusers' batches of equal requests."""


def network(bench: Bench) -> dict[str, Any]:
    """Calls of the denoiser by rows and configuration, and of the decoder."""
    # The configurations are alone on the device.
    bench.close()
    scale, clock = bench.scale, bench.clock
    chosen = bench.choices.configurations
    names = (bench.model.manifest().denoiser.network, "vae_decoder")
    latents = networks.Sizes.of(bench.model).latents
    times: dict[str, dict[int, list[float]]] = {it: {} for it in chosen}
    decodings: dict[str, list[float]] = {it: [] for it in chosen}
    rows_measured = [n for n in scale.rows if n <= bench.max_rows]
    with contextlib.ExitStack() as stack:
        running = {
            it: stack.enter_context(networks.loaded(bench.model, it, bench.max_rows, names))
            for it in chosen
        }
        for num_rows in rows_measured:
            for _ in bench.session.rounds(NETWORK_ROUNDS):
                for name, networks_of in running.items():
                    seconds = networks.denoiser_s(
                        bench.model, networks_of, num_rows, clock, scale.num_calls
                    )
                    times[name].setdefault(num_rows, []).extend(seconds)
        for _ in bench.session.rounds(NETWORK_ROUNDS):
            for name, networks_of in running.items():
                decodings[name] += networks.decoder_s(networks_of, latents, clock, scale.num_calls)
        del running, networks_of
    return {
        **bench.operations.record(),
        "configurations": {
            name: {
                "denoiser": [_by_rows(bench, n, times[name][n]) for n in rows_measured],
                "decoder_ms": spread([1000 * s for s in decodings[name]]),
            }
            for name in chosen
        },
    }


def steps(bench: Bench) -> dict[str, Any]:
    """The engine's steps by rows, and what they take beyond the network's own time."""
    scale, ours = bench.scale, bench.ours()
    results = []
    for num_rows in (n for n in scale.rows if n <= bench.max_rows):
        network_s: list[float] = []
        step_s: list[float] = []
        for number in bench.session.rounds(scale.num_pairs):
            network_s += networks.denoiser_s(
                bench.model, ours.networks, num_rows, bench.clock, scale.num_calls
            )
            step_s += _steps_of_a_batch(ours, num_rows, seed=number)
        by_rows = _by_rows(bench, num_rows, step_s)
        network_ms = 1000 * statistics.median(network_s)
        results.append(
            {
                **by_rows,
                "network_ms": spread([1000 * s for s in network_s]),
                "overhead_ms": round(by_rows["ms"]["median"] - network_ms, 3),
            }
        )
    return {"engine": results}


def solo(bench: Bench) -> dict[str, Any]:
    """Lone requests: diffusers as most run it and ours, by turns; and ours by steps."""
    scale = bench.scale
    request = make_requests(
        1, seed=3, steps=(scale.num_steps, scale.num_steps), guidance_scales=(GUIDANCE_SCALE,)
    )[0]
    bench.ours()
    with bench.pipeline(bench.model.dtype) as pipeline:
        result = _against(bench, pipeline, request, "diffusers eager")
    bench.solo = _measure_solo(bench)
    return {
        **result,
        "by_steps": [
            {
                "num_steps": num_steps,
                "is_guided": guided,
                "s": round(bench.solo.seconds(num_steps, is_guided=guided), 4),
            }
            for num_steps in scale.mixed_steps
            for guided in (True, False)
        ],
    }


def compiled(bench: Bench) -> dict[str, Any]:
    """The recipe, channels_last with UNet and VAE compiled, and ours, by turns."""
    scale = bench.scale
    request, *others = make_requests(
        PEER_PICTURES,
        seed=3,
        steps=(scale.num_steps, scale.num_steps),
        guidance_scales=(GUIDANCE_SCALE,),
    )
    result: dict[str, Any] = {"failed_modes": {}}
    bench.ours()
    for mode in modes(is_gpu=bench.clock.is_gpu):
        with bench.pipeline(bench.model.dtype) as pipeline:
            pipeline.use_recipe(mode)
            try:
                # As the recipe does it: a request of one step.
                warm_s = [
                    pipeline.seconds([_with_steps(request, 1)]),
                    pipeline.seconds([_with_steps(request, 2)]),
                ]
            except Exception as error:  # noqa: BLE001  the next mode is tried
                result["failed_modes"][mode] = f"{type(error).__name__}: {error}"[:2000]
                continue
            result |= {"mode": mode, "first_runs_s": [round(s, 1) for s in warm_s]}
            result |= _against(bench, pipeline, request, "diffusers compiled")
            # Another size of batch is compiled anew, which takes as long.
            if pipeline.is_sliced:
                bench.session.note("compiled: no batch, whose slices take too long to compile")
            elif bench.session.left_s > 2 * warm_s[0]:
                result["batch"] = _batch_of(bench, pipeline, [request, *others])
            else:
                bench.session.note("compiled: no batch, for want of time")
            return result
    raise RuntimeError(f"no mode of torch.compile works: {result['failed_modes']}")


def saturated(bench: Bench) -> dict[str, Any]:
    """A full engine, of equal requests and of mixed ones; and diffusers' batches of equal ones."""
    scale = bench.scale
    equal = _full(bench, _equal_requests(scale.num_steps, _num_running(bench)))
    mixed = _full(bench, _mixed_requests(bench))
    bench.capacity_per_s = mixed["pictures_per_s"]
    with bench.pipeline(bench.model.dtype) as pipeline:
        requests = make_requests(
            PEER_PICTURES,
            seed=3,
            steps=(scale.num_steps, scale.num_steps),
            guidance_scales=(GUIDANCE_SCALE,),
        )
        peer = _batch_of(bench, pipeline, requests)
    return {
        "equal": equal,
        "mixed": mixed,
        "diffusers eager": peer,
        "ratio": _ratio(equal["pictures_per_s"], peer["pictures_per_s"]["median"]),
    }


def join(bench: Bench) -> dict[str, Any]:
    """Short requests that come at a random moment while long ones run."""
    scale, ours = bench.scale, bench.ours()
    chance = random.Random(4)
    short_steps, long_steps = scale.mixed_steps
    num_long = max(1, bench.max_rows // 4)
    joins = []
    for number in bench.session.rounds(scale.num_joins):
        long = make_requests(
            num_long,
            seed=number,
            steps=(long_steps, long_steps),
            guidance_scales=(GUIDANCE_SCALE,),
        )
        sent_s = time.perf_counter()
        futures = ours.submit_together(long)
        expected_s = long_steps * _last_step_s(ours, 2 * num_long)
        time.sleep(chance.uniform(0.1, 0.4) * expected_s)
        short_sent_s = time.perf_counter()
        short = ours.submit(Request("a circle", number, short_steps, GUIDANCE_SCALE))
        answer = short.result(ANSWER_TIMEOUT_S)
        long_answer = futures[0].result(ANSWER_TIMEOUT_S)
        for future in futures:
            future.result(ANSWER_TIMEOUT_S)
        joins.append(
            Join(
                long=Answer(
                    sent_s,
                    long_answer.at_s,
                    dict(long_answer.timings),
                    long_answer.queue_steps,
                ),
                short=Answer(short_sent_s, answer.at_s, dict(answer.timings), answer.queue_steps),
                long_steps=long_steps,
            )
        )
    overlapping = [join for join in joins if join.is_overlapping]
    if not overlapping:
        raise RuntimeError("no short request came while the long ones ran")
    return {
        "num_long": num_long,
        "num_joins": len(overlapping),
        "queue_ms": spread([join.short.timings["queue_ms"] for join in overlapping]),
        "queue_steps": spread([join.short.queue_steps for join in overlapping]),
        "step_ms": spread([join.step_ms for join in overlapping]),
        "delay_steps": spread([join.delay_steps for join in overlapping]),
    }


def measure_capacity(bench: Bench) -> float:
    """Pictures per second of mixed requests, measured unless it has been."""
    if bench.capacity_per_s is None:
        bench.capacity_per_s = _full(bench, _mixed_requests(bench))["pictures_per_s"]
    if bench.capacity_per_s is None:
        raise RuntimeError("no two pictures were made in the time for which the engine was full")
    return bench.capacity_per_s


def measure_solo(bench: Bench) -> Solo:
    """What requests take alone, measured unless it has been."""
    if bench.solo is None:
        bench.solo = _measure_solo(bench)
    return bench.solo


def _by_rows(bench: Bench, num_rows: int, seconds: Sequence[float]) -> dict[str, Any]:
    tflops = num_rows * bench.operations.denoiser / statistics.median(seconds) / 1e12
    return {
        "rows": num_rows,
        "ms": spread([1000 * s for s in seconds]),
        "tflops": round(tflops, 4),
        "share_of_matmul": bench.share_of_matmul(tflops),
    }


def _steps_of_a_batch(ours: Ours, num_rows: int, seed: int) -> list[float]:
    """Times of steps of a batch that nobody joins or leaves, while nothing is decoded."""
    guided = num_rows % 2 == 0
    requests = make_requests(
        num_rows // 2 if guided else num_rows,
        seed=seed,
        steps=(STEPS_OF_A_RUN, STEPS_OF_A_RUN),
        guidance_scales=(GUIDANCE_SCALE if guided else OFF,),
    )
    ours.recorder.clear()
    for future in ours.submit_together(requests):
        future.result(ANSWER_TIMEOUT_S)
    made = [step.seconds for step in ours.recorder.steps if step.num_rows == num_rows]
    if len(made) < STEPS_OF_A_RUN:
        raise RuntimeError(f"a batch of {num_rows} rows made {len(made)} steps together")
    return made[NUM_UNCOUNTED:]


def _against(bench: Bench, pipeline: Pipeline, request: Request, peer: str) -> dict[str, Any]:
    """Pairs of runs of one request by diffusers and by us, to the picture and to the latents."""
    ours = bench.ours()
    runs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "picture": (
            lambda: pipeline.seconds([request]),
            lambda: _answer_s(ours, request, OUTPUT_FORMAT),
        ),
        "latents": (
            lambda: bench.clock.host_s(lambda: pipeline.latents(request)),
            lambda: _answer_s(ours, request, "latent"),
        ),
    }
    result: dict[str, Any] = {"num_steps": request.num_inference_steps}
    with PeakMemory(bench.clock) as memory:
        pipeline.pictures([request])
    for name, (by_peer, by_us) in runs.items():
        by_peer(), by_us()
        pairs = [(by_peer(), by_us()) for _ in bench.session.rounds(bench.scale.num_pairs)]
        result[name] = {
            peer: {"s": spread([it[0] for it in pairs], 4)},
            "ours": {"s": spread([it[1] for it in pairs], 4)},
            "ratio": spread([it[0] / it[1] for it in pairs]),
        }
        if name == "latents":
            for maker in (peer, "ours"):
                median = result[name][maker]["s"]["median"]
                result[name][maker]["ms_per_step"] = round(
                    1000 * median / request.num_inference_steps, 3
                )
    result["peak_memory_bytes"] = {peer: memory.bytes}
    return result


def _measure_solo(bench: Bench) -> Solo:
    short_steps, long_steps = bench.scale.mixed_steps
    medians: dict[tuple[int, bool], float] = {}
    for num_steps in (short_steps, long_steps):
        for guided in (True, False):
            scale = GUIDANCE_SCALE if guided else OFF
            request = Request("a circle", 5, num_steps, scale)
            _answer_s(bench.ours(), request, OUTPUT_FORMAT)
            medians[num_steps, guided] = statistics.median(
                _answer_s(bench.ours(), request, OUTPUT_FORMAT) for _ in range(SOLO_REPEATS)
            )
    return Solo(
        short_steps,
        long_steps,
        short_s={it: medians[short_steps, it] for it in (True, False)},
        long_s={it: medians[long_steps, it] for it in (True, False)},
    )


def _full(bench: Bench, requests: Iterator[Request]) -> dict[str, Any]:
    """What an engine makes whose rows are all taken, with a few requests waiting for one."""
    ours, seconds = bench.ours(), bench.scale.full_s
    num_in_flight = _num_running(bench) + max(2, bench.max_rows // 4)
    sent: list[Request] = []
    ours.recorder.clear()
    start = time.perf_counter()
    with PeakMemory(bench.clock) as memory:
        answers = keep_full(ours, _noted(requests, sent), num_in_flight, seconds)
    begin, end = start + WARM_SHARE * seconds, start + seconds
    rate = steady_rate([answer.at_s for answer in answers], begin, end)
    made = [step for step in ours.recorder.steps if begin <= step.ended_at <= end]
    rows_per_s = sum(step.num_rows for step in made) / (end - begin)
    rows_per_picture = statistics.fmean(map(_num_rows, sent[num_in_flight:] or sent))
    operations = bench.operations
    tflops = (rows_per_s * operations.denoiser + (rate or 0.0) * operations.decoder) / 1e12
    return {
        "seconds": round(end - begin, 3),
        "in_flight": num_in_flight,
        "num_pictures": sum(begin <= answer.at_s <= end for answer in answers),
        "pictures_per_s": None if rate is None else round(rate, 4),
        # The same from the steps, which says more where few pictures were answered.
        "pictures_per_s_by_rows": round(rows_per_s / rows_per_picture, 4),
        "rows_per_s": round(rows_per_s, 3),
        "mean_rows": round(statistics.fmean(step.num_rows for step in made), 3),
        "step_ms": spread([1000 * step.seconds for step in made]),
        "decode_ms": spread([1000 * s for s in ours.recorder.decodings_s]),
        "tflops": round(tflops, 4),
        "share_of_matmul": bench.share_of_matmul(tflops),
        "peak_memory_bytes": memory.bytes,
    }


def _noted(requests: Iterator[Request], noted: list[Request]) -> Iterator[Request]:
    for request in requests:
        noted.append(request)
        yield request


def _num_running(bench: Bench) -> int:
    """Guided requests that have rows at once."""
    return bench.max_rows // 2


def _num_rows(request: Request) -> int:
    """Of all its steps together."""
    return request.num_inference_steps * (2 if is_guided(request) else 1)


def _equal_requests(num_steps: int, num_running: int) -> Iterator[Request]:
    """Without end, of equal steps; but those that run first are spread, to end one by one."""
    for number in itertools.count():
        first = 1 + num_steps * number // num_running
        steps_of = min(first, num_steps)
        yield Request(f"a circle, {number}", number, steps_of, GUIDANCE_SCALE)


def _mixed_requests(bench: Bench) -> Iterator[Request]:
    """Without end, of mixed steps and guidance."""
    for seed in itertools.count(100):
        yield from make_requests(
            64, seed=seed, steps=bench.scale.mixed_steps, guidance_scales=MIXED_GUIDANCE
        )


def _batch_of(bench: Bench, pipeline: Pipeline, requests: Sequence[Request]) -> dict[str, Any]:
    with PeakMemory(bench.clock) as memory:
        first_s = pipeline.seconds([_with_steps(request, 2) for request in requests])
        seconds = [pipeline.seconds(requests) for _ in bench.session.rounds(bench.scale.num_pairs)]
    return {
        "pictures": len(requests),
        "first_run_s": round(first_s, 2),
        "s": spread(seconds, 4),
        "pictures_per_s": spread([len(requests) / s for s in seconds], 4),
        "peak_memory_bytes": memory.bytes,
    }


def _with_steps(request: Request, num_steps: int) -> Request:
    return Request(request.prompt, request.seed, num_steps, request.guidance_scale)


def _answer_s(ours: Ours, request: Request, output_format: str) -> float:
    start = time.perf_counter()
    return ours.submit_as(request, output_format).result(ANSWER_TIMEOUT_S).at_s - start


def _last_step_s(ours: Ours, num_rows: int) -> float:
    """What a step of so many rows took last; waits for one."""
    give_up_at = time.perf_counter() + ANSWER_TIMEOUT_S
    while time.perf_counter() < give_up_at:
        for step in reversed(ours.recorder.steps[-4:]):
            if step.num_rows == num_rows:
                return step.seconds
        time.sleep(0.001)
    raise RuntimeError(f"there is no step of {num_rows} rows")


def _ratio(ours: float | None, peer: float) -> float | None:
    return None if ours is None else round(ours / peer, 3)
