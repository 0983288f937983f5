"""What is said of a picture: a caption with its prefix, its tags shuffled, some of them left out.

A caption whose settings make it vary has a few numbered variants, each a pure function of the
caption, the settings and the number.  So every variant can be encoded once and kept on disk.

    caption -> prefix and suffix -> wildcards -> (kept | free | kept) tags -> shuffled, thinned
"""

from __future__ import annotations

import re
from dataclasses import replace

from recast.data.batches import permutation, uniform
from recast.data.subset import Subset

CHOICE = re.compile(r"\{([^{}]*)\}")
OPEN, SHUT = "\ue000", "\ue001"  # stand for {{ and }}, which are braces and no choice


def variants(caption: str, how: Subset) -> int:
    """How many variants of a caption there are: 1 where nothing makes it vary."""
    if not caption:
        return 1
    chosen = how.enable_wildcard and ("\n" in caption or CHOICE.search(escaped(caption)))
    moved = (how.shuffle_caption or how.caption_tag_dropout_rate) and len(free(caption, how)) > 1
    return how.caption_variants if chosen or moved else 1


def said(caption: str, how: Subset, variant: int = 0) -> str:
    """Return a variant of a caption; the empty caption stays empty but for prefix and suffix."""
    text = " ".join(part for part in (how.caption_prefix, caption, how.caption_suffix) if part)
    if how.enable_wildcard:
        text = chosen(text, variant)
    if how.shuffle_caption or how.caption_tag_dropout_rate or how.keep_tokens_separator:
        head, tags, tail = parted(text, how)
        if how.shuffle_caption:
            tags = [tags[k] for k in permutation(len(tags), 0, "tags", text, variant)]
        if how.caption_tag_dropout_rate:
            rate = how.caption_tag_dropout_rate
            tags = [
                tag for k, tag in enumerate(tags) if uniform(0, "tag", text, variant, k) >= rate
            ]
        join = f"{how.caption_separator.strip() or how.caption_separator} "
        text = join.join([*head, *tags, *tail])
    if how.secondary_separator:
        text = text.replace(how.secondary_separator, how.caption_separator)
    return text


def canonical(caption: str, how: Subset) -> str:
    """A caption as it is said in its own order and whole, for validation and reports."""
    return said(caption, replace(how, shuffle_caption=False, caption_tag_dropout_rate=0.0))


def free(caption: str, how: Subset) -> list[str]:
    """The tags of a caption that may change places or be left out."""
    return parted(caption, how)[1]


def parted(text: str, how: Subset) -> tuple[list[str], list[str], list[str]]:
    """Split a caption into the tags kept in front, the free ones, and those kept at the end.

    The keep separator is no tag: it never reaches the text encoder.
    """
    sign = how.keep_tokens_separator
    if sign and sign in text:
        head, _, rest = text.partition(sign)
        middle, _, tail = rest.partition(sign)
        return tags_of(head, how), tags_of(middle, how), tags_of(tail, how)
    tags = tags_of(text, how)
    return tags[: how.keep_tokens], tags[how.keep_tokens :], []


def tags_of(text: str, how: Subset) -> list[str]:
    """The tags of a text, trimmed, without empty ones."""
    return [tag for part in text.split(how.caption_separator) if (tag := part.strip())]


def chosen(text: str, variant: int) -> str:
    """Choose a line of a text and one of each {a|b}; {{ and }} are plain braces."""
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    line = escaped(lines[int(uniform(0, "line", text, variant) * len(lines))])
    place = iter(range(len(line)))

    def pick(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[int(uniform(0, "choice", text, variant, next(place)) * len(options))]

    return CHOICE.sub(pick, line).replace(OPEN, "{").replace(SHUT, "}").strip()


def escaped(text: str) -> str:
    """Put stand-ins for doubled braces."""
    return text.replace("{{", OPEN).replace("}}", SHUT)
