"""Tokenizers of a few words: files of the `tokenizers` library, and transformers' classes."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

T5_WORDS = ["▁", "▁a", "a", "▁red", "red", "▁cat", "cat", "s", ",", "▁sat", "at"]
T5_LETTERS = "bcdefghijklmnopqrtuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789().:!?'é"

CLIP_MERGES = ["a t", "a t</w>", "c at</w>", "s at</w>", "m at</w>", "t h", "th e</w>", "c at"]


def write_byte_tokenizer(path: Path, merges: list[tuple[str, str]] | None = None) -> None:
    """One token per byte, but for those that merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(first + second for first, second in merges or [])]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _save(tokenizer, path)


def write_t5_tokenizer(path: Path, *, splits_words: bool = True) -> None:
    """A unigram tokenizer built like T5's; blanks are tokens of their own if it splits no words."""
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(word, 0.0) for word in special]
    scores += [(word, -2.0) for word in T5_WORDS] + [(letter, -6.0) for letter in T5_LETTERS]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    blanks = pre_tokenizers.Metaspace(prepend_scheme="always")
    words = [pre_tokenizers.WhitespaceSplit()] if splits_words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, blanks])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    _save(tokenizer, path)


def clip_tokenizer(folder: Path, merges: list[str], **options: str) -> Any:
    """transformers' tokenizer of CLIP, over the bytes and some merges."""
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    rules.write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=77, **options)


def t5_tokenizer(folder: Path, *, splits_words: bool = True) -> Any:
    """transformers' tokenizer of T5; if it splits no words, the class for any such file."""
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    write_t5_tokenizer(folder / "tokenizer.json", splits_words=splits_words)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return (T5TokenizerFast if splits_words else PreTrainedTokenizerFast).from_pretrained(folder)


def write_tokenizer(tokenizer: Any, path: Path, max_length: int = 77) -> dict[str, Any]:
    """Write transformers' tokenizer as an export does; returns its record in the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(path))
    return {
        "file": path.name,
        "max_length": max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(tokenizer: Tokenizer, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
