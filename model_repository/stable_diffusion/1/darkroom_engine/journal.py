"""Log lines as JSON objects, so that a log collector can tell requests apart."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from darkroom_engine.errors import EngineError
from darkroom_engine.job import Job, JobResult

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One line of JSON a record; what is passed as `extra={"fields": {...}}` stands in it."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "model": self._model,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(model: str) -> None:
    """Send the log of this process to stderr, which Triton puts into the server's.

    Every line names the model, since a server may have several.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(model))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_end(job: Job, answer: JobResult | EngineError) -> None:
    """One line for each admitted request when it is answered; prompts are nobody's business."""
    request = job.request
    is_error = isinstance(answer, EngineError)
    fields = {
        "request_id": job.request_id,
        "outcome": answer.outcome if isinstance(answer, EngineError) else "image",
        **({"error": str(answer)} if is_error else {}),
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
        "width": request.width,
        "height": request.height,
        "num_images_per_prompt": request.num_images_per_prompt,
        "is_streamed": job.listener is not None,
        **job.timings(),
    }
    logger.log(logging.WARNING if is_error else logging.INFO, "request", extra={"fields": fields})


def log_refusal(request_id: str, error: EngineError) -> None:
    """One line for each request that was not admitted."""
    fields = {"request_id": request_id, "outcome": error.outcome, "error": str(error)}
    logger.warning("request", extra={"fields": fields})
