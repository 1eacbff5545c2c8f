"""Prompt embeddings, kept between requests."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.networks import Networks
from darkroom_engine.sample import Conditioning
from darkroom_engine.tokenizer import PromptTokenizer
from darkroom_engine.weighting import parse_weights

HIDDEN = "encoder_hidden_states"


class _Key(NamedTuple):
    """All that an embedding depends on."""

    text: str
    clip_skip: int
    max_embeddings_multiples: int


class PromptEncoder:
    """Text to conditioning, through a least-recently-used cache bounded in bytes.

    One thread may call `encode`; the other methods and the counters are for any thread.
    """

    def __init__(self, tokenizer: PromptTokenizer, networks: Networks, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._networks = networks
        self._capacity = cache_bytes
        self._cache: OrderedDict[_Key, Conditioning] = OrderedDict()
        self.num_hits = 0
        """Calls of `encode` that the cache answered."""
        self.num_misses = 0
        """Calls of `encode` that the text encoder ran for."""
        self.num_bytes = 0
        """Bytes in the cache, of texts and embeddings."""

    def encode(
        self, text: str, clip_skip: int = 0, max_embeddings_multiples: int = 1
    ) -> Conditioning:
        """The conditioning of one text: `encoder_hidden_states` (77 N, C), of N chunks.

        Texts are encoded one by one: a new text is rare beside the steps that it then runs, and
        alone its embedding cannot depend on who arrived at the same time.

        Args:
            text: a prompt, whose weights are written as `weighting` says.
            clip_skip: how many of the text encoder's last layers are left out, as in diffusers.
            max_embeddings_multiples: chunks that a long text may take, of 77 tokens each; a text
                takes as many as it needs.

        Raises:
            NetworkFailed: the text encoder failed.
            ValueError: a weight is out of range, see `validate`.
        """
        key = _Key(text, clip_skip, max_embeddings_multiples)
        if key in self._cache:
            self.num_hits += 1
        else:
            self.num_misses += 1
        return self._look_up(key)

    def validate(self, text: str) -> None:
        """Refuse a prompt that `encode` could not take.

        Raises:
            ValueError: a weight is out of range; the text says which.
        """
        parse_weights(text)

    def truncation_notes(self, max_embeddings_multiples: int = 1, /, **texts: str) -> list[str]:
        """A sentence for each text, named by its field, that the text encoder cannot read whole.

        Raises:
            ValueError: a weight is out of range, see `validate`.
        """
        notes = []
        for field, text in texts.items():
            num_cut = self._tokenizer.encode(text, max_embeddings_multiples).num_cut
            if num_cut:
                notes.append(f"{field}: too long, its last {num_cut} tokens were cut off")
        return notes

    def _look_up(self, key: _Key) -> Conditioning:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        conditioning = self._embed(key)
        self._remember(key, conditioning)
        return conditioning

    def _embed(self, key: _Key) -> Conditioning:
        tokens = self._tokenizer.encode(key.text, key.max_embeddings_multiples)
        # A copy, because what is kept for long must not hold on to a response's shared memory.
        hidden = np.array(self._networks.encode(tokens.ids, key.clip_skip)[HIDDEN])
        if tokens.is_weighted:
            empty = self._look_up(_Key("", key.clip_skip, 1))[HIDDEN]
            _apply_weights(hidden, tokens.weights, empty)
        return {HIDDEN: hidden.reshape(-1, hidden.shape[-1])}

    def _remember(self, key: _Key, conditioning: Conditioning) -> None:
        self._cache[key] = conditioning
        self.num_bytes += _num_bytes(key, conditioning)
        while self.num_bytes > self._capacity:
            self.num_bytes -= _num_bytes(*self._cache.popitem(last=False))


def _apply_weights(
    hidden: NDArray[np.float32], weights: NDArray[np.float32], empty: NDArray[np.float32]
) -> None:
    """Z <- z_empty + w (z - z_empty) for every token, as ComfyUI does it, in place.

    A token of weight 1 is not touched, so that it stays what it is to the bit.

    Args:
        hidden: (N, L, C), z.
        weights: (N, L), w.
        empty: (L, C), z_empty, the empty prompt's.
    """
    chunk, position = np.nonzero(weights != 1)
    neutral = empty[position]
    weight = weights[chunk, position, None]
    hidden[chunk, position] = neutral + weight * (hidden[chunk, position] - neutral)


def _num_bytes(key: _Key, conditioning: Conditioning) -> int:
    return len(key.text.encode()) + sum(array.nbytes for array in conditioning.values())
