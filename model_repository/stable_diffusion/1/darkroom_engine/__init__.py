"""The engine that turns prompts into pictures; it needs neither Triton nor a GPU to be imported.

The life of a request:

1. The adapter parses a request into a frozen, validated `ImageRequest`.
2. `Engine.submit` makes a `Job` of it and puts one `Sample` per picture in the waiting queue.
3. Each turn the `Scheduler` retires cancelled and expired samples and admits waiting ones.
4. Admitted samples get their prompt embeddings (cached by text) and their own seeded noise, on the
   request's `Canvas` if it starts from a picture.
5. `StepBatch` gathers the samples of one group into one call of the `Denoiser`, each at its step.
6. Guidance and the solver's coefficient table advance every sample by its own row.
7. Finished samples go to the `Developer`, which decodes, encodes and answers.
8. The turn repeats while anyone waits or runs; otherwise the engine sleeps.
"""

from darkroom_engine.config import EngineConfig
from darkroom_engine.door import Door
from darkroom_engine.engine import Engine
from darkroom_engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    NetworkFailed,
    Overloaded,
)
from darkroom_engine.fleet import Fleet
from darkroom_engine.job import Job, JobResult
from darkroom_engine.journal import log_to_stderr
from darkroom_engine.manifest import Manifest, ManifestError
from darkroom_engine.metrics import METRICS, Metric
from darkroom_engine.metrics_sender import MetricsSender
from darkroom_engine.model_control import TritonModelControl
from darkroom_engine.networks import Networks, TritonNetworks
from darkroom_engine.notice import Notice
from darkroom_engine.profiles import MemoryProfile, Residence, TransientNetworks
from darkroom_engine.request import ImageRequest

__all__ = [
    "METRICS",
    "Cancelled",
    "DeadlineExceeded",
    "Door",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Fleet",
    "ImageRequest",
    "InvalidRequest",
    "Job",
    "JobResult",
    "Manifest",
    "ManifestError",
    "MemoryProfile",
    "Metric",
    "MetricsSender",
    "NetworkFailed",
    "Networks",
    "Notice",
    "Overloaded",
    "Residence",
    "TransientNetworks",
    "TritonModelControl",
    "TritonNetworks",
    "log_to_stderr",
]
