"""Prompt embeddings, kept between requests."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darkroom_engine.arrays import Array
from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import ManifestError
from darkroom_engine.networks import Conditioning, Networks
from darkroom_engine.text_encoder import NAMES, TextEncoder
from darkroom_engine.tokenizer import Tokens
from darkroom_engine.weighting import parse_weights

HIDDEN = "encoder_hidden_states"
EMPTY_NEGATIVES = ("encode", "zeros")


class _Key(NamedTuple):
    """All that an embedding depends on."""

    text: str | None
    """None for zeros in the place of a text."""
    clip_skip: int
    max_embeddings_multiples: int
    networks: tuple[str, ...]
    """Those that run, one for each text encoder."""


class _Place(NamedTuple):
    """Where the states of one text encoder stand among those of all, (L, D)."""

    tokens: slice
    features: slice


class PromptEncoder:
    """Text to conditioning, through a least-recently-used cache bounded in bytes.

    One thread may call `encode`; the other methods and the counters are for any thread.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        networks: Networks,
        cache_bytes: int,
        *,
        hidden_size: int,
        pooled_input: str | None,
        empty_negative: str,
        num_blank_tokens: int,
    ) -> None:
        """Join several encoders' answers; `from_config` says what the options are.

        Raises:
            ManifestError: the options do not fit together, or are not known here.
        """
        if not encoders:
            raise ManifestError("text: no encoders are named")
        if empty_negative not in EMPTY_NEGATIVES:
            raise ManifestError(
                f"text: empty_negative is {empty_negative!r}, known are "
                f"{', '.join(EMPTY_NEGATIVES)}"
            )
        if pooled_input and not any(encoder.pooled for encoder in encoders):
            raise ManifestError(f"text: no encoder has pooled embeddings for {pooled_input}")
        self._encoders = encoders
        self._networks = networks
        self._capacity = cache_bytes
        self._hidden_size = hidden_size
        self._pooled_input = pooled_input
        self._is_zeros_if_left_out = empty_negative == "zeros"
        self._num_blank_tokens = num_blank_tokens
        self._cache: OrderedDict[_Key, Conditioning] = OrderedDict()
        self.num_hits = 0
        """Calls of `encode` that the cache answered."""
        self.num_misses = 0
        """Calls of `encode` that the text encoders ran for."""
        self.num_bytes = 0
        """Bytes in the cache, of texts and embeddings."""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], directory: Path, networks: Networks, cache_bytes: int
    ) -> "PromptEncoder":
        """Read the manifest's `text`; its files are relative to `directory`.

        Its `encoders` come in the order in which their embeddings are joined. `hidden_size` is the
        number of features of a token in the end, `pooled_input` the denoiser's input for what sums
        a text up, if it has one, `empty_negative` what a negative prompt is that was left out, and
        `num_blank_tokens` how many zeros follow the tokens, for a T5 that is not there.

        Raises:
            ManifestError: an option is not known here.
        """
        options = dict(config)
        encoders = [
            TextEncoder.from_config(record, directory) for record in options.pop("encoders")
        ]
        return cls(encoders, networks, cache_bytes, **options)

    @property
    def probe_calls(self) -> list[tuple[str, dict[str, Array], list[str]]]:
        """For each text encoder the network, inputs and outputs of a small call to try it with."""
        return [encoder.probe_call for encoder in self._encoders]

    def encode(
        self,
        text: str | None,
        clip_skip: int = 0,
        max_embeddings_multiples: int = 1,
        variant_networks: Mapping[str, str] | None = None,
    ) -> Conditioning:
        """The conditioning of one text: `encoder_hidden_states` (L, D) and what sums it up, (P,).

        CLIP's encoders stand side by side, in D, on 77 tokens for each of N chunks; T5's tokens
        follow in L, all of one chunk. What sums a text up, where the denoiser has an input for it,
        is of each encoder's first chunk alone, and knows nothing of weights.

        Texts are encoded one by one: a new text is rare beside the steps that it then runs, and
        alone its embedding cannot depend on who arrived at the same time.

        Args:
            text: a prompt, whose weights are written as `weighting` says; None for a negative
                prompt that was left out, which is zeros or the empty prompt, as the manifest says.
            clip_skip: how many of the CLIP encoders' last layers are left out, as in diffusers.
            max_embeddings_multiples: chunks that a long text may take, of 77 tokens each; a text
                takes as many as it needs for CLIP, and one for T5.
            variant_networks: what runs in the place of which network.

        Raises:
            NetworkFailed: a text encoder failed.
            ValueError: a weight is out of range, see `validate`.
        """
        if text is None and not self._is_zeros_if_left_out:
            text = ""
        replaced = variant_networks or {}
        names = tuple(replaced.get(encoder.network, encoder.network) for encoder in self._encoders)
        key = _Key(text, clip_skip, max_embeddings_multiples, names)
        if key in self._cache:
            self.num_hits += 1
        else:
            self.num_misses += 1
        return self._look_up(key)

    def validate(self, text: str | None) -> None:
        """Refuse a prompt that `encode` could not take.

        Raises:
            ValueError: a weight is out of range; the text says which.
        """
        parse_weights(text or "")

    def truncation_notes(
        self, max_embeddings_multiples: int = 1, /, **texts: str | None
    ) -> list[str]:
        """A sentence for each text, named by its field, that a text encoder cannot read whole.

        Raises:
            ValueError: a weight is out of range, see `validate`.
        """
        notes = []
        for field, text in texts.items():
            num_cut = dict.fromkeys((encoder.kind for encoder in self._encoders), 0)
            all_tokens = self._tokens(text or "", max_embeddings_multiples)
            for encoder, tokens in zip(self._encoders, all_tokens, strict=True):
                num_cut[encoder.kind] = max(num_cut[encoder.kind], tokens.num_cut)
            if any(num_cut.values()):
                notes.append(f"{field}: too long, its last {_told(num_cut)}")
        return notes

    def _look_up(self, key: _Key) -> Conditioning:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        conditioning = self._embed(key)
        self._remember(key, conditioning)
        return conditioning

    def _embed(self, key: _Key) -> Conditioning:
        if key.text is None:
            return {name: np.zeros_like(array) for name, array in self._empty(key).items()}
        all_tokens = self._tokens(key.text, key.max_embeddings_multiples)
        states, pooled = [], []
        for encoder, network, tokens in zip(self._encoders, key.networks, all_tokens, strict=True):
            hidden, summary = encoder.run(self._networks, network, tokens.ids, key.clip_skip)
            states.append(hidden)
            if summary is not None:
                pooled.append(summary)
        joined = self._join(states, key.networks)
        self._apply_weights(joined, key, all_tokens, states)
        conditioning = {HIDDEN: joined}
        if self._pooled_input:
            conditioning[self._pooled_input] = np.concatenate(pooled)
        return conditioning

    def _empty(self, key: _Key) -> Conditioning:
        """The empty prompt, read in the same way."""
        return self._look_up(key._replace(text="", max_embeddings_multiples=1))

    def _tokens(self, text: str, max_embeddings_multiples: int) -> list[Tokens]:
        """What each encoder reads; as many chunks for each of CLIP's, to stand side by side."""
        read = [
            encoder.tokenizer.encode(text, max_embeddings_multiples if encoder.is_clip else 1)
            for encoder in self._encoders
        ]
        num_chunks = max(len(tokens.ids) for tokens in read)
        return [
            encoder.tokenizer.extend(tokens, num_chunks if encoder.is_clip else 1)
            for encoder, tokens in zip(self._encoders, read, strict=True)
        ]

    def _join(
        self, states: list[NDArray[np.float32]], networks: tuple[str, ...]
    ) -> NDArray[np.float32]:
        """Hidden states (N, L, C) of each encoder to those of all; a copy, and zeros elsewhere.

        A copy, because what is kept for long must not hold on to a response's shared memory.
        """
        places = self._places([array.shape for array in states])
        width = max(place.features.stop for place in places)
        is_filled = width == self._hidden_size
        # Without T5 nothing else is of the width that it would have.
        if not is_filled and not (self._num_blank_tokens and width < self._hidden_size):
            raise NetworkFailed(
                _listed(networks), f"made {width} features, expected {self._hidden_size}"
            )
        num_tokens = max(place.tokens.stop for place in places) + self._num_blank_tokens
        joined = np.zeros((num_tokens, self._hidden_size), np.float32)
        for place, array in zip(places, states, strict=True):
            joined[place] = array.reshape(-1, array.shape[-1])
        return joined

    def _places(self, shapes: Sequence[tuple[int, ...]]) -> list[_Place]:
        """Where each encoder's hidden states (N, L, C) stand among those of all."""
        places = []
        sizes = [(num_chunks * length, width) for num_chunks, length, width in shapes]
        pairs = list(zip(self._encoders, sizes, strict=True))
        feature, token = 0, max((n for encoder, (n, _) in pairs if encoder.is_clip), default=0)
        for encoder, (num_tokens, width) in pairs:
            if encoder.is_clip:
                places.append(_Place(slice(0, num_tokens), slice(feature, feature + width)))
                feature += width
            else:
                places.append(_Place(slice(token, token + num_tokens), slice(0, width)))
                token += num_tokens
        return places

    def _apply_weights(
        self,
        joined: NDArray[np.float32],
        key: _Key,
        all_tokens: list[Tokens],
        states: list[NDArray[np.float32]],
    ) -> None:
        """Apply each encoder's weights to its part of the joined hidden states, in place."""
        if not any(tokens.is_weighted for tokens in all_tokens):
            return
        empty = self._empty(key)[HIDDEN]
        places = self._places([array.shape for array in states])
        empty_places = self._places([(1, *array.shape[1:]) for array in states])
        for tokens, place, empty_place in zip(all_tokens, places, empty_places, strict=True):
            _weigh(joined[place], tokens.weights, empty[empty_place])

    def _remember(self, key: _Key, conditioning: Conditioning) -> None:
        self._cache[key] = conditioning
        self.num_bytes += _num_bytes(key, conditioning)
        while self.num_bytes > self._capacity:
            self.num_bytes -= _num_bytes(*self._cache.popitem(last=False))


