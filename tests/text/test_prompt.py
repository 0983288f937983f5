"""Prompt weights and the rows of 77 tokens."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from recast.text.chunks import chunks, repeats
from recast.text.prompt import parse
from recast.text.tokens import END, START, encode


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", []),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a ((cat))", [("a ", 1.0), ("cat", 1.21)]),
        ("a [cat]", [("a ", 1.0), ("cat", 1 / 1.1)]),
        ("(cat:1.3) dog", [("cat", 1.3), (" dog", 1.0)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1)", [("cat", -1.0)]),
        ("(a (b) (c:1.3):0.5)", [("a ", 0.5), ("b", 0.55), (" ", 0.5), ("c", 1.3)]),
        ("((cat:1.3))", [("cat", 1.3)]),
        (r"a \(cat\) \[x\]", [("a (cat) [x]", 1.0)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("a (cat", [("a (cat", 1.0)]),
        ("a cat) b]", [("a cat) b]", 1.0)]),
        ("([cat)", [("([cat)", 1.0)]),
        ("(cat:big)", [("cat:big", 1.1)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("([(a:b)]:2)", [("a:b", 2.0)]),
        ("(([a:2]))", [("a:2", 1.1)]),
        ("(x:" + "9" * 400 + ")", [("x:" + "9" * 400, 1.1)]),
        ("()", []),
    ],
)
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    got = parse(prompt)
    assert [text for text, _ in got] == [text for text, _ in expected]
    assert [w for _, w in got] == pytest.approx([w for _, w in expected])


@given(st.text(alphabet="ab ()[]\\:.12", max_size=60))
def test_any_prompt_is_read_with_finite_weights(prompt: str) -> None:
    for text, weight in parse(prompt):
        assert text
        assert abs(weight) < 1e9


def test_deep_nesting_is_no_recursion() -> None:
    assert parse("(" * 3000 + "a" + ")" * 3000)[0][0] == "a"


def test_short_prompt_is_one_padded_row() -> None:
    (row,) = chunks("a photo of a cat", pad=0)
    assert row.ids == (START, 320, 1125, 539, 320, 2368, END, *[0] * 70)
    assert row.weights == (1.0,) * 77
    assert not row.weighted


def test_empty_prompt_is_one_row() -> None:
    (row,) = chunks("")
    assert row.ids == (START, *[END] * 76)


def test_words_equal_the_whole_text() -> None:
    text = "It's a photo, of 12 cats (at) home"
    (row,) = chunks(text.replace("(", r"\(").replace(")", r"\)"))
    assert list(row.ids[1 : 1 + len(encode(text))]) == encode(text)


def test_long_prompt_keeps_words_whole() -> None:
    word = "xqzvbn"
    size = len(encode(word))
    assert 1 < size < 8
    rows = chunks(" ".join([word] * 60))
    assert len(rows) > 1
    for row in rows:
        body = row.ids[1 : row.ids.index(END)]
        assert len(row.ids) == 77
        assert row.ids[0] == START
        assert len(body) % size == 0


def test_word_longer_than_a_row_is_cut() -> None:
    text = "xq" * 200
    rows = chunks(text)
    joined = [t for row in rows for t in row.ids[1 : row.ids.index(END)]]
    assert joined == encode(text)
    assert rows[0].ids[-1] == END


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="abc xyz,.!", max_size=500))
def test_no_token_is_lost(text: str) -> None:
    rows = chunks(text)
    assert [t for row in rows for t in row.ids[1 : row.ids.index(END)]] == encode(text)


def test_repeats_line_rows_up() -> None:
    assert (repeats(1, 3), repeats(2, 3), repeats(3, 2)) == (3, 3, 2)
