"""Prompts as people write them: weights, long texts, and the cache of what was made of them."""

import random

import numpy as np
import pytest
from fake_networks import HIDDEN, FakeNetworks

from darkroom_engine import Manifest, NetworkFailed
from darkroom_engine.prompts import PromptEncoder
from darkroom_engine.tokenizer import PromptTokenizer
from darkroom_engine.weighting import WEIGHTS, parse_weights

BOS, EOS = 300, 301


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
def tokenizer(manifest: Manifest) -> PromptTokenizer:
    """One token per byte; the ids of what the manifest's document says."""
    return PromptTokenizer.from_config(manifest.tokenizer, manifest.directory)


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


@pytest.fixture
def encoder(tokenizer: PromptTokenizer, networks: FakeNetworks) -> PromptEncoder:
    return PromptEncoder(tokenizer, networks, 2**20)


def hidden(encoder: PromptEncoder, text: str, *options: int) -> np.ndarray:
    return encoder.encode(text, *options)["encoder_hidden_states"]


def test_a_short_prompt_is_one_chunk_whatever_it_may_take(encoder: PromptEncoder) -> None:
    once, often = hidden(encoder, "a cat", 0, 1), hidden(encoder, "a cat", 0, 4)

    assert once.shape == (77, HIDDEN)
    assert np.array_equal(once, often)


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
    encoder: PromptEncoder, networks: FakeNetworks, text: str
) -> None:
    plain = hidden(encoder, "abc")
    num_encoded = len(networks.encoded)

    assert np.array_equal(hidden(encoder, text), plain)
    assert len(networks.encoded) == num_encoded + 1


def test_clip_skip_reaches_the_text_and_the_empty_prompt(encoder: PromptEncoder) -> None:
    plain, empty = hidden(encoder, "a", 2), hidden(encoder, "", 2)

    assert not np.allclose(plain, hidden(encoder, "a", 0))
    expected = empty[1] + np.float32(2) * (plain[1] - empty[1])
    assert np.array_equal(hidden(encoder, "(a:2)", 2)[1], expected)


def test_a_text_is_encoded_once_per_way_to_read_it(
    encoder: PromptEncoder, networks: FakeNetworks
) -> None:
    ways = [("", 0, 1), ("a", 0, 1), ("a", 1, 1), ("a", 0, 2)]
    first = [hidden(encoder, *way) for way in ways]
    again = [hidden(encoder, *way) for way in ways]

    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(networks.encoded) == len(ways)
    assert (encoder.num_hits, encoder.num_misses) == (4, 4)


def test_the_empty_prompt_is_encoded_once_for_all_weighted_ones(
    encoder: PromptEncoder, networks: FakeNetworks
) -> None:
    for text in ("(a:2)", "(b:2)", "", "(c:2)"):
        encoder.encode(text)

    assert len(networks.encoded) == 4
    # Its own uses of the empty prompt are no lookups of anyone's.
    assert (encoder.num_hits, encoder.num_misses) == (1, 3)


def test_the_cache_is_bounded_in_bytes(tokenizer: PromptTokenizer, networks: FakeNetworks) -> None:
    one = 77 * HIDDEN * 4 + 1
    encoder = PromptEncoder(tokenizer, networks, 2 * one)
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


def test_a_cache_of_no_bytes_keeps_nothing(
    tokenizer: PromptTokenizer, networks: FakeNetworks
) -> None:
    encoder = PromptEncoder(tokenizer, networks, 0)
    first, second = hidden(encoder, "(a:2)"), hidden(encoder, "(a:2)")

    assert np.array_equal(first, second)
    assert (encoder.num_hits, encoder.num_misses, encoder.num_bytes) == (0, 2, 0)


def test_a_failure_is_not_kept(encoder: PromptEncoder, networks: FakeNetworks) -> None:
    networks.fail_next["text_encoder"] = NetworkFailed("text_encoder", "out of memory")
    with pytest.raises(NetworkFailed, match="text_encoder failed: out of memory"):
        encoder.encode("a cat")

    assert encoder.num_bytes == 0
    assert hidden(encoder, "a cat").shape == (77, HIDDEN)


def test_a_prompt_is_refused_before_anything_runs(
    encoder: PromptEncoder, networks: FakeNetworks
) -> None:
    encoder.validate("a (fine:1.3) cat :(")
    with pytest.raises(ValueError, match=r"^weight 99 of 'cat' is out of range"):
        encoder.validate("a (cat:99)")

    assert networks.encoded == []


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
