"""Prompts as people write them: weights, long texts, several encoders, and the cache of them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_text_encoders import POOLED_WIDTH, FakeTextEncoders
from tiny_tokenizers import write_byte_tokenizer, write_t5_tokenizer

from darkroom_engine.errors import NetworkFailed
from darkroom_engine.manifest import ManifestError
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.tokenizer import PromptTokenizer
from darkroom_engine.weighting import WEIGHTS, parse_weights

BOS, EOS = 300, 301
HIDDEN = 6
WIDTHS = {
    "text_encoder": HIDDEN,
    "text_encoder_2": 4,
    "text_encoder_3": 12,
    "text_encoder_painted": HIDDEN,
}


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("(a cat)", [("a cat", 1.1)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((a) b)", [("a", 1.1 * 1.1), (" b", 1.1)]),
        ("(a:1.3) b", [("a", 1.3), (" b", 1.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:-1.5)", [("a", -1.5)]),
        ("(a:+.5)", [("a", 0.5)]),
        ("(a:2.)", [("a", 2.0)]),
        ("(a:5e-1)", [("a", 0.5)]),
        ("(a : 1.3 )", [("a ", 1.3)]),
        ("(a:b:1.3)", [("a:b", 1.3)]),
        ("((a:1.5))", [("a", 1.5 * 1.1)]),
        ("((a):1.5)", [("a", 1.1 * 1.5)]),
        ("((a:2):0.5)", [("a", 1.0)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(a (b))", [("a ", 1.1), ("b", 1.1 * 1.1)]),
        ("(a)(b)", [("a", 1.1), ("b", 1.1)]),
    ],
)
def test_weights_are_read(text: str, segments: list[tuple[str, float]]) -> None:
    parsed = parse_weights(text)

    assert [segment for segment, _ in parsed] == [segment for segment, _ in segments]
    assert [w for _, w in parsed] == pytest.approx([w for _, w in segments], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        # Parentheses that have no partner.
        ("(", [("(", 1.0)]),
        (")", [(")", 1.0)]),
        (")(", [(")(", 1.0)]),
        ("a :( b", [("a :( b", 1.0)]),
        ("a (red cat", [("a (red cat", 1.0)]),
        ("a red) cat", [("a red) cat", 1.0)]),
        ("sad :( (cat:1.2)", [("sad :( ", 1.0), ("cat", 1.2)]),
        ("(a)) b", [("a", 1.1), (") b", 1.0)]),
        ("((a)", [("(", 1.0), ("a", 1.1)]),
        ("(a:1.3", [("(a:1.3", 1.0)]),
        # Escaped ones.
        (r"\(a\)", [("(a)", 1.0)]),
        (r"(a \(b\))", [("a (b)", 1.1)]),
        (r"(a\):1.3)", [("a)", 1.3)]),
        (r"(\(:1.3)", [("(", 1.3)]),
        (r"(a:1\)3)", [("a:1)3", 1.1)]),
        (r"C:\dir\ (a)", [("C:\\dir\\ ", 1.0), ("a", 1.1)]),
        ("a\\", [("a\\", 1.0)]),
        # What is no number.
        ("(a:)", [("a:", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("(a:1.3.2)", [("a:1.3.2", 1.1)]),
        ("(a:1_0)", [("a:1_0", 1.1)]),
        ("(a: nan)", [("a: nan", 1.1)]),
        ("(a:inf)", [("a:inf", 1.1)]),
        ("(a:\u0663)", [("a:\u0663", 1.1)]),
        ("(a:1.3 b)", [("a:1.3 b", 1.1)]),
        ("a:1.3", [("a:1.3", 1.0)]),
        # Nothing in them.
        ("()", []),
        ("a()b", [("a", 1.0), ("b", 1.0)]),
        ("(()())", []),
        ("(( ))", [(" ", 1.1 * 1.1)]),
        # Square brackets and braces mean nothing.
        ("[a] {b|c} <lora:x:1>", [("[a] {b|c} <lora:x:1>", 1.0)]),
    ],
)
def test_what_is_no_weight_is_text(text: str, segments: list[tuple[str, float]]) -> None:
    parsed = parse_weights(text)

    assert [segment for segment, _ in parsed] == [segment for segment, _ in segments]
    assert [w for _, w in parsed] == pytest.approx([w for _, w in segments], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(a cat:1e9)", r"^weight 1e\+09 of 'a cat' is out of range, allowed are -10 to 10$"),
        ("(a:-10.5)", r"^weight -10.5 of 'a' is out of range, allowed are -10 to 10$"),
        ("(a:1e999)", "^weight inf of 'a'"),
        ("((a:4):4)", "^weight 16 of 'a'"),
        ("((a:0):1e999)", "^weight nan of 'a'"),
        ("(" * 30 + "a" + ")" * 30, "^weight 17.4494 of 'a'"),
        (f"({'long ' * 50}:11)", r"^weight 11 of '(long ){8}\.\.\.' is out of range"),
    ],
)
def test_a_weight_out_of_range_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(text)


def test_weights_at_the_ends_of_the_range_are_taken() -> None:
    low, high = WEIGHTS

    assert parse_weights(f"(a:{low})(b:{high})") == [("a", low), ("b", high)]


@pytest.mark.parametrize(
    "text",
    [
        "(" * 16_384,
        ")" * 16_384,
        "()" * 8_192,
        "(" * 8_192 + ")" * 8_192,
        "\\" * 16_384,
        "(a:" + "1" * 16_000 + "x)",
        "(a:" + "1." * 8_000 + ")",
        "(a" + ":1" * 8_000 + ":)",
        "(a:" + " " * 16_000 + "x)",
    ],
    ids=range(9),
)
def test_long_odd_texts_are_read(text: str) -> None:
    letters = "".join(segment for segment, _ in parse_weights(text))

    assert len(letters) <= len(text)


def test_hundreds_of_nested_parentheses_are_read() -> None:
    depth = 5_000
    text = "(" * depth + "a" + ":1)" * depth

    assert parse_weights(text) == [("a", 1.0)]


def test_whatever_is_written_is_kept_or_refused() -> None:
    rng = random.Random(7)
    num_kept = 0
    for _ in range(3_000):
        words = rng.choices(["(", ")", "\\", ":", "1.3", "-2", "9", "a", " ", "é"], k=12)
        text = "".join(words)
        try:
            segments = parse_weights(text)
        except ValueError as error:
            assert "is out of range, allowed are -10 to 10" in str(error)  # noqa: PT017
            continue
        num_kept += 1
        low, high = WEIGHTS
        assert all(segment and low <= weight <= high for segment, weight in segments)
        kept = "".join(segment for segment, _ in segments)
        # Nothing is added or moved, and no word is lost.
        letters = iter(text)
        assert all(letter in letters for letter in kept)
        assert [c for c in kept if c in "aé"] == [c for c in text if c in "aé"]
    assert num_kept > 2_000


def test_escaping_makes_any_text_literal() -> None:
    text = "a (very:1.3) ((odd)) :) text"
    escaped = text.replace("(", r"\(").replace(")", r"\)")

    assert parse_weights(escaped) == [(text, 1.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizers of a repository."""
    write_byte_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    write_byte_tokenizer(tmp_path / "tokenizer_2" / "tokenizer.json", merges=[("x", "x")])
    write_t5_tokenizer(tmp_path / "tokenizer_3" / "tokenizer.json")
    write_t5_tokenizer(tmp_path / "tokenizer_4" / "tokenizer.json", splits_words=False)
    return tmp_path


