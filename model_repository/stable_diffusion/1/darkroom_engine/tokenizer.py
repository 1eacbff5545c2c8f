"""Prompts to token ids, without transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


class PromptTokenizer:
    """CLIP's byte-pair tokenizer as the checkpoint configured it."""

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

    def encode(self, text: str) -> tuple[NDArray[np.int64], int]:
        """Token ids (max_length,), padded or truncated, and how many tokens were cut off."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = self._max_length - 2
        kept = [self._bos, *ids[:room], self._eos]
        kept += [self._pad] * (self._max_length - len(kept))
        return np.array(kept, np.int64), max(0, len(ids) - room)
