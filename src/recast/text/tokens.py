"""CLIP's byte pair encoding, from the merge list that travels with the package.

vocabulary = 256 byte symbols, the same with `</w>`, 48,894 merges, start, end = 49,408 (Radford
et al. 2021).  Text is lower-cased, normalised to NFC, and white space is collapsed, as in
transformers' tokenizer. The words `<|startoftext|>` and `<|endoftext|>` inside a prompt are
ordinary text here: a prompt cannot end itself early.
"""

from __future__ import annotations

import lzma
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from recast.errors import Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = 49406, 49407
LENGTH = 77

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte, in vocabulary order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(range(256)) - len(plain)
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(others)]


def merges() -> list[tuple[str, str]]:
    """Return the 48,894 merges in the order of their rank."""
    raw = resources.files("recast.text").joinpath("clip_merges.txt.xz").read_bytes()
    lines = lzma.decompress(raw).decode("utf-8").rstrip("\n").split("\n")
    pairs = []
    for line in lines:
        left, _, right = line.partition(" ")
        pairs.append((left, right))
    return pairs


def vocabulary(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """Return symbol -> id for a merge list: bytes, bytes that end a word, merges, start and end."""
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: n for n, word in enumerate(words)}


@cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer, built once a process (about 0.1 s)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = merges()
    bpe = models.BPE(
        vocab=vocabulary(pairs),
        merges=pairs,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
    built = Tokenizer(bpe)
    built.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return built


def encode(text: str) -> list[int]:
    """Return the ids of a text, without start and end; refuses text that is not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(
            f"The prompt {text[:60]!a} has half a surrogate pair at character {error.start}: "
            "remove it."
        ) from error
    return list(tokenizer().encode(text, add_special_tokens=False).ids)
