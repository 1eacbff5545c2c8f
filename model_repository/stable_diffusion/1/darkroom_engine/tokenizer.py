"""Prompts to token ids, without transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from darkroom_engine.weighting import parse_weights


@dataclass(frozen=True)
class Tokens:
    """A prompt as N chunks of the length L that a text encoder reads, CLIP's 77."""

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
    """CLIP's or T5's tokenizer as the checkpoint configured it, for weighted and long prompts."""

    def __init__(
        self,
        path: Path,
        *,
        max_length: int,
        bos_token_id: int | None,
        eos_token_id: int,
        pad_token_id: int,
    ) -> None:
        """Read the file of the `tokenizers` library; `bos_token_id` is None if no text has one."""
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length
        self._begin = [] if bos_token_id is None else [bos_token_id]
        self._eos = eos_token_id
        self._pad = pad_token_id

    @classmethod
    def from_config(cls, config: Mapping[str, Any], directory: Path) -> "PromptTokenizer":
        """Read a `tokenizer` of the manifest; its `file` is relative to `directory`."""
        options = dict(config)
        return cls(directory / options.pop("file"), **options)

    def encode(self, text: str, max_chunks: int = 1) -> Tokens:
        """The tokens of a prompt, whose weights are written as `weighting` says.

        Where a weight begins or ends, a word does, too: `c(at:1.2)` is read as `c (at:1.2)`.

        Raises:
            ValueError: a weight is out of range.
        """
        ids: list[int] = []
        weights: list[float] = []
        segments = parse_weights(text)
        for number, (segment, weight) in enumerate(segments, start=1):
            # Apart, so that no token is of two weights. T5 has a token for a blank that no word
            # follows, which must not come of a blank before a parenthesis.
            words = segment if number == len(segments) else segment.rstrip()
            found = self._tokenizer.encode(words, add_special_tokens=False).ids
            ids += found
            weights += [weight] * len(found)
        room = self.max_length - len(self._begin) - 1  # its end
        num_kept = min(len(ids), max_chunks * room)
        # The empty prompt is a chunk too.
        starts = range(0, max(num_kept, 1), room)
        chunks = [slice(start, min(start + room, num_kept)) for start in starts]
        return Tokens(
            ids=np.array([self._framed(ids[chunk]) for chunk in chunks], np.int64),
            weights=np.array([self._aligned(weights[chunk]) for chunk in chunks], np.float32),
            num_cut=len(ids) - num_kept,
        )

    def extend(self, tokens: Tokens, num_chunks: int) -> Tokens:
        """The same with empty prompts behind it, to so many chunks in all."""
        num_missing = num_chunks - len(tokens.ids)
        empty = self.encode("")
        return replace(
            tokens,
            ids=np.concatenate([tokens.ids, *[empty.ids] * num_missing]),
            weights=np.concatenate([tokens.weights, *[empty.weights] * num_missing]),
        )

    def _framed(self, ids: list[int]) -> list[int]:
        framed = [*self._begin, *ids, self._eos]
        return framed + [self._pad] * (self.max_length - len(framed))

    def _aligned(self, weights: list[float]) -> list[float]:
        aligned = [1.0] * len(self._begin) + weights
        return aligned + [1.0] * (self.max_length - len(aligned))
