"""An exported tokenizer, as the engine reads it, gives the ids of transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CLIP_MERGES, clip_tokenizer, t5_tokenizer, write_tokenizer
from transformers import CLIPTokenizer

from darkroom_engine.tokenizer import PromptTokenizer

T5_LENGTH = 24

TEXTS = {
    "empty": "",
    "words": "a cat sat on the mat",
    "upper case": "A CAT, Sat ON the MAT",
    "punctuation": "a cat's hat -- (masterpiece:1.2), 8k!!! #1 @home 50% off?",
    "contractions": "don't we'll i've you're it's",
    "numbers": "1234 3.14 2nd",
    "blanks": "  a  red   cat ",
    "blank": " ",
    "white space": "  a \t cat\n\nsat\r\n on \u00a0 the\u3000mat  ",
    "accents": "naïve café Ärger ﬁancée e\u0301",
    "emoji": "a cat 🐱 and a family 👨‍👩‍👧 🏳️‍🌈",
    "Chinese": "一只猫坐在垫子上",
    "Arabic": "قطة على الحصيرة",
    "NUL and controls": "a\0cat\x01\x1f\x7f",
    "special tokens": "a <|endoftext|> cat <|startoftext|>",
    "special tokens of T5": "a red</s> cat <pad> <unk>",
    "mark-up": "<b>cat</b> &amp; dog",
    "long": "the cat sat " * 60,
    "one word too long": "cat" * 80,
}


@pytest.fixture
def merging(tmp_path: Path) -> Any:
    return clip_tokenizer(tmp_path / "transformers", CLIP_MERGES)


def exported(tokenizer: Any, folder: Path, max_length: int = 77) -> PromptTokenizer:
    config = write_tokenizer(tokenizer, folder / "tokenizer.json", max_length)
    return PromptTokenizer.from_config(config, folder)


def escaped(text: str) -> str:
    """The text with no weights in it."""
    return text.replace("(", r"\(").replace(")", r"\)")


def expected_ids(tokenizer: Any, text: str, max_length: int = 77) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=max_length, truncation=True).input_ids


@pytest.mark.parametrize("name", TEXTS)
def test_the_exported_tokenizer_is_clips(fp32: Path, checkpoint: Path, name: str) -> None:
    (record,) = json.loads((fp32 / "manifest.json").read_text())["text"]["encoders"]
    ours = PromptTokenizer.from_config(record["tokenizer"], fp32)
    theirs = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")

    (ids,) = ours.encode(escaped(TEXTS[name])).ids
    assert ids.tolist() == expected_ids(theirs, TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_merges_are_kept(merging: Any, tmp_path: Path, name: str) -> None:
    (ids,) = exported(merging, tmp_path).encode(escaped(TEXTS[name])).ids

    assert ids.tolist() == expected_ids(merging, TEXTS[name])


def test_merging_shortens(merging: Any) -> None:
    assert len(merging("the cat sat").input_ids) == 3 + 2


def test_another_padding_token_is_kept(tmp_path: Path) -> None:
    theirs = clip_tokenizer(tmp_path / "transformers", CLIP_MERGES, pad_token="!")  # noqa: S106  a token of text
    (ids,) = exported(theirs, tmp_path).encode("the cat").ids

    assert ids.tolist() == expected_ids(theirs, "the cat")
    assert ids[-1] == theirs.convert_tokens_to_ids("!") == 0
    assert ids[-1] != theirs.eos_token_id


@pytest.mark.parametrize(("count", "num_cut"), [(74, 0), (75, 0), (76, 1), (100, 25)])
def test_what_does_not_fit_is_counted(
    merging: Any, tmp_path: Path, count: int, num_cut: int
) -> None:
    tokens = exported(merging, tmp_path).encode("cat " * count)

    assert (tokens.ids.shape, tokens.num_cut) == ((1, 77), num_cut)
    assert tokens.ids[0, -1] == merging.eos_token_id


def test_the_chunks_of_a_long_text_are_its_parts(merging: Any, tmp_path: Path) -> None:
    words = [("cat", "sat", "mat", "the")[n % 4] for n in range(170)]
    tokens = exported(merging, tmp_path).encode(" ".join(words), max_chunks=4)

    parts = [" ".join(words[start : start + 75]) for start in (0, 75, 150)]
    assert tokens.ids.tolist() == [expected_ids(merging, part) for part in parts]


def test_chunks_that_are_added_are_the_empty_prompt(merging: Any, tmp_path: Path) -> None:
    ours = exported(merging, tmp_path)
    tokens = ours.extend(ours.encode("(the cat:1.5)"), 3)

    empty = expected_ids(merging, "")
    assert tokens.ids.tolist() == [expected_ids(merging, "the cat"), empty, empty]
    assert tokens.weights.shape == (3, 77)
    assert (tokens.weights[1:] == 1).all()


def test_segments_are_tokenized_apart(merging: Any, tmp_path: Path) -> None:
    ours = exported(merging, tmp_path)
    weighted = ours.encode("the c(at:1.5)")

    parts = [merging(text, add_special_tokens=False).input_ids for text in ("the c", "at")]
    count = len(parts[0]) + len(parts[1])
    assert weighted.ids[0, 1 : 1 + count].tolist() == parts[0] + parts[1]
    assert weighted.weights[0, : 2 + count].tolist() == [1] * (1 + len(parts[0])) + [1.5, 1]
    assert not (weighted.ids == ours.encode("the cat").ids).all()


@pytest.mark.parametrize("text", ["the  (cat:1.5) sat", "the (cat )\tsat", "(the) \n (cat) (sat)"])
def test_blanks_beside_a_weight_mean_nothing_to_clip(
    merging: Any, tmp_path: Path, text: str
) -> None:
    (ids,) = exported(merging, tmp_path).encode(text).ids

    assert ids.tolist() == expected_ids(merging, "the cat sat")


@pytest.mark.parametrize("splits_words", [True, False], ids=["words", "blanks"])
@pytest.mark.parametrize("name", TEXTS)
def test_plain_prompts_are_read_as_t5_reads_them(
    tmp_path: Path, name: str, splits_words: bool
) -> None:
    theirs = t5_tokenizer(tmp_path / "transformers", splits_words=splits_words)
    (ids,) = exported(theirs, tmp_path, T5_LENGTH).encode(escaped(TEXTS[name])).ids

    assert ids.tolist() == expected_ids(theirs, TEXTS[name], T5_LENGTH)


def test_t5_ends_each_text_and_pads_it_with_zeros(tmp_path: Path) -> None:
    theirs = t5_tokenizer(tmp_path / "transformers")
    config = write_tokenizer(theirs, tmp_path / "tokenizer.json", T5_LENGTH)
    ours = PromptTokenizer.from_config(config, tmp_path)

    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, 1, 0]
    (ids,) = ours.encode("a red cat").ids
    assert ids[3:].tolist() == [1, *[0] * (T5_LENGTH - 4)]


@pytest.mark.parametrize("splits_words", [True, False], ids=["words", "blanks"])
@pytest.mark.parametrize("text", ["a (red:1.5) cat", "(a )(red) (cat)", "a ((red cat))"])
def test_weights_between_words_change_nothing_that_t5_reads(
    tmp_path: Path, text: str, splits_words: bool
) -> None:
    theirs = t5_tokenizer(tmp_path / "transformers", splits_words=splits_words)
    (ids,) = exported(theirs, tmp_path, T5_LENGTH).encode(text).ids

    assert ids.tolist() == expected_ids(theirs, "a red cat", T5_LENGTH)
