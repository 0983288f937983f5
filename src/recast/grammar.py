"""Prompts put together from symbols: things with attributes, relations, a place, light, a style.

    1  a lantern
    2  a rusty tin lantern
    3  a rusty lantern beside a sleeping fox
    4  a rusty lantern beside a sleeping fox, in a walled garden, at dusk
    5  an etching of a rusty lantern beside a sleeping fox above two cars, in ..., seen from afar

A scene is kept as its symbols, so that whoever wants to know what a picture should show need not
read the sentence. The k-th scene is a pure function of (seed, k): a longer list begins with the
shorter one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from recast.errors import Refused

Shard = tuple[int, int]
"""(i, n): the i-th of n parts, from 1."""

LEVELS = (1, 2, 3, 4, 5)
TAGGED = 0.2  # of the prompts are lists of tags
PLURAL = 0.15  # of the things come in numbers
SMALL = frozenset(["in", "on", "at", "under", "by", "with", "before", "of", "a", "an", "its"])


@dataclass(frozen=True)
class Kind:
    """Nouns that can be counted, what is said of them before (states) and after them (looks)."""

    nouns: tuple[str, ...]
    states: tuple[str, ...]
    looks: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(word.strip() for word in text.split(","))


COLOURS = words(
    "red, blue, green, yellow, black, white, orange, purple, brown, grey, pink, turquoise, golden"
)
KINDS: dict[str, Kind] = {
    "person": Kind(
        words(
            "woman, man, girl, boy, nurse, farmer, dancer, soldier, sailor, monk, baker, cyclist, "
            "painter, mechanic, teacher, king, astronaut, tourist, diver, juggler"
        ),
        words("old, young, laughing, tired, tall, barefoot, serious, tattooed, elegant, freckled"),
        words(
            "in a straw hat, in a raincoat, with curly hair, in uniform, with glasses, in a silk "
            "dress, with a scarf, in work clothes, in a leather jacket, with braided hair"
        ),
    ),
    "animal": Kind(
        words(
            "cat, dog, fox, owl, horse, tiger, crow, rabbit, turtle, heron, bear, lizard, frog, "
            "goat, parrot, elephant, hedgehog, swan, beetle, wolf"
        ),
        words("sleeping, wet, young, thin, huge, running, curious, old, tame, watchful"),
        words("with bright eyes, in motion, in profile, with its mouth open"),
    ),
    "object": Kind(
        words(
            "lantern, teapot, clock, violin, suitcase, chair, umbrella, camera, mirror, typewriter,"
            " ladder, globe, vase, drum, key, telescope, bucket, candle, mask, kite, bell, radio"
        ),
        words("rusty, broken, tiny, polished, dusty, ornate, cracked, plain, toppled, gleaming"),
        words("made of glass, made of brass, made of paper, made of wood, of porcelain, of stone"),
    ),
    "food": Kind(
        words("apple, loaf, cake, pear, pie, sandwich, melon, cheese wheel, lemon, pumpkin, egg"),
        words("sliced, fresh, burnt, ripe, half-eaten, glazed, frozen, steaming"),
        words("on a plate, in a bowl, on a board, wrapped in paper"),
    ),
    "plant": Kind(
        words("rose, oak, cactus, fern, sunflower, mushroom, palm, tulip, vine, birch, orchid"),
        words("wilting, blooming, withered, frosted, overgrown, young, bare"),
        words("in a pot, full of thorns, with wide leaves, covered with dew"),
    ),
    "vehicle": Kind(
        words("car, bicycle, tram, sailing boat, lorry, motorcycle, balloon, tractor, canoe, bus"),
        words("old, abandoned, shining, speeding, parked, muddy, tiny"),
        words("with its lights on, covered with snow, under a tarpaulin, full of flowers"),
    ),
    "building": Kind(
        words("tower, cottage, temple, bridge, lighthouse, barn, castle, kiosk, mill, skyscraper"),
        words("ruined, narrow, crooked, modern, ancient, painted, lonely"),
        words("with lit windows, with a tiled roof, covered with ivy, under scaffolding"),
    ),
}  # fmt: skip
RELATIONS = words(
    "beside, behind, in front of, above, under, next to, opposite, facing, far from, close to, "
    "leaning on, to the left of, to the right of"
)
NUMBERS = {2: "two", 3: "three", 5: "five"}
PLACES = words(
    "in a walled garden, on a beach, in an empty street, in a workshop, on a rooftop, in a forest "
    "clearing, in a kitchen, in a desert, on a frozen lake, in a market hall, in a library, on a "
    "mountain pass, at a railway platform, in a cave, in a meadow, in a museum, under a bridge, on "
    "a wooden table, in a flooded cellar, before a plain wall"
)
LIGHTS = words(
    "at dusk, at noon, in fog, by candlelight, under neon light, in heavy rain, in moonlight, "
    "backlit, in soft window light, under a stormy sky, in falling snow, in hard studio light"
)
STYLES = words(
    "a photograph of, an oil painting of, a watercolour of, an etching of, a pencil sketch of, a "
    "woodcut of, a pixel art picture of, a clay figure of, a paper collage of, a 3d render of, a "
    "comic panel of, a mosaic of, a faded polaroid of, a linocut of, an anime picture of"
)
VIEWS = words(
    "seen from above, close-up, wide shot, seen from afar, low angle, shallow depth of field, "
    "symmetrical, off-centre, reflected in water, in silhouette"
)


@dataclass(frozen=True)
class Thing:
    """Something in a picture: how many of a noun, its adjectives before and a phrase after it."""

    kind: str
    noun: str
    adjectives: tuple[str, ...] = ()
    phrase: str = ""
    count: int = 1

    def text(self) -> str:
        noun = self.noun if self.count == 1 else plural(self.noun)
        said = " ".join([*self.adjectives, noun, *([self.phrase] if self.phrase else [])])
        return f"{NUMBERS[self.count]} {said}" if self.count > 1 else f"{article(said)} {said}"


@dataclass(frozen=True)
class Scene:
    """A thing, what stands in relation to the one before it, and where, in which light, as what."""

    level: int
    thing: Thing
    others: tuple[tuple[str, Thing], ...] = ()
    place: str = ""
    light: str = ""
    style: str = ""
    view: str = ""

    def text(self, manner: Literal["sentence", "tags"] = "sentence") -> str:
        """The scene as a prompt; tags name the symbols and leave the relations to the picture."""
        things = [self.thing, *(thing for _, thing in self.others)]
        around = [part for part in (self.place, self.light, self.view) if part]
        if manner == "tags":
            tags = [tag for thing in things for tag in tags_of(thing)]
            styles = [bare(self.style.removesuffix(" of"))] if self.style else []
            return ", ".join(dict.fromkeys([*tags, *map(bare, around), *styles]))
        said = " ".join([self.thing.text(), *(f"{how} {what.text()}" for how, what in self.others)])
        return ", ".join([f"{self.style} {said}" if self.style else said, *around])


def scene(level: int, source: random.Random) -> Scene:
    """A random scene of a level, 1 to 5."""
    if level not in LEVELS:
        raise Refused(f"no level {level} in the grammar of prompts: give one of 1 to 5.")
    others = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}[level]
    things = [thing(level, source) for _ in range(1 + others)]
    related = tuple((source.choice(RELATIONS), other) for other in things[1:])
    found = Scene(level, things[0], related)
    if level >= 4:
        found = replace(found, place=source.choice(PLACES), light=source.choice(LIGHTS))
    if level == 5:
        found = replace(found, style=source.choice(STYLES), view=source.choice(VIEWS))
    return found


def thing(level: int, source: random.Random) -> Thing:
    """A random thing: bare at level 1, with an adjective or two above, at times with a phrase."""
    name = source.choice(tuple(KINDS))
    kind = KINDS[name]
    noun = source.choice(kind.nouns)
    if level == 1:
        return Thing(name, noun)
    adjectives = [source.choice(kind.states)]
    if name != "person" and source.random() < 0.5:
        adjectives.append(source.choice(COLOURS))
    phrase = source.choice(kind.looks) if source.random() < 0.4 else ""
    count = source.choice(tuple(NUMBERS)) if source.random() < PLURAL else 1
    if count > 1:
        phrase = ""  # its words speak of one
    return Thing(name, noun, tuple(adjectives), phrase, count)


def scenes(
    count: int, seed: int = 0, level: int = 0, shard: Shard = (1, 1)
) -> Iterator[tuple[Scene, str]]:
    """That many scenes and their prompts, of one level, or of the five in turn (0).

    A shard (i, n) are those at i - 1, i - 1 + n, …: the n shards together are the whole, each once,
    whoever makes them. Raises Refused for a shard that there is not.
    """
    which, of = checked(shard)
    for k in range(which - 1, count, of):
        source = random.Random(f"{seed}/grammar/{k}")
        made = scene(level or LEVELS[k % len(LEVELS)], source)
        tagged = made.level > 1 and source.random() < TAGGED
        yield made, made.text("tags" if tagged else "sentence")


def prompts(count: int, seed: int = 0, level: int = 0, shard: Shard = (1, 1)) -> tuple[str, ...]:
    """The prompts alone."""
    return tuple(text for _, text in scenes(count, seed, level, shard))


def checked(shard: Shard) -> Shard:
    """The shard; refuses one that there is not."""
    which, of = shard
    if not 1 <= which <= of:
        raise Refused(f"there is no shard {which} of {of}: give i/n with i from 1 to n.")
    return shard


def tags_of(thing: Thing) -> Sequence[str]:
    """A thing as tags."""
    number = [f"{thing.count} {plural(thing.noun)}"] if thing.count > 1 else [thing.noun]
    return [*number, *thing.adjectives, *([bare(thing.phrase)] if thing.phrase else [])]


def bare(phrase: str) -> str:
    """A phrase without the small words at its front."""
    found = phrase.split()
    while len(found) > 1 and found[0] in SMALL:
        found = found[1:]
    return " ".join(found)


def article(said: str) -> str:
    return "an" if said[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    """More than one of a noun."""
    irregular = {"woman": "women", "man": "men", "loaf": "loaves", "wolf": "wolves"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
