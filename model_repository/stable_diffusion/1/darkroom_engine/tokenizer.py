"""Prompts to token ids, without transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from darkroom_engine.weighting import parse_weights


@dataclass(frozen=True)
class Tokens:
    """A prompt as N chunks of the length L that the text encoder reads, 77."""

    ids: NDArray[np.int64]
    """(N, L), each row a text of its own: its begin, its tokens, its end, padding."""
    weights: NDArray[np.float32]
    """(N, L), the weight of each token; 1 for those that stand in no prompt."""
    num_cut: int
    """Tokens that did not fit."""

    @property
    def is_weighted(self) -> bool:
        return bool((self.weights != 1).any())


class PromptTokenizer:
    """CLIP's byte-pair tokenizer as the checkpoint configured it, for weighted and long prompts."""

    def __init__(
        self,
        path: Path,
        *,
        max_length: int,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self._bos = bos_token_id
        self._eos = eos_token_id
        self._pad = pad_token_id

    @classmethod
    def from_config(cls, config: Mapping[str, Any], directory: Path) -> "PromptTokenizer":
        """Read the manifest's `tokenizer`; its `file` is relative to `directory`."""
        options = dict(config)
        return cls(directory / options.pop("file"), **options)

    def encode(self, text: str, max_chunks: int = 1) -> Tokens:
        """The tokens of a prompt, whose weights are written as `weighting` says.

        Raises:
            ValueError: a weight is out of range.
        """
        ids: list[int] = []
        weights: list[float] = []
        for segment, weight in parse_weights(text):
            # Apart, so that no token is of two weights.
            found = self._tokenizer.encode(segment, add_special_tokens=False).ids
            ids += found
            weights += [weight] * len(found)
        room = self._max_length - 2
        num_kept = min(len(ids), max_chunks * room)
        # The empty prompt is a chunk too.
        starts = range(0, max(num_kept, 1), room)
        chunks = [slice(start, min(start + room, num_kept)) for start in starts]
        return Tokens(
            ids=np.array([self._framed(ids[chunk]) for chunk in chunks], np.int64),
            weights=np.array([self._aligned(weights[chunk]) for chunk in chunks], np.float32),
            num_cut=len(ids) - num_kept,
        )

    def _framed(self, ids: list[int]) -> list[int]:
        framed = [self._bos, *ids, self._eos]
        return framed + [self._pad] * (self._max_length - len(framed))

    def _aligned(self, weights: list[float]) -> list[float]:
        return [1.0, *weights] + [1.0] * (self._max_length - 1 - len(weights))
