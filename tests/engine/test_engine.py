"""Every admitted request ends in exactly one answer, and no failure stops the engine."""

import sys
import threading
import time
from collections.abc import Callable

import pytest
from engine_harness import WAIT_S, Harness
from fake_networks import FakeNetworks

from darkroom_engine import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    JobResult,
    NetworkFailed,
    Overloaded,
)
from darkroom_engine.errors import NotYetAllowed


def hold(harness: Harness, **fields: object) -> None:
    """Start a request and hold it in its first step."""
    harness.picture()
    harness.networks.is_entered.clear()
    harness.networks.gate.clear()
    harness.ask("held", **fields)
    assert harness.networks.is_entered.wait(WAIT_S)


def test_requests_before_the_networks_are_ready_wait_for_them(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    networks.gate.clear()
    harness = make_engine()
    future = harness.ask()
    networks.gate.set()

    assert future.result(WAIT_S).pictures


def test_networks_that_never_come_fail_all_requests(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    networks.is_missing = True
    harness = make_engine()

    # The first may come before or after the engine knows.
    with pytest.raises(NetworkFailed, match="unet failed: not ready within"):
        harness.ask().result(WAIT_S)
    with pytest.raises(NetworkFailed, match="unet failed: not ready within"):
        harness.ask()


def test_close_does_not_wait_for_networks_that_never_come(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    networks.is_loading = True
    harness = make_engine()
    future = harness.ask()
    harness.engine.close()

    with pytest.raises(NetworkFailed, match="unet failed: not ready within"):
        future.result(WAIT_S)


def test_a_surprise_during_the_warm_up_fails_all_requests(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    networks.gate.clear()
    networks.fail_next["unet"] = RuntimeError("surprise")
    harness = make_engine()
    future = harness.ask()
    networks.gate.set()

    with pytest.raises(EngineError, match="surprise"):
        future.result(WAIT_S)


def test_cancel_frees_the_rows_at_the_next_step(harness: Harness) -> None:
    hold(harness, num_inference_steps=20, guidance_scale=1.0)
    job, future = harness.ask_job(num_inference_steps=50, guidance_scale=1.0)
    other = harness.ask(num_inference_steps=10, guidance_scale=1.0)
    job.cancel()
    harness.networks.step_rows.clear()
    harness.networks.gate.set()

    with pytest.raises(Cancelled):
        future.result(WAIT_S)
    other.result(WAIT_S)
    assert max(harness.networks.step_rows) == 2


def test_cancelling_a_running_request_leaves_its_neighbour_alone(harness: Harness) -> None:
    expected = harness.picture("neighbour", num_inference_steps=12)
    harness.networks.gate.clear()
    job, future = harness.ask_job(num_inference_steps=50)
    neighbour = harness.ask("neighbour", num_inference_steps=12)
    harness.networks.is_entered.wait(WAIT_S)
    job.cancel()
    harness.networks.gate.set()

    assert neighbour.result(WAIT_S).pictures[0] == expected
    with pytest.raises(Cancelled):
        future.result(WAIT_S)


def test_a_deadline_ends_waiting_and_running_requests(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=2)
    harness.picture()
    harness.networks.is_entered.clear()
    harness.networks.gate.clear()
    running = harness.ask(num_inference_steps=50, timeout_ms=300)
    harness.networks.is_entered.wait(WAIT_S)
    waiting = harness.ask(num_inference_steps=50, timeout_ms=300)

    # They need not wait for the end of the step.
    for future in (running, waiting):
        with pytest.raises(DeadlineExceeded, match="timeout_ms: 300 ran out"):
            future.result(WAIT_S)


def test_a_full_queue_refuses_at_once_and_whole(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=2, max_queue_size=3)
    hold(harness)
    harness.ask(num_images_per_prompt=2)

    with pytest.raises(
        Overloaded,
        match=r"queue is full: 2 pictures are waiting, 3 may wait; retry_after_ms: \d+$",
    ) as caught:
        harness.ask(num_images_per_prompt=2)
    assert caught.value.retry_after_s > 0
    # One picture still fits, so that the refusal took nothing.
    last = harness.ask()
    harness.networks.gate.set()
    assert last.result(WAIT_S).pictures


def test_higher_priority_starts_first(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=2)
    hold(harness)
    order: list[str] = []
    futures = [harness.ask(name, priority=p) for name, p in (("low", -1), ("mid", 0), ("high", 5))]
    for name, future in zip(("low", "mid", "high"), futures, strict=True):
        future.add_done_callback(lambda _, name=name: order.append(name))
    harness.networks.gate.set()
    for future in futures:
        future.result(WAIT_S)

    assert order == ["high", "mid", "low"]


NETWORKS = ("text_encoder", "unet", "vae_decoder")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_failing_network_answers_its_requests_and_the_engine_goes_on(
    harness: Harness, network: str
) -> None:
    expected = harness.picture("fine")
    harness.networks.fail_always[network] = NetworkFailed("it", "out of memory")

    with pytest.raises(NetworkFailed, match="it failed: out of memory"):
        harness.picture("unlucky")
    harness.networks.fail_always.clear()
    assert harness.picture("fine") == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_a_surprise_answers_its_requests_and_the_engine_goes_on(
    harness: Harness, network: str
) -> None:
    expected = harness.picture("fine")
    harness.networks.fail_next[network] = RuntimeError("surprise")

    with pytest.raises(EngineError, match=r"this is a bug: RuntimeError\('surprise'\)"):
        harness.picture("unlucky")
    assert harness.picture("fine") == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_a_hiccup_of_a_network_changes_no_picture(harness: Harness, network: str) -> None:
    expected = harness.picture("a cat", sampler="euler_ancestral")
    other = harness.picture("other")
    harness.networks.gate.clear()
    futures = [harness.ask("a cat", sampler="euler_ancestral"), harness.ask("other")]
    harness.networks.fail_next[network] = NetworkFailed(network, "hiccup")
    harness.networks.gate.set()

    assert [future.result(WAIT_S).pictures[0] for future in futures] == [expected, other]


@pytest.mark.parametrize("network", NETWORKS)
def test_requests_wait_for_a_network_that_is_being_replaced(harness: Harness, network: str) -> None:
    expected = harness.picture("fine", num_inference_steps=20)
    hold(harness, num_inference_steps=20)
    harness.networks.away[network] = NetworkFailed(network, "its process died")
    futures = [harness.ask("fine", num_inference_steps=20), harness.ask("new")]
    harness.networks.gate.set()
    threading.Event().wait(0.3)
    assert not any(future.done() for future in futures)
    harness.networks.away.clear()

    assert futures[0].result(WAIT_S).pictures[0] == expected
    assert futures[1].result(WAIT_S).pictures


def test_a_network_that_stays_away_fails_its_requests(
    make_engine: Callable[..., Harness],
) -> None:
    harness = make_engine(heal_timeout_s=0)
    expected = harness.picture("fine")
    harness.networks.away["unet"] = NetworkFailed("unet", "its process died")

    with pytest.raises(NetworkFailed, match="unet failed: its process died"):
        harness.picture("unlucky")
    harness.networks.away.clear()
    assert harness.picture("fine") == expected


def test_cancels_and_deadlines_are_answered_while_a_network_is_away(harness: Harness) -> None:
    harness.picture()
    harness.networks.away["unet"] = NetworkFailed("unet", "its process died")
    job, cancelled = harness.ask_job()
    expired = harness.ask(timeout_ms=50)
    job.cancel()

    with pytest.raises(Cancelled):
        cancelled.result(WAIT_S)
    with pytest.raises(DeadlineExceeded):
        expired.result(WAIT_S)


def test_a_network_that_stays_away_is_waited_for_once_not_by_each(
    make_engine: Callable[..., Harness],
) -> None:
    """Of six new prompts with a dead text encoder, the first waits, and the others fail at once."""
    harness = make_engine(heal_timeout_s=1)
    harness.picture()
    harness.networks.away["text_encoder"] = NetworkFailed("text_encoder", "its process died")
    start = time.monotonic()
    futures = [harness.ask(f"new {n}") for n in range(6)]
    for future in futures:
        with pytest.raises(NetworkFailed):
            future.result(WAIT_S)
    # A bound that only six waits in a row exceed.
    assert time.monotonic() - start < 5

    harness.networks.away.clear()
    assert harness.picture("new")


def test_networks_that_may_not_be_called_yet_are_called_again(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    """Triton says that a model is ready while its new instance is still being loaded."""
    networks.away["text_encoder"] = NotYetAllowed("text_encoder", "BLS is only supported during")
    harness = make_engine()
    future = harness.ask()
    threading.Event().wait(0.2)
    assert not future.done()
    networks.away.clear()

    assert future.result(WAIT_S).pictures


def test_close_does_not_wait_until_networks_may_be_called(
    make_engine: Callable[..., Harness], networks: FakeNetworks
) -> None:
    networks.away["text_encoder"] = NotYetAllowed("text_encoder", "BLS is only supported during")
    harness = make_engine()
    future = harness.ask()
    harness.engine.close()

    with pytest.raises(EngineError):
        future.result(WAIT_S)


def test_steps_wait_for_a_decoder_that_is_slower(make_engine: Callable[..., Harness]) -> None:
    """What has been denoised waits nowhere without end: it counts as work, and is refused."""
    harness = make_engine(max_queue_size=8)
    harness.picture()
    harness.networks.decode_gate.clear()
    num_refused = 0
    futures = []
    for n in range(200):
        try:
            futures.append(harness.ask(seed=n, num_inference_steps=1, guidance_scale=1.0))
        except Overloaded:
            num_refused += 1
        threading.Event().wait(0.001)
    harness.networks.decode_gate.set()

    assert num_refused > 50
    for future in futures:
        assert future.result(WAIT_S).pictures


def test_asking_and_starting_at_the_same_time_confuses_nobody(
    make_engine: Callable[..., Harness],
) -> None:
    harness = make_engine(max_queue_size=1000)
    harness.picture()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    answers: list[object] = []

    class Ear:
        preview_interval = 0

        def on_event(self, *_: object) -> None:
            pass

    def ask() -> None:
        for n in range(40):
            fields = {"prompt": b"a cat", "seed": n, "num_inference_steps": 1}
            harness.engine.ask(fields, answers.append, listener=Ear())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    finally:
        sys.setswitchinterval(interval)
    harness.engine.close()

    assert len(answers) == 240
    assert all(isinstance(answer, JobResult | EngineError) for answer in answers)
    assert not [answer for answer in answers if "bug" in str(answer)]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_that_will_not_come_back_is_not_waited_for(
    harness: Harness, network: str
) -> None:
    harness.picture()
    harness.networks.away[network] = NetworkFailed(network, "the server stops", is_final=True)

    with pytest.raises(NetworkFailed, match="the server stops"):
        harness.picture("new")


def test_a_network_that_turns_out_not_to_come_back_is_not_waited_for(harness: Harness) -> None:
    harness.picture()
    harness.networks.fail_next["unet"] = NetworkFailed("unet", "its process died")
    harness.networks.away["unet"] = NetworkFailed("unet", "the server stops", is_final=True)

    with pytest.raises(NetworkFailed, match="its process died"):
        harness.picture()


def test_close_does_not_wait_for_a_network_that_is_away(
    make_engine: Callable[..., Harness],
) -> None:
    harness = make_engine()
    harness.picture()
    harness.networks.away["unet"] = NetworkFailed("unet", "its process died")
    future = harness.ask()
    harness.engine.close()

    with pytest.raises(EngineError, match=r"its process died|the engine is stopping"):
        future.result(WAIT_S)


def test_a_failed_step_answers_every_row_of_it(harness: Harness) -> None:
    hold(harness)
    futures = [harness.ask(seed=n) for n in range(3)]
    harness.networks.fail_always["unet"] = NetworkFailed("unet", "out of memory")
    harness.networks.gate.set()
    for future in futures:
        with pytest.raises(NetworkFailed, match="unet failed: out of memory"):
            future.result(WAIT_S)
    harness.networks.fail_always.clear()

    assert harness.picture()


def test_nan_is_an_error_that_names_the_step_and_hits_its_own_request_only(
    harness: Harness,
) -> None:
    expected = harness.picture("a cat", num_inference_steps=9)
    harness.networks.poison_token = int(harness.networks.encoded[-1][0, 1])  # the first of "a cat"
    harness.networks.gate.clear()
    healthy = harness.ask("a cat", num_inference_steps=9)  # embeddings from before the poison
    poisoned = harness.ask("a dog", num_inference_steps=5)
    harness.networks.gate.set()

    with pytest.raises(NetworkFailed, match="unet failed: output is not finite at step 1 of 5"):
        poisoned.result(WAIT_S)
    assert healthy.result(WAIT_S).pictures[0] == expected


def test_decoding_between_the_steps_makes_the_same_pictures(
    make_engine: Callable[..., Harness],
) -> None:
    beside, between = make_engine(), make_engine(overlap_decode=0)
    expected = [beside.picture(seed=seed) for seed in range(3)]

    assert [between.picture(seed=seed) for seed in range(3)] == expected
    assert between.ask(num_images_per_prompt=3).result(WAIT_S).pictures == expected


def test_close_answers_everything_that_is_left(make_engine: Callable[..., Harness]) -> None:
    harness = make_engine(max_rows=2)
    hold(harness, num_inference_steps=60)
    futures = [harness.ask() for _ in range(4)]
    closer = threading.Thread(target=harness.engine.close)
    closer.start()
    harness.networks.gate.set()
    closer.join(WAIT_S)

    assert not closer.is_alive()
    for future in futures:
        with pytest.raises(EngineError, match="the engine is stopping"):
            future.result(WAIT_S)
    with pytest.raises(EngineError, match="the engine is stopping"):
        harness.ask()


def test_a_reply_that_raises_does_not_stop_the_engine(harness: Harness) -> None:
    from darkroom_engine import ImageRequest

    def reply(_: object) -> None:
        raise ConnectionError("the client is gone")

    request = ImageRequest.parse({"prompt": b"a cat"}, harness.engine.limits)
    harness.engine.submit(request, reply)

    assert harness.picture()


def test_every_request_of_a_storm_is_answered_exactly_once(
    make_engine: Callable[..., Harness],
) -> None:
    harness = make_engine(max_rows=6, max_queue_size=1000)
    harness.picture()
    harness.answers.clear()
    jobs = []
    num_refused = 0
    for n in range(300):
        try:
            job, future = harness.ask_job(
                f"prompt {n % 7}",
                seed=n,
                num_inference_steps=1 + n % 6,
                guidance_scale=[1.0, 5.0][n % 2],
                width=[32, 64][n % 3 == 0],
                **({"timeout_ms": 1} if n % 11 == 0 else {}),
            )
        except Overloaded:
            num_refused += 1
            continue
        jobs.append(future)
        if n % 5 == 0:
            job.cancel()
        if n % 50 == 0:
            harness.networks.fail_next["unet"] = RuntimeError("hiccup")
    for future in jobs:
        future.exception(WAIT_S)

    assert len(harness.answers) == len(jobs) == 300 - num_refused


def test_more_steps_than_a_sampler_can_do_are_refused(harness: Harness) -> None:
    with pytest.raises(InvalidRequest, match=r"num_inference_steps: 60.* 1 to 50"):
        harness.ask(sampler="lcm", num_inference_steps=60)


def test_a_second_identical_prompt_is_not_encoded_again(harness: Harness) -> None:
    harness.picture("a new prompt", seed=1)
    count = len(harness.networks.encoded)
    harness.picture("a new prompt", seed=2)

    assert len(harness.networks.encoded) == count


def test_the_prompt_cache_stays_below_its_limit(make_engine: Callable[..., Harness]) -> None:
    """77 x 6 float32 are 1,848 bytes: three of them do not fit."""
    harness = make_engine(prompt_cache_bytes=2 * 1900)
    for prompt in ("one", "two", "three", "two", "three"):
        harness.picture(prompt, guidance_scale=1.0)
    count = len(harness.networks.encoded)
    harness.picture("one", guidance_scale=1.0)

    assert len(harness.networks.encoded) == count + 1


def test_a_long_prompt_is_cut_with_a_note(harness: Harness) -> None:
    result = harness.ask("x" * 100).result(WAIT_S)

    assert result.info["notes"] == ["prompt: too long, its last 25 tokens were cut off"]


def test_an_answer_tells_its_timings_and_model(harness: Harness) -> None:
    info = harness.ask(num_inference_steps=4).result(WAIT_S).info

    assert info["num_inference_steps"] == 4
    assert info["model"] == "fake"
    timings = info["timings"]
    parts = timings["queue_ms"] + timings["denoise_ms"] + timings["decode_ms"]
    assert timings["total_ms"] == pytest.approx(parts, abs=0.01)
