"""Prompt embeddings, kept between requests."""

from collections import OrderedDict

import numpy as np

from darkroom_engine.networks import Networks
from darkroom_engine.sample import Conditioning
from darkroom_engine.tokenizer import PromptTokenizer


class PromptEncoder:
    """Text to conditioning, through a least-recently-used cache bounded in bytes."""

    def __init__(self, tokenizer: PromptTokenizer, networks: Networks, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._networks = networks
        self._capacity = cache_bytes
        self._size = 0
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()

    def encode(self, text: str) -> Conditioning:
        """The conditioning of one text.

        Texts are encoded one by one: a new text is rare beside the steps that it then runs, and
        alone its embedding cannot depend on who arrived at the same time.

        Raises:
            NetworkFailed: the text encoder failed.
        """
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        ids, _ = self._tokenizer.encode(text)
        outputs = self._networks.encode(ids[None])
        # Copies, because what is kept for long must not hold on to a response's shared memory.
        conditioning = {name: np.array(rows[0]) for name, rows in outputs.items()}
        self._remember(text, conditioning)
        return conditioning

    def truncation_notes(self, **texts: str) -> list[str]:
        """A sentence for each text, named by its field, that the text encoder cannot read whole."""
        notes = []
        for field, text in texts.items():
            _, num_cut = self._tokenizer.encode(text)
            if num_cut:
                notes.append(f"{field}: too long, its last {num_cut} tokens were cut off")
        return notes

    def _remember(self, text: str, conditioning: Conditioning) -> None:
        self._cache[text] = conditioning
        self._size += _num_bytes(text, conditioning)
        while self._size > self._capacity:
            self._size -= _num_bytes(*self._cache.popitem(last=False))


def _num_bytes(text: str, conditioning: Conditioning) -> int:
    return len(text) + sum(array.nbytes for array in conditioning.values())
