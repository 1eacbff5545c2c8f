"""The exported tokenizer, as the engine reads it, gives the ids of transformers' CLIPTokenizer."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from darkroom_engine.tokenizer import PromptTokenizer
from darkroom_export.export import _write_tokenizer

TEXTS = {
    "empty": "",
    "words": "a cat sat on the mat",
    "upper case": "A CAT, Sat ON the MAT",
    "punctuation": "a cat's hat -- (masterpiece:1.2), 8k!!! #1 @home 50% off?",
    "contractions": "don't we'll i've you're it's",
    "numbers": "1234 3.14 2nd",
    "white space": "  a \t cat\n\nsat\r\n on \u00a0 the\u3000mat  ",
    "accents": "naïve café Ärger ﬁancée e\u0301",
    "emoji": "a cat 🐱 and a family 👨‍👩‍👧 🏳️‍🌈",
    "Chinese": "一只猫坐在垫子上",
    "Arabic": "قطة على الحصيرة",
    "NUL and controls": "a\0cat\x01\x1f\x7f",
    "special tokens": "a <|endoftext|> cat <|startoftext|>",
    "mark-up": "<b>cat</b> &amp; dog",
    "long": "the cat sat " * 60,
    "one word too long": "cat" * 80,
}


def clip_tokenizer(folder: Path, **options: str) -> CLIPTokenizer:
    """CLIP's tokenizer over the bytes and a few merges."""
    merges = ["a t", "a t</w>", "c at</w>", "s at</w>", "m at</w>", "t h", "th e</w>", "c at"]
    letters = json.loads((folder / "vocab.json").read_text())
    words = [token for token in letters if not token.startswith("<|")]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, **options
    )


@pytest.fixture
def merging(broken: Path) -> CLIPTokenizer:
    return clip_tokenizer(broken / "tokenizer")


def escaped(text: str) -> str:
    """The text with no weights in it."""
    return text.replace("(", r"\(").replace(")", r"\)")


def expected_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids


@pytest.mark.parametrize("name", TEXTS)
def test_the_exported_tokenizer_is_clips(fp32: Path, checkpoint: Path, name: str) -> None:
    manifest = json.loads((fp32 / "manifest.json").read_text())
    ours = PromptTokenizer.from_config(manifest["tokenizer"], fp32)
    theirs = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")

    (ids,) = ours.encode(escaped(TEXTS[name])).ids
    assert ids.tolist() == expected_ids(theirs, TEXTS[name])


@pytest.mark.parametrize("name", TEXTS)
def test_merges_are_kept(merging: CLIPTokenizer, tmp_path: Path, name: str) -> None:
    ours = PromptTokenizer.from_config(_write_tokenizer(merging, tmp_path), tmp_path)

    (ids,) = ours.encode(escaped(TEXTS[name])).ids
    assert ids.tolist() == expected_ids(merging, TEXTS[name])


def test_merging_shortens(merging: CLIPTokenizer) -> None:
    assert len(merging("the cat sat").input_ids) == 3 + 2


def test_another_padding_token_is_kept(broken: Path, tmp_path: Path) -> None:
    theirs = clip_tokenizer(broken / "tokenizer", pad_token="!")  # noqa: S106  a token of text
    ours = PromptTokenizer.from_config(_write_tokenizer(theirs, tmp_path), tmp_path)

    (ids,) = ours.encode("the cat").ids
    assert ids.tolist() == expected_ids(theirs, "the cat")
    assert ids[-1] == theirs.convert_tokens_to_ids("!") != theirs.eos_token_id


@pytest.mark.parametrize(("count", "num_cut"), [(74, 0), (75, 0), (76, 1), (100, 25)])
def test_what_does_not_fit_is_counted(
    merging: CLIPTokenizer, tmp_path: Path, count: int, num_cut: int
) -> None:
    ours = PromptTokenizer.from_config(_write_tokenizer(merging, tmp_path), tmp_path)
    tokens = ours.encode("cat " * count)

    assert (tokens.ids.shape, tokens.num_cut) == ((1, 77), num_cut)
    assert tokens.ids[0, -1] == merging.eos_token_id


def test_the_chunks_of_a_long_text_are_its_parts(merging: CLIPTokenizer, tmp_path: Path) -> None:
    ours = PromptTokenizer.from_config(_write_tokenizer(merging, tmp_path), tmp_path)
    words = [("cat", "sat", "mat", "the")[n % 4] for n in range(170)]
    tokens = ours.encode(" ".join(words), max_chunks=4)

    parts = [" ".join(words[start : start + 75]) for start in (0, 75, 150)]
    assert tokens.ids.tolist() == [expected_ids(merging, part) for part in parts]


def test_segments_are_tokenized_apart(merging: CLIPTokenizer, tmp_path: Path) -> None:
    ours = PromptTokenizer.from_config(_write_tokenizer(merging, tmp_path), tmp_path)
    weighted = ours.encode("the c(at:1.5)")

    parts = [merging(text, add_special_tokens=False).input_ids for text in ("the c", "at")]
    count = len(parts[0]) + len(parts[1])
    assert weighted.ids[0, 1 : 1 + count].tolist() == parts[0] + parts[1]
    assert weighted.weights[0, : 2 + count].tolist() == [1] * (1 + len(parts[0])) + [1.5, 1]
    assert not (weighted.ids == ours.encode("the cat").ids).all()