def clip(number: str = "", pad_token_id: int = EOS, **options: Any) -> dict[str, Any]:
    """A manifest's record of a CLIP encoder."""
    return {
        "network": f"text_encoder{number}",
        "kind": "clip",
        "tokenizer": {
            "file": f"tokenizer{number}/tokenizer.json",
            "max_length": 77,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": pad_token_id,
        },
        "hidden": "last_hidden_state",
        "layers": "hidden_states",
        "pooled": None,
        **options,
    }


def t5(number: str = "_3", max_length: int = 16) -> dict[str, Any]:
    """A manifest's record of a T5 encoder."""
    return {
        "network": f"text_encoder{number}",
        "kind": "t5",
        "tokenizer": {
            "file": f"tokenizer{number}/tokenizer.json",
            "max_length": max_length,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        "hidden": "last_hidden_state",
        "layers": None,
        "pooled": None,
    }


def text_record(*encoders: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A manifest's `text`."""
    return {
        "encoders": list(encoders),
        "hidden_size": HIDDEN,
        "pooled_input": None,
        "empty_negative": "encode",
        "num_blank_tokens": 0,
        **options,
    }


SD1 = text_record(clip())
CLIPS = (clip(pooled="text_embeds"), clip("_2", pad_token_id=0, pooled="text_embeds"))
SDXL = text_record(
    clip(), CLIPS[1], hidden_size=10, pooled_input="text_embeds", empty_negative="zeros"
)
SD3 = text_record(*CLIPS, t5(), hidden_size=12, pooled_input="pooled_projections")
SD3_WITHOUT_T5 = text_record(
    *CLIPS, hidden_size=12, pooled_input="pooled_projections", num_blank_tokens=16
)


@pytest.fixture
def tokenizer(folder: Path) -> PromptTokenizer:
    """CLIP's, of one token per byte."""
    return PromptTokenizer.from_config(clip()["tokenizer"], folder)


def test_tokens_carry_the_weight_of_their_segment(tokenizer: PromptTokenizer) -> None:
    plain = tokenizer.encode("abc")
    tokens = tokenizer.encode("a(b:2)c")

    assert tokens.ids.tolist() == plain.ids.tolist()
    assert tokens.weights[0, :5].tolist() == [1, 1, 2, 1, 1]
    assert (tokens.weights[0, 5:] == 1).all()
    assert (tokens.is_weighted, plain.is_weighted) == (True, False)


@pytest.mark.parametrize(
    ("num_letters", "max_chunks", "num_chunks", "num_cut"),
    [
        (0, 1, 1, 0),
        (0, 4, 1, 0),
        (1, 4, 1, 0),
        (75, 4, 1, 0),
        (76, 1, 1, 1),
        (76, 2, 2, 0),
        (150, 4, 2, 0),
        (151, 2, 2, 1),
        (151, 4, 3, 0),
        (300, 4, 4, 0),
        (400, 4, 4, 100),
    ],
)
def test_a_long_prompt_takes_as_many_chunks_as_it_needs_and_may_take(
    tokenizer: PromptTokenizer, num_letters: int, max_chunks: int, num_chunks: int, num_cut: int
) -> None:
    letters = "".join(chr(ord("a") + n % 26) for n in range(num_letters))
    tokens = tokenizer.encode(letters, max_chunks)

    assert tokens.ids.shape == tokens.weights.shape == (num_chunks, 77)
    assert tokens.num_cut == num_cut
    assert (tokens.ids[:, 0] == BOS).all()
    assert (tokens.ids[:, -1] == EOS).all()
    inside = tokens.ids[:, 1:-1].ravel()
    expected = [tokenizer.encode(letter).ids[0, 1] for letter in letters[: num_letters - num_cut]]
    assert inside[: len(expected)].tolist() == expected
    assert (inside[len(expected) :] == EOS).all()


def test_weights_keep_to_their_tokens_across_chunks(tokenizer: PromptTokenizer) -> None:
    tokens = tokenizer.encode("a" * 70 + "(" + "b" * 10 + ":1.5)", 2)

    assert np.flatnonzero(tokens.weights[0] != 1).tolist() == [71, 72, 73, 74, 75]
    assert np.flatnonzero(tokens.weights[1] != 1).tolist() == [1, 2, 3, 4, 5]


def ids_of(text: str, *, pad: int = EOS) -> list[int]:
    """CLIP's row of a short text, one token per byte."""
    # The bytes' letters in order of their code, as the tokenizer's file has them.
    letters = [ord(letter) - ord("!") for letter in text]
    return [BOS, *letters, EOS, *[pad] * (75 - len(letters))]


@pytest.mark.parametrize("splits_words", [True, False], ids=["words", "blanks"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("a red cat", ["▁a", "▁red", "▁cat"]),
        ("(a red:1.2) cat", ["▁a", "▁red", "▁cat"]),
        ("a (red:1.3) cat", ["▁a", "▁red", "▁cat"]),
        ("a (red:1.3) (cat)", ["▁a", "▁red", "▁cat"]),
        ("a( red )cat", ["▁a", "▁red", "▁cat"]),
        ("red(cat)", ["▁red", "▁cat"]),
        ("redcat", ["▁red", "cat"]),
        ("a(,)", ["▁a", "▁", ","]),
    ],
)
def test_t5_starts_a_word_where_a_weight_starts_and_reads_no_blanks_beside_it(
    folder: Path, text: str, words: list[str], splits_words: bool
) -> None:
    config = t5("_3" if splits_words else "_4")["tokenizer"]
    tokenizer = PromptTokenizer.from_config(config, folder)
    (ids,) = tokenizer.encode(text).ids

    tokens = [tokenizer._tokenizer.id_to_token(token) for token in ids]
    assert tokens == [*words, "</s>", *["<pad>"] * (15 - len(words))]


def test_t5_has_an_end_and_no_beginning(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_config(t5()["tokenizer"], folder)
    fitting, cut = tokenizer.encode("a " * 15), tokenizer.encode("(a:2) " * 18)

    assert (fitting.num_cut, cut.num_cut) == (0, 3)
    assert cut.ids.tolist() == fitting.ids.tolist()
    assert cut.ids[0, -1] == 1
    assert cut.weights.tolist() == [[2] * 15 + [1]]


@pytest.fixture
def networks() -> FakeTextEncoders:
    return FakeTextEncoders(WIDTHS)


@pytest.fixture
def encoder(folder: Path, networks: FakeTextEncoders) -> PromptEncoder:
    return make_encoder(SD1, folder, networks)


def make_encoder(
    record: dict[str, Any], folder: Path, networks: FakeTextEncoders, cache_bytes: int = 2**20
) -> PromptEncoder:
    return PromptEncoder.from_config(record, folder, networks, cache_bytes)


def hidden(encoder: PromptEncoder, text: str | None, *options: Any) -> np.ndarray:
    return encoder.encode(text, *options)["encoder_hidden_states"]


def answer(network: str, ids: list[int], output: str = "last_hidden_state") -> np.ndarray:
    """What a network makes of one row."""
    inputs = {"input_ids": np.array([ids], np.int64)}
    return FakeTextEncoders(WIDTHS).run(network, inputs, [output])[0][0]


def test_a_short_prompt_is_one_chunk_whatever_it_may_take(encoder: PromptEncoder) -> None:
    once, often = hidden(encoder, "acat", 0, 1), hidden(encoder, "acat", 0, 4)

    assert np.array_equal(once, answer("text_encoder", ids_of("acat")))
    assert once.dtype == np.float32
    assert np.array_equal(once, often)


def test_one_encoder_without_pooling_gives_hidden_states_alone(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    assert encoder.encode("a cat").keys() == {"encoder_hidden_states"}
    assert [outputs for _, _, outputs in networks.calls] == [["last_hidden_state"]]


def test_the_chunks_of_a_long_prompt_are_joined(encoder: PromptEncoder) -> None:
    first, second, rest = "a" * 75, "b" * 75, "c" * 10
    joined = hidden(encoder, first + second + rest, 0, 4)

    assert joined.shape == (3 * 77, HIDDEN)
    expected = np.concatenate([hidden(encoder, text) for text in (first, second, rest)])
    assert np.array_equal(joined, expected)


def test_a_chunk_too_many_is_cut(encoder: PromptEncoder) -> None:
    assert np.array_equal(hidden(encoder, "a" * 500, 0, 2), hidden(encoder, "a" * 150, 0, 2))


def test_a_weight_scales_the_distance_from_the_empty_prompt(encoder: PromptEncoder) -> None:
    plain, empty = hidden(encoder, "abc"), hidden(encoder, "")
    weighted = hidden(encoder, "a(b:1.5)c")

    expected = plain.copy()
    expected[2] = empty[2] + np.float32(1.5) * (plain[2] - empty[2])
    assert np.array_equal(weighted, expected)
    assert not np.allclose(weighted[2], plain[2])


def test_weights_reach_every_chunk(encoder: PromptEncoder) -> None:
    text = "a" * 75 + "b"
    plain, empty = hidden(encoder, text, 0, 2), hidden(encoder, "")
    weighted = hidden(encoder, f"({text}:0)", 0, 2)

    assert np.allclose(weighted[1:76], empty[1:76], atol=1e-6)
    assert np.allclose(weighted[78], empty[1], atol=1e-6)
    untouched = [0, 76, 77, *range(79, 154)]
    assert np.array_equal(weighted[untouched], plain[untouched])


@pytest.mark.parametrize("text", ["(a:1)b(c:1)", "((abc:2):0.5)", "a()bc", "(abc:1e0)"])
def test_weights_of_one_touch_nothing(
    encoder: PromptEncoder, networks: FakeTextEncoders, text: str
) -> None:
    plain = hidden(encoder, "abc")

    assert np.array_equal(hidden(encoder, text), plain)
    assert len(networks.calls) == 2


def test_clip_skip_takes_an_earlier_layer(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    layers = answer("text_encoder", ids_of("a"), "hidden_states")
    for clip_skip in range(4):
        assert np.array_equal(hidden(encoder, "a", clip_skip), layers[-(clip_skip + 1)])

    outputs = [outputs for _, _, outputs in networks.calls]
    assert outputs == [["last_hidden_state"], *[["hidden_states"]] * 3]


def test_clip_skip_reaches_the_text_and_the_empty_prompt(encoder: PromptEncoder) -> None:
    plain, empty = hidden(encoder, "a", 2), hidden(encoder, "", 2)

    expected = empty[1] + np.float32(2) * (plain[1] - empty[1])
    assert np.array_equal(hidden(encoder, "(a:2)", 2)[1], expected)


def test_two_clip_encoders_stand_side_by_side(folder: Path, networks: FakeTextEncoders) -> None:
    conditioning = make_encoder(SDXL, folder, networks).encode("abc")

    first = answer("text_encoder", ids_of("abc"))
    second = answer("text_encoder_2", ids_of("abc", pad=0))
    joined = np.concatenate([first, second], axis=1)
    assert np.array_equal(conditioning["encoder_hidden_states"], joined)
    # The pooled output of the second one alone, as its record says.
    pooled = answer("text_encoder_2", ids_of("abc", pad=0), "text_embeds")
    assert np.array_equal(conditioning["text_embeds"], pooled)
    assert networks.calls[0][2] == ["last_hidden_state"]
    assert networks.calls[1][2] == ["last_hidden_state", "text_embeds"]


def test_the_tokens_of_t5_follow_those_of_clip(folder: Path, networks: FakeTextEncoders) -> None:
    conditioning = make_encoder(SD3, folder, networks).encode("acat")

    joined = conditioning["encoder_hidden_states"]
    assert joined.shape == (77 + 16, 12)
    assert np.array_equal(joined[:77, :6], answer("text_encoder", ids_of("acat")))
    assert np.array_equal(joined[:77, 6:10], answer("text_encoder_2", ids_of("acat", pad=0)))
    assert not joined[:77, 10:].any()
    network, ids, outputs = networks.calls[2]
    assert (network, ids.shape, outputs) == ("text_encoder_3", (1, 16), ["last_hidden_state"])
    assert np.array_equal(joined[77:], answer("text_encoder_3", ids[0].tolist()))
    pooled = [
        answer("text_encoder", ids_of("acat"), "text_embeds"),
        answer("text_encoder_2", ids_of("acat", pad=0), "text_embeds"),
    ]
    assert np.array_equal(conditioning["pooled_projections"], np.concatenate(pooled))


def test_zeros_stand_in_for_a_t5_that_is_not_there(
    folder: Path, networks: FakeTextEncoders
) -> None:
    whole = make_encoder(SD3, folder, networks).encode("acat")
    without = make_encoder(SD3_WITHOUT_T5, folder, networks).encode("acat")

    expected = whole["encoder_hidden_states"].copy()
    expected[77:] = 0
    assert np.array_equal(without["encoder_hidden_states"], expected)
    assert np.array_equal(without["pooled_projections"], whole["pooled_projections"])


def test_clip_skip_is_of_every_clip_encoder_and_not_of_t5(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SD3, folder, networks)
    plain, skipped = encoder.encode("a"), encoder.encode("a", 2)

    joined = skipped["encoder_hidden_states"]
    first = answer("text_encoder", ids_of("a"), "hidden_states")[-3]
    second = answer("text_encoder_2", ids_of("a", pad=0), "hidden_states")[-3]
    assert np.array_equal(joined[:77, :10], np.concatenate([first, second], axis=1))
    assert np.array_equal(joined[77:], plain["encoder_hidden_states"][77:])
    assert np.array_equal(skipped["pooled_projections"], plain["pooled_projections"])


def test_every_clip_encoder_has_the_chunks_of_the_longest(
    folder: Path, networks: FakeTextEncoders
) -> None:
    """The second tokenizer makes one token of two letters."""
    encoder = make_encoder(SDXL, folder, networks)
    joined = hidden(encoder, "x" * 140, 0, 4)

    shapes = [ids.shape for _, ids, _ in networks.calls]
    assert shapes == [(2, 77), (2, 77)]
    assert joined.shape == (2 * 77, 10)
    assert np.array_equal(joined[77:, 6:], answer("text_encoder_2", ids_of("", pad=0)))
    assert not np.array_equal(joined[77:, :6], answer("text_encoder", ids_of("")))


def test_t5_follows_the_chunks_of_a_long_prompt_in_one(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SD3, folder, networks)
    joined, first = hidden(encoder, "a " * 100, 0, 4), hidden(encoder, "a " * 15)

    assert joined.shape == (3 * 77 + 16, 12)
    assert np.array_equal(joined[-16:], first[-16:])


def test_the_tokens_of_two_t5s_follow_each_other(folder: Path) -> None:
    networks = FakeTextEncoders({**WIDTHS, "text_encoder_4": 12})
    record = {**SD3, "encoders": [*CLIPS, t5(), t5("_4", max_length=8)]}
    joined = hidden(make_encoder(record, folder, networks), "a red cat")

    assert joined.shape == (77 + 16 + 8, 12)
    assert np.array_equal(joined[:-8], hidden(make_encoder(SD3, folder, networks), "a red cat"))
    assert np.array_equal(joined[-8:], networks.answers[5][0])


def test_the_pooled_output_is_the_first_chunks(folder: Path, networks: FakeTextEncoders) -> None:
    encoder = make_encoder(SDXL, folder, networks)
    long = encoder.encode("a" * 75 + "b" * 20, 0, 4)["text_embeds"]

    assert long.shape == (POOLED_WIDTH,)
    assert np.array_equal(long, encoder.encode("a" * 75)["text_embeds"])
    assert not np.array_equal(long, encoder.encode("b" * 20)["text_embeds"])


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_weights_are_applied_to_what_each_encoder_made_of_its_own_tokens(
    folder: Path, networks: FakeTextEncoders, clip_skip: int
) -> None:
    encoder = make_encoder(SD3, folder, networks)
    plain = encoder.encode("xx cat", clip_skip)
    empty = hidden(encoder, "", clip_skip)
    weighted = encoder.encode("(xx:1.5) cat", clip_skip)

    z = plain["encoder_hidden_states"]
    scaled = empty + np.float32(1.5) * (z - empty)
    expected = z.copy()
    expected[1:3, :6] = scaled[1:3, :6]  # two letters
    expected[1, 6:10] = scaled[1, 6:10]  # in one token
    # To T5 it is a blank and two letters, behind no begin.
    expected[77:80] = scaled[77:80]
    assert np.array_equal(weighted["encoder_hidden_states"], expected)
    assert np.array_equal(weighted["pooled_projections"], plain["pooled_projections"])


def test_weights_keep_to_the_tokens_of_t5_behind_a_long_prompt(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SD3, folder, networks)
    text = "red(" + "a " * 80 + ":0)"
    plain, empty = hidden(encoder, text.replace(":0", ":1"), 0, 4), hidden(encoder, "")
    weighted = hidden(encoder, text, 0, 4)

    assert len(weighted) == 3 * 77 + 16
    t5_part = 3 * 77
    assert np.array_equal(weighted[t5_part], plain[t5_part])
    assert np.allclose(weighted[t5_part + 1 : -1], empty[78:-1], atol=1e-6)
    assert np.array_equal(weighted[-1], plain[-1])


def test_a_negative_prompt_that_is_left_out_is_zeros_if_the_manifest_says_so(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SDXL, folder, networks)
    left_out, empty = encoder.encode(None), encoder.encode("")

    assert left_out.keys() == empty.keys() == {"encoder_hidden_states", "text_embeds"}
    for name, array in left_out.items():
        assert (array.shape, array.dtype) == (empty[name].shape, empty[name].dtype)
        assert not array.any()
        assert empty[name].any()
    assert encoder.encode(None) is left_out
    assert (encoder.num_hits, encoder.num_misses) == (2, 1)


@pytest.mark.parametrize("record", [SD1, SD3], ids=["sd1", "sd3"])
def test_else_one_that_is_left_out_is_the_empty_prompt(
    folder: Path, networks: FakeTextEncoders, record: dict[str, Any]
) -> None:
    encoder = make_encoder(record, folder, networks)

    assert encoder.encode(None) is encoder.encode("")
    assert (encoder.num_hits, encoder.num_misses) == (1, 1)


def test_a_variants_text_encoder_runs_in_the_place_of_the_checkpoints(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SDXL, folder, networks)
    variant = {"text_encoder": "text_encoder_painted", "unet": "unet_painted"}
    own, painted = hidden(encoder, "abc"), hidden(encoder, "abc", 0, 1, variant)

    expected = own.copy()
    expected[:, :6] = answer("text_encoder_painted", ids_of("abc"))
    assert np.array_equal(painted, expected)
    assert networks.called[2:] == ["text_encoder_painted", "text_encoder_2"]


def test_a_variants_weights_are_measured_from_its_own_empty_prompt(
    folder: Path, networks: FakeTextEncoders
) -> None:
    encoder = make_encoder(SD1, folder, networks)
    variant = {"text_encoder": "text_encoder_painted"}
    hidden(encoder, "")
    weighted = hidden(encoder, "(a:0)", 0, 1, variant)

    empty = answer("text_encoder_painted", ids_of(""))
    assert np.allclose(weighted[1], empty[1], atol=1e-6)


def test_a_variant_of_no_text_encoder_shares_the_embeddings(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    plain = encoder.encode("abc", 0, 1, {})

    assert encoder.encode("abc", 0, 1, {"unet": "unet_painted"}) is plain
    assert encoder.encode("abc") is plain
    variant = {"text_encoder": "text_encoder_painted"}
    assert encoder.encode("abc", 0, 1, variant) is not plain
    assert networks.called == ["text_encoder", "text_encoder_painted"]


def test_each_encoder_can_be_probed_by_a_small_call(
    folder: Path, networks: FakeTextEncoders
) -> None:
    calls = make_encoder(SD3, folder, networks).probe_calls

    assert [network for network, _, _ in calls] == [
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ]
    for network, inputs, outputs in calls:
        (ids,) = inputs.values()
        assert (len(ids), ids.dtype, ids.any()) == (1, np.int64, False)
        answers = networks.run(network, inputs, outputs)
        assert answers[0].shape == (1, ids.shape[1], WIDTHS[network])
    assert [outputs for _, _, outputs in calls] == [
        ["last_hidden_state", "text_embeds"],
        ["last_hidden_state", "text_embeds"],
        ["last_hidden_state"],
    ]


@pytest.mark.parametrize("record", [SD1, SDXL, SD3, SD3_WITHOUT_T5])
@pytest.mark.parametrize("text", ["a cat", "a (cat:1.3)"])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_what_is_kept_holds_on_to_no_answer_of_a_network(
    folder: Path,
    networks: FakeTextEncoders,
    record: dict[str, Any],
    text: str,
    clip_skip: int,
) -> None:
    conditioning = make_encoder(record, folder, networks).encode(text, clip_skip)

    assert networks.answers
    for array in conditioning.values():
        assert array.base is None
        assert not any(np.shares_memory(array, answer) for answer in networks.answers)


def test_a_text_is_encoded_once_per_way_to_read_it(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    ways = [("", 0, 1), ("a", 0, 1), ("a", 1, 1), ("a", 0, 2)]
    first = [hidden(encoder, *way) for way in ways]
    again = [hidden(encoder, *way) for way in ways]

    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(networks.calls) == len(ways)
    assert (encoder.num_hits, encoder.num_misses) == (4, 4)


def test_the_empty_prompt_is_encoded_once_for_all_weighted_ones(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    for text in ("(a:2)", "(b:2)", "", "(c:2)"):
        encoder.encode(text)
    encoder.encode("(d:2)", 0, 4)

    assert len(networks.calls) == 5
    # Its own uses of the empty prompt are no lookups of anyone's.
    assert (encoder.num_hits, encoder.num_misses) == (1, 4)


def test_the_cache_is_bounded_in_bytes(folder: Path, networks: FakeTextEncoders) -> None:
    one = 77 * HIDDEN * 4 + 1
    encoder = make_encoder(SD1, folder, networks, 2 * one)
    for text in "aba":
        encoder.encode(text)
    assert encoder.num_bytes == 2 * one
    encoder.encode("c")  # in the place of b, which was not asked for the longest time
    assert encoder.num_bytes == 2 * one

    encoder.encode("a")
    assert (encoder.num_hits, encoder.num_misses) == (2, 3)
    encoder.encode("b")
    assert (encoder.num_hits, encoder.num_misses) == (2, 4)


def test_long_prompts_count_for_all_their_chunks(encoder: PromptEncoder) -> None:
    encoder.encode("é" * 60, 0, 4)

    assert encoder.num_bytes == 2 * 77 * HIDDEN * 4 + len("é".encode()) * 60


def test_pooled_embeddings_and_zeros_count_too(folder: Path, networks: FakeTextEncoders) -> None:
    encoder = make_encoder(SDXL, folder, networks)
    one = (77 * 10 + POOLED_WIDTH) * 4
    encoder.encode("abc")
    assert encoder.num_bytes == one + 3

    encoder.encode(None)  # and the empty prompt, whose shape it has
    assert encoder.num_bytes == 3 * one + 3


def test_a_cache_of_no_bytes_keeps_nothing(folder: Path, networks: FakeTextEncoders) -> None:
    encoder = make_encoder(SDXL, folder, networks, 0)
    first, second = hidden(encoder, "(a:2)"), hidden(encoder, "(a:2)")

    assert np.array_equal(first, second)
    assert not hidden(encoder, None).any()
    assert (encoder.num_hits, encoder.num_misses, encoder.num_bytes) == (0, 3, 0)


@pytest.mark.parametrize("network", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_failure_is_not_kept(folder: Path, networks: FakeTextEncoders, network: str) -> None:
    encoder = make_encoder(SD3, folder, networks)
    networks.fail_next[network] = NetworkFailed(network, "out of memory")
    with pytest.raises(NetworkFailed, match=f"^{network} failed: out of memory"):
        encoder.encode("a cat")

    assert encoder.num_bytes == 0
    assert hidden(encoder, "a cat").shape == (77 + 16, 12)


class MisshapenTextEncoders(FakeTextEncoders):
    """Of what they make, a part is left out."""

    def __init__(self, part: Any) -> None:
        super().__init__(WIDTHS)
        self._part = part

    def run(self, network: str, inputs: Any, outputs: Any) -> list[np.ndarray]:
        return [array[self._part] for array in super().run(network, inputs, outputs)]


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (np.s_[:, 1:], r"\(1, 76, 6\)"),
        (np.s_[1:], r"\(0, 77, 6\)"),
        (np.s_[:, :, 0], r"\(1, 77\)"),
    ],
    ids=["a token", "a row", "the features"],
)
def test_states_of_another_shape_are_a_failure(folder: Path, part: Any, shape: str) -> None:
    encoder = make_encoder(SD1, folder, MisshapenTextEncoders(part))

    with pytest.raises(NetworkFailed, match=rf"^text_encoder failed: made {shape} of \(1, 77\)"):
        encoder.encode("a cat")


@pytest.mark.parametrize(
    ("record", "hidden_size", "message"),
    [
        (SD1, 8, "text_encoder failed: made 6 features, expected 8"),
        (SD1, 4, "text_encoder failed: made 6 features, expected 4"),
        (SDXL, 11, "text_encoder and text_encoder_2 failed: made 10 features, expected 11"),
        (SD3_WITHOUT_T5, 9, "text_encoder and text_encoder_2 failed: made 10 features, expected 9"),
        (SD3, 13, "text_encoder, text_encoder_2 and text_encoder_3 failed: made 12 features"),
    ],
)
def test_states_of_another_width_are_a_failure(
    folder: Path,
    networks: FakeTextEncoders,
    record: dict[str, Any],
    hidden_size: int,
    message: str,
) -> None:
    encoder = make_encoder({**record, "hidden_size": hidden_size}, folder, networks)

    with pytest.raises(NetworkFailed, match=f"^{message}"):
        encoder.encode("a cat")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            text_record(clip(kind="umt5")),
            "text: text_encoder is of kind 'umt5', known are clip, t5",
        ),
        (
            text_record(clip(), empty_negative="ones"),
            "text: empty_negative is 'ones', known are encode, zeros",
        ),
        (
            text_record(clip(), pooled_input="text_embeds"),
            "text: no encoder has pooled embeddings for text_embeds",
        ),
        (text_record(), "text: no encoders are named"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    folder: Path, networks: FakeTextEncoders, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError, match=f"^{message}$"):
        make_encoder(record, folder, networks)


def test_a_prompt_is_refused_before_anything_runs(
    encoder: PromptEncoder, networks: FakeTextEncoders
) -> None:
    encoder.validate("a (fine:1.3) cat :(")
    encoder.validate(None)
    with pytest.raises(ValueError, match=r"^weight 99 of 'cat' is out of range"):
        encoder.validate("a (cat:99)")

    assert networks.calls == []


def test_what_is_cut_is_told_by_field(encoder: PromptEncoder) -> None:
    texts = {"prompt": "a" * 160, "negative_prompt": "(" + "b" * 80 + ":1.3)"}

    assert encoder.truncation_notes(**texts) == [
        "prompt: too long, its last 85 tokens were cut off",
        "negative_prompt: too long, its last 5 tokens were cut off",
    ]
    assert encoder.truncation_notes(2, **texts) == [
        "prompt: too long, its last 10 tokens were cut off"
    ]
    assert encoder.truncation_notes(3, **texts) == []
    assert encoder.truncation_notes(negative_prompt=None) == []


def test_of_several_clip_encoders_the_one_that_cut_most_is_told(
    folder: Path, networks: FakeTextEncoders
) -> None:
    """The second tokenizer makes one token of two letters."""
    encoder = make_encoder(SDXL, folder, networks)

    assert encoder.truncation_notes(prompt="x" * 80) == [
        "prompt: too long, its last 5 tokens were cut off"
    ]
    assert encoder.truncation_notes(prompt="x" * 75) == []
    assert networks.calls == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a " * 15, None),
        ("red" * 26, "tokens were cut off: 3 for CLIP, 11 for T5"),
        ("a " * 20, "tokens were cut off: none for CLIP, 5 for T5"),
        ("redcat" * 7 + "!" * 36, "tokens were cut off: 3 for CLIP, 35 for T5"),
    ],
)
def test_what_clip_and_t5_cut_is_told_in_one_sentence(
    folder: Path, networks: FakeTextEncoders, text: str, told: str | None
) -> None:
    encoder = make_encoder(SD3, folder, networks)

    expected = [f"prompt: too long, its last {told}"] if told else []
    assert encoder.truncation_notes(prompt=text) == expected


def test_what_t5_read_whole_is_told(folder: Path, networks: FakeTextEncoders) -> None:
    record = {**SD3, "encoders": [*CLIPS, t5(max_length=256)]}
    encoder = make_encoder(record, folder, networks)

    assert encoder.truncation_notes(prompt="a " * 40, negative_prompt="a") == [
        "prompt: too long, its last tokens were cut off: 5 for CLIP, none for T5"
    ]
