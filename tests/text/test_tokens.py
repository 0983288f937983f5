"""The tokenizer against transformers' own, and the shape of what it reads from the data file."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from recast.errors import Refused
from recast.text.tokens import END, START, encode, merges, tokenizer, vocabulary

AWKWARD = [
    "a photo of a cat",
    "It's the 1980s, they'd SAY: déjà-vu!!",
    "emoji 🐈‍⬛ and 日本語の文章",
    "ﬁne ligatures ½ ① ǆ",
    "tabs\tand\nlines   and   spaces ",
    "e\u0301 combining, İstanbul, straße",
    "(((masterpiece))), best_quality, 8k::4",
    "",
]


@pytest.fixture(scope="module")
def reference():
    """Build transformers' CLIPTokenizer from the same merges."""
    from transformers import CLIPTokenizer

    pairs = merges()
    return CLIPTokenizer(vocabulary(pairs), merges=pairs, model_max_length=77)


def test_known_sentence() -> None:
    assert [START, *encode("a photo of a cat"), END] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_vocabulary_is_clips() -> None:
    pairs = merges()
    assert len(pairs) == 48_894
    words = vocabulary(pairs)
    assert len(words) == 49_408
    assert words["<|startoftext|>"] == START
    assert words["<|endoftext|>"] == END
    assert words["!"] == 0
    assert words["cat</w>"] == 2368
    assert tokenizer().get_vocab_size() == 49_408


@pytest.mark.parametrize("text", AWKWARD)
def test_equals_transformers(text: str, reference) -> None:
    assert [START, *encode(text), END] == reference(text).input_ids


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40).filter(lambda s: "<|" not in s))
def test_equals_transformers_on_any_text(text: str) -> None:
    from transformers import CLIPTokenizer

    global built
    built = globals().get("built") or CLIPTokenizer(vocabulary(merges()), merges=merges())
    assert [START, *encode(text), END] == built(text).input_ids


def test_special_words_in_a_prompt_are_text() -> None:
    assert END not in encode("a <|endoftext|> b")


def test_half_a_surrogate_is_refused() -> None:
    with pytest.raises(Refused, match="surrogate"):
        encode("a \ud800 b")
