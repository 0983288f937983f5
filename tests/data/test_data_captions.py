"""Variants of captions: what may move moves, what is kept stays, each a function of its number."""

from dataclasses import replace

import pytest

from recast.data.captions import canonical, said, variants
from recast.data.subset import Subset

CAPTION = "1girl, hat, red dress, beach, night"
SHUFFLED = Subset(shuffle_caption=True, caption_variants=30)


def all_of(caption: str, how: Subset) -> list[str]:
    return [said(caption, how, k) for k in range(variants(caption, how))]


def test_a_plain_folder_says_captions_as_they_are() -> None:
    for text in (CAPTION, "", "a {b|c} {{d}} , e,,f"):
        assert variants(text, Subset()) == 1
        assert said(text, Subset(), 7) == text


def test_shuffled_tags_are_the_same_tags_in_many_orders() -> None:
    found = all_of(CAPTION, SHUFFLED)
    assert len(set(found)) > 20
    assert all(sorted(text.split(", ")) == sorted(CAPTION.split(", ")) for text in found)
    assert found == all_of(CAPTION, SHUFFLED)
    assert len({text.split(", ")[0] for text in found}) == 5


def test_kept_tokens_stay_in_front() -> None:
    for text in all_of(CAPTION, replace(SHUFFLED, keep_tokens=2)):
        assert text.startswith("1girl, hat, ")


def test_the_keep_separator_keeps_both_ends_and_never_reaches_the_encoder() -> None:
    how = replace(SHUFFLED, keep_tokens=1, keep_tokens_separator="|||")
    caption = "a girl, hat ||| x, y, z ||| best, last"
    found = all_of(caption, how)
    assert len(set(found)) == 6
    for text in found:
        assert text.startswith("a girl, hat, ")
        assert text.endswith(", best, last")
        assert "|||" not in text
    without = replace(how, shuffle_caption=False)
    assert all_of(caption, without) == ["a girl, hat, x, y, z, best, last"]
    # without the separator the count decides
    assert all(text.startswith("p, ") for text in all_of("p, q, r", how))


def test_secondary_separator_binds_tags() -> None:
    how = replace(SHUFFLED, secondary_separator=";;;")
    for text in all_of("sky;;; cloud;;; day, tree, house", how):
        assert "sky, cloud, day" in text


def test_tags_are_left_out_at_their_rate_and_kept_ones_never() -> None:
    how = Subset(caption_tag_dropout_rate=0.3, keep_tokens=1, caption_variants=400)
    caption = ", ".join(f"t{k}" for k in range(11))
    found = all_of(caption, how)
    assert all(text.startswith("t0") for text in found)
    kept = sum(len(text.split(", ")) - 1 for text in found) / 4000
    assert kept == pytest.approx(0.7, abs=0.03)


def test_wildcards_choose_a_line_and_one_of_each() -> None:
    how = Subset(enable_wildcard=True, caption_variants=60)
    found = set(all_of("a {red|blue|green} {cat|dog}\nsecond {{line}}", how))
    cats = {f"a {c} {a}" for c in ("red", "blue", "green") for a in ("cat", "dog")}
    assert found == cats | {"second {line}"}
    assert variants("nothing to choose", how) == 1


def test_prefix_and_suffix_also_where_the_caption_is_empty() -> None:
    how = Subset(caption_prefix="sks,", caption_suffix=", photo")
    assert said("a cat", how) == "sks, a cat , photo"
    assert said("", how) == "sks, , photo"


def test_the_canonical_caption_is_whole_and_in_order() -> None:
    how = replace(SHUFFLED, caption_tag_dropout_rate=0.9, caption_prefix="sks,")
    assert canonical(CAPTION, how) == f"sks, {CAPTION}"
