"""What the engine tells about itself, by Prometheus' conventions: the table of its metrics."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 63)


class Kind(StrEnum):
    """The names of Triton's kinds of metric."""

    COUNTER = "COUNTER"
    GAUGE = "GAUGE"
    HISTOGRAM = "HISTOGRAM"


@dataclass(frozen=True)
class Metric:
    """One family of metrics. Units are in the name: seconds, bytes, or a plain count."""

    name: str
    kind: Kind
    description: str
    label: str | None = None
    """The one label that its series differ in, besides the model."""
    buckets: tuple[float, ...] = ()


REQUESTS = Metric(
    "darkroom_requests_total",
    Kind.COUNTER,
    "Requests answered, by outcome: image, error, cancelled, expired, rejected or invalid",
    label="outcome",
)
REQUEST_SECONDS = Metric(
    "darkroom_request_duration_seconds",
    Kind.HISTOGRAM,
    "Time from the arrival of an admitted request to its answer, by outcome",
    label="outcome",
    buckets=_LONG,
)
QUEUE_SECONDS = Metric(
    "darkroom_queue_wait_seconds",
    Kind.HISTOGRAM,
    "Time from the arrival of a request to the start of its first step",
    buckets=_LONG,
)
STEP_SECONDS = Metric(
    "darkroom_step_duration_seconds",
    Kind.HISTOGRAM,
    "Time of one step of the running batch, by rows: up to 1, 2, 4, 8, 16, 32 or 63",
    label="rows",
    buckets=_SHORT,
)
BATCH_ROWS = Metric(
    "darkroom_batch_rows",
    Kind.HISTOGRAM,
    "Rows of a UNet call; its sum over its count is the mean occupancy",
    buckets=_ROWS,
)
BATCH_PICTURES = Metric(
    "darkroom_batch_pictures",
    Kind.HISTOGRAM,
    "Pictures that shared a UNet call",
    buckets=_ROWS,
)
MAX_ROWS = Metric("darkroom_max_rows", Kind.GAUGE, "Rows that a UNet call may have")
DECODE_SECONDS = Metric(
    "darkroom_decode_duration_seconds",
    Kind.HISTOGRAM,
    "Time of one call of the VAE decoder, with the encoding of its pictures",
    buckets=_LONG,
)
IMAGES = Metric("darkroom_images_total", Kind.COUNTER, "Pictures made")
WAITING = Metric("darkroom_waiting_pictures", Kind.GAUGE, "Pictures before their first step")
RUNNING = Metric("darkroom_running_pictures", Kind.GAUGE, "Pictures between first and last step")
PROMPT_LOOKUPS = Metric(
    "darkroom_prompt_cache_lookups_total",
    Kind.COUNTER,
    "Prompts looked up in the embedding cache, by result: hit or miss",
    label="result",
)
PROMPT_BYTES = Metric(
    "darkroom_prompt_cache_bytes", Kind.GAUGE, "Memory that cached prompt embeddings take"
)
NETWORK_FAILURES = Metric(
    "darkroom_network_failures_total",
    Kind.COUNTER,
    "Calls of a network that failed, by network",
    label="network",
)
DROPPED_EVENTS = Metric(
    "darkroom_dropped_events_total",
    Kind.COUNTER,
    "Step and preview events that were left out because their reader was too slow",
)
DROPPED_RECORDS = Metric(
    "darkroom_dropped_records_total",
    Kind.COUNTER,
    "What these metrics lack: records that were left out because nobody took them",
)

METRICS = (
    *(REQUESTS, REQUEST_SECONDS, QUEUE_SECONDS, STEP_SECONDS, BATCH_ROWS, BATCH_PICTURES),
    *(MAX_ROWS, DECODE_SECONDS, IMAGES, WAITING, RUNNING, PROMPT_LOOKUPS, PROMPT_BYTES),
    *(NETWORK_FAILURES, DROPPED_EVENTS, DROPPED_RECORDS),
)


class Record(Protocol):
    """Takes what a metric is told: adds to a counter, sets a gauge, observes in a histogram."""

    def __call__(self, metric: Metric, value: float, label: str = "") -> None:
        """`label` is the label's value, where the metric has one."""


def record_nothing(metric: Metric, value: float, label: str = "") -> None:
    """For an engine that nobody watches."""


def rows_label(num_rows: int) -> str:
    """The smallest of 1, 2, 4, 8, 16, 32 and 63 that is not below `num_rows`."""
    return next(str(n) for n in (1, 2, 4, 8, 16, 32, 63, num_rows) if n >= num_rows)
