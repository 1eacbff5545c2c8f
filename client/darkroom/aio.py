"""The asynchronous client, over gRPC."""

from types import TracebackType
from typing import Self, Unpack

import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from darkroom import protocol
from darkroom.client import DEFAULT_TIMEOUT_S, READY_TIMEOUT_S
from darkroom.exceptions import InvalidRequest, from_status
from darkroom.picture import Picture
from darkroom.protocol import Options
from darkroom.transport import split_url


class AsyncClient:
    """`Client` for asyncio; cancelling the awaiting task cancels the request on the server."""

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        model: str = protocol.MODEL,
    ) -> None:
        scheme, address = split_url(url)
        if scheme != "grpc":
            raise InvalidRequest(f"url: {url!r} is not host:port or grpc://host:port")
        self._client = tritonclient.grpc.aio.InferenceServerClient(address)
        self._timeout = timeout
        self._model = model

    async def generate(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        timeout: float | None = None,  # noqa: ASYNC109  gRPC's own deadline, which the server sees
        **options: Unpack[Options],
    ) -> list[Picture]:
        """Generate a list of `num_images_per_prompt` pictures; otherwise as `Client.generate`."""
        fields = protocol.fields(prompt, num_images_per_prompt, options)
        triton = tritonclient.grpc.aio
        try:
            result = await self._client.infer(
                self._model,
                protocol.build_inputs(triton, fields),
                outputs=protocol.build_outputs(triton),
                client_timeout=self._timeout if timeout is None else timeout,
            )
        except InferenceServerException as error:
            raise from_status(error.status(), error.message()) from error
        return protocol.parse(result)

    async def is_ready(self) -> bool:
        """Whether the server answers and has the model loaded."""
        timeout = min(self._timeout, READY_TIMEOUT_S)
        try:
            return bool(await self._client.is_model_ready(self._model, client_timeout=timeout))
        except InferenceServerException:
            return False

    async def close(self) -> None:
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
