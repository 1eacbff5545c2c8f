"""Engines over exported repositories in this process: the SDK's requests, without a server."""

from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from onnx_networks import OnnxNetworks
from PIL import Image

from darkroom import Latents, protocol
from darkroom_engine import Engine, EngineConfig, JobResult, Manifest

WAIT_S = 120.0
SEVERAL = {
    *("original_size", "crops_coords_top_left", "target_size", "controlnet", "control_image"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("lora", "lora_scale"),
}
"""The inputs that have several values."""


class Engines:
    """One engine for each repository, started when it is first asked."""

    def __init__(self, repository_of: Callable[[str], Path]) -> None:
        self._repository_of = repository_of
        self._engines: dict[str, Engine] = {}

    def ask(self, name: str, prompt: str, **options: Any) -> "Future[list[Any]]":
        """The pictures to come or, for the output format "latent", latents."""
        engine = self._engine(name)
        count = options.pop("num_images_per_prompt", None)
        is_latent = options.get("output_format") == "latent"
        if is_latent:
            del options["output_format"]
        make = protocol.latents_request if is_latent else protocol.generate_request
        request = make(name, prompt, count, None, options)
        fields = {
            input_name: tuple(array.tolist()) if input_name in SEVERAL else array.item()
            for input_name, array in request.inputs.items()
        }
        future: Future[list[Any]] = Future()

        def reply(answer: Any) -> None:
            if isinstance(answer, JobResult):
                future.set_result([_read(it, is_latent) for it in answer.pictures])
            else:
                future.set_exception(answer)

        engine.ask(fields, reply)
        return future

    def generate(self, name: str, prompt: str, **options: Any) -> list[Any]:
        return self.ask(name, prompt, **options).result(WAIT_S)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            repository = self._repository_of(name)
            manifest = Manifest.load(repository / "manifest.json")
            networks = OnnxNetworks(repository)
            engine = self._engines[name] = Engine(manifest, networks, EngineConfig(max_rows=32))
            engine.start()
        return self._engines[name]


def _read(encoded: bytes, is_latent: bool) -> Any:
    if is_latent:
        return Latents(np.load(BytesIO(encoded), allow_pickle=False), 0)
    return Image.open(BytesIO(encoded))