def _weigh(
    hidden: NDArray[np.float32], weights: NDArray[np.float32], empty: NDArray[np.float32]
) -> None:
    """Z <- z_empty + w (z - z_empty) for every token, as ComfyUI does it, in place.

    A token of weight 1 is not touched, so that it stays what it is to the bit.

    Args:
        hidden: (N L, C), z.
        weights: (N, L), w.
        empty: (L, C), z_empty, the empty prompt's.
    """
    chunk, position = np.nonzero(weights != 1)
    row = chunk * weights.shape[1] + position
    neutral = empty[position]
    weight = weights[chunk, position, None]
    hidden[row] = neutral + weight * (hidden[row] - neutral)


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _told(num_cut: Mapping[str, int]) -> str:
    """What was cut, by kind of text encoder."""
    if len(num_cut) == 1:
        (count,) = num_cut.values()
        return f"{count} tokens were cut off"
    kinds = [f"{count or 'none'} for {NAMES[kind]}" for kind, count in num_cut.items()]
    return f"tokens were cut off: {', '.join(kinds)}"


def _num_bytes(key: _Key, conditioning: Conditioning) -> int:
    text = key.text or ""
    num_bytes: int = sum(array.nbytes for array in conditioning.values())
    return len(text.encode()) + num_bytes
