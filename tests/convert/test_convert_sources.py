"""Where draws come from: the recipe's source, its identity, and a mix that is dealt evenly."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.convert import command, small
from tests.convert.test_convert_refusals import refused
from tests.convert.test_convert_resume import Stop

from recast import grammar
from recast.checkpoint import Checkpoint
from recast.commit import lock
from recast.convert import Job
from recast.convert.checks import check_room
from recast.convert.material import Mixed, training_captions
from recast.convert.selfmade import Selfmade
from recast.convert.sources import check, dream_plan, sources_of
from recast.dream import shard_path
from recast.errors import NoRoom, Refused, Stopped
from recast.layout import detect
from recast.recipe import override
from recast.train import from_data, from_teacher
from recast.train.draws import seeded

STEPS = 3


def job(home: Path, out: Path, images: bool = False, **data: object) -> Job:
    recipe = override(small.recipe(home, "flow", steps=STEPS), data=data)
    folder = home / "images" if images else None
    return Job(home / "sd15.safetensors", out, recipe, images=folder, measure=False)


@dataclass(frozen=True)
class Fake:
    """A source that tells what it was asked for."""

    name: str

    def draw(self, number: int, t: object, weight: object, place: int | None = None) -> object:
        return self.name, number, place


@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
def test_a_mix_deals_its_batches_evenly_and_takes_the_images_in_their_order(
    share: float, home: Path
) -> None:
    recipe = override(job(home, home).recipe, data={"mix_share": share}, train={"accumulate": 5})
    recipe = override(recipe, train={"steps": 8})
    mixed = Mixed(Fake("images"), Fake("dreams"), recipe)  # type: ignore[arg-type]
    made = list(mixed.draws(0))
    assert [number for _, number, _ in made] == list(range(40))
    places = [place for name, _, place in made if name == "images"]
    assert places == list(range(len(places)))
    for count in range(1, 41):
        images = sum(name == "images" for name, *_ in made[:count])
        assert abs(images - count * share) < 1
    assert list(mixed.draws(3)) == made[15:]


def test_a_mix_stopped_on_its_way_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    small.convert(job(home, tmp_path / "whole", images=True, source="mix"))
    broken = job(home, tmp_path / "broken", images=True, source="mix")
    for stage, said in (("dream", "while dreaming"), ("train", "after step 1")):
        with pytest.raises(Stopped, match=said):
            Stop(stage).follow(broken)
    small.convert(broken)
    names = (*small.NAMES, "log.jsonl")
    assert small.contents(tmp_path / "broken", names) == small.contents(tmp_path / "whole", names)
    assert (tmp_path / "whole/cache").exists()
    identity = json.loads((tmp_path / "whole/run.json").read_text(encoding="utf-8"))
    assert "dreamt " in identity["images"]
    assert len(identity["images"]) > 40


def test_dreams_are_noised_as_images_are(home: Path, tmp_path: Path) -> None:
    """Draws hold no answer of the original's: the target asks it, or takes the data's."""
    from recast.convert.folder import Folder
    from recast.convert.material import gather
    from recast.objective import FLOW

    asked = job(home, tmp_path, images=True, source="mix", mix_with="dreams", pictures=4)
    with Checkpoint(asked.model) as file:
        steps = gather(file, Folder(tmp_path, "x", {}), asked, "eps", FLOW, lambda: 0)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            material = end.value
    assert isinstance(material.dreams, Selfmade)
    with Checkpoint(shard_path(tmp_path / "pairs", 0)) as file:
        assert len(file["t"]) == 1
    first, second, third = material.draws(0)
    assert first.index.max() < 4
    assert second.x0.shape == first.x0.shape
    assert first.teacher is second.teacher is None
    assert [len(each.condition) for each in (first, second, third)] == [2, 2, 2]
    (again,) = material.draws(2)
    assert again.x.equal(third.x)
    eps = torch.randn(first.x0.shape, generator=seeded(0, "noise", 0))
    torch.testing.assert_close(first.x, FLOW.noise(first.x0, eps, first.t))
    data = from_data(FLOW)(first).value
    torch.testing.assert_close(data, eps - first.x0)
    net = from_teacher(lambda condition: lambda x, t: 0 * x, FLOW, FLOW)
    assert not net(first).value.equal(data)


def test_only_the_first_process_dreams(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others read: three processes of one run do not find the dreams in each other's use."""
    from recast.convert.folder import Folder
    from recast.convert.material import gather
    from recast.objective import FLOW

    def gathered() -> None:
        with Checkpoint(home / "sd15.safetensors") as file:
            asked = job(home, tmp_path, source="replay", pictures=2)
            for _ in gather(file, Folder(tmp_path, "x", {}), asked, "eps", FLOW, lambda: 0):
                pass

    gathered()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    with lock(tmp_path / "pairs"):
        gathered()


def test_captions_and_the_grammar_are_dreamt_of(home: Path, tmp_path: Path) -> None:
    with Checkpoint(home / "sd15.safetensors") as file:
        told = job(home, tmp_path, images=True, source="replay", prompts="captions", pictures=6)
        assert sorted(training_captions(told, file, None)) == sorted(2 * small.PROMPTS)  # type: ignore[arg-type]
        made_up = job(home, tmp_path, prompts="grammar", pictures=5, grammar_level=1)
        plan = dream_plan(made_up, file, "flow")
        assert len(plan.prompts) == 5
        assert all(len(text.split()) < 4 for text in plan.prompts)
        mixed = job(home, tmp_path, images=True, source="mix", prompts="captions")
        assert len(training_captions(mixed, file, None)) == 3 + 2  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["caption", "picture", "nothing"])
def test_another_caption_is_another_run(what: str, home: Path, tmp_path: Path) -> None:
    """Replay of captions depends on the captions; a mix on the pictures too."""
    from recast.convert import identify
    from recast.convert.material import examples_of

    folder = shutil.copytree(home / "images", tmp_path / "images")
    replays = replace(job(home, tmp_path, source="replay", prompts="captions"), images=folder)
    mixes = replace(job(home, tmp_path, source="mix", prompts="captions"), images=folder)

    def identities() -> list[object]:
        with Checkpoint(replays.model) as file:
            found = examples_of(folder, skip_broken=False)
            return [
                identify(file, each, "eps", "flow", found if sources_of(each).images else ())
                for each in (replays, mixes)
            ]

    before = identities()
    if what == "caption":
        (folder / "1.txt").write_text("a green door", encoding="utf-8")
    elif what == "picture":
        small.images(tmp_path / "others", 4)
        shutil.copy(tmp_path / "others/3.png", folder / "1.png")
    changed = [one != other for one, other in zip(before, identities(), strict=True)]
    assert (
        changed
        == {"caption": [True, True], "picture": [False, True], "nothing": [False, False]}[what]
    )


@pytest.mark.parametrize(
    ("images", "data", "said"),
    [
        (False, {"source": "images"}, "give --images"),
        (False, {"source": "mix"}, "give --images"),
        (False, {"prompts": "captions"}, "whose captions they are"),
        (True, {"source": "replay"}, "leaves the images out"),
        (True, {"source": "dreams"}, "leaves the images out"),
        (False, {"source": "replay", "vae": "x.safetensors"}, "latent space"),
        (False, {"grammar_level": 2}, "grammar_level"),
        (True, {"source": "images", "grammar_level": 2, "prompts": "grammar"}, "grammar_level"),
    ],
)
def test_sources_that_lack_something_are_refused(
    images: bool, data: dict[str, object], said: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=said):
        check(job(home, tmp_path, images=images, **data))


@pytest.mark.parametrize(
    ("images", "data", "wanted"),
    [
        (False, {}, (False, "replay")),
        (True, {}, (True, "replay")),
        (True, {"source": "images"}, (True, None)),
        (True, {"mix_share": 1.0}, (True, None)),
        (True, {"vae": "x"}, (True, None)),
        (False, {"vae": "x"}, (False, "dreams")),
        (False, {"source": "dreams"}, (False, "dreams")),
        (True, {"source": "replay", "prompts": "captions"}, (False, "replay")),
        (True, {"source": "mix"}, (True, "replay")),
        (True, {"source": "mix", "mix_with": "dreams"}, (True, "dreams")),
        (True, {"source": "mix", "vae": "x"}, (True, "dreams")),
    ],
)
def test_what_a_run_learns_from(
    images: bool, data: dict[str, object], wanted: tuple[bool, str | None], home: Path
) -> None:
    asked = job(home, home, images=images, **data)
    check(asked)
    found = sources_of(asked)
    assert (found.images is not None, found.dreams) == wanted


def test_room_is_asked_for_the_dreams_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 10**9))
    with Checkpoint(home / "sd15.safetensors") as file:
        layout = detect(file)
        check_room(file, layout, job(home, tmp_path, pictures=1000))
        with pytest.raises(NoRoom):
            check_room(file, layout, job(home, tmp_path, pictures=1000 * 1000))
        check_room(file, layout, job(home, tmp_path, source="dreams", pictures=500 * 1000))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--captions", "IMAGES", "--grammar", "3"], "give one"),
        (["--captions", "IMAGES", "--level", "3"], "give that too"),
        (["--captions", "nowhere"], "no such folder"),
        (["--solver", "eulr"], "no solver 'eulr'"),
    ],
)
def test_a_dream_of_two_things_or_of_none_is_refused(
    words: list[str], said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [home / "images" if word == "IMAGES" else word for word in words]
    line = ["dream", home / "sd15.safetensors", *named, "--out", tmp_path / "pairs"]
    assert said in refused(line, tmp_path, capsys)


def test_the_command_dreams_of_the_grammar_and_says_what_it_takes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["dream", home / "sd15.safetensors", "--grammar", 3, "--level", 2, "--pictures", 4]
    words += ["--steps", 2, "--solver", "heun", "--out", tmp_path / "pairs", "--json"]
    command.run(words)
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert (facts["prompts"], facts["pictures"], facts["states"]) == (3, 4, 8)
    with Checkpoint(shard_path(tmp_path / "pairs", 0)) as file:
        dreamt = json.loads(file.metadata["recast.prompts"])
    assert set(dreamt) == set(grammar.prompts(3, 0, 2))
    assert facts["bytes"] == shard_path(tmp_path / "pairs", 0).stat().st_size
    assert "their pairs take 12.3 kB." in told.err


def test_dreams_may_be_of_another_size_than_the_images(home: Path, tmp_path: Path) -> None:
    mixed = job(home, tmp_path, images=True, source="mix", dream_size=32)
    small.convert(mixed)
    shard = next((mixed.out / "pairs").glob("pairs-*.safetensors"))
    with Checkpoint(shard) as pairs:
        assert {spec.shape[-1] for spec in pairs.specs.values() if len(spec.shape) == 5} == {4}


def test_text_encoders_in_training_are_held_to_what_the_original_answered(
    home: Path, tmp_path: Path
) -> None:
    """Batch 0 is replayed: an untrained student repeats the answers, reading the prompts itself."""
    how = small.recipe(home, "same", steps=2, profile="readout,te1", lr=1e-2)
    how = override(
        how, target={"teacher": "data"}, network={"kind": "lora", "dim": 2, "conv_dim": 2},
        data={"source": "mix", "mix_share": 0.5, "jitter": 0.0},
    )  # fmt: skip
    small.convert(replace(job(home, tmp_path, images=True), recipe=how))
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert first["loss"] < 1e-5
    assert second["loss"] > 1e-2
    with Checkpoint(tmp_path / "lora.safetensors") as file:
        ups = [key for key in file if key.startswith("lora_te") and "up" in key]
        assert ups
        assert any(file[key].any() for key in ups)


def test_in_a_mix_noise_is_of_the_images_alone(home: Path, tmp_path: Path) -> None:
    def losses(out: Path, offset: float) -> list[float]:
        one = job(home, out, images=True, source="mix")
        how = override(one.recipe, noise={"offset": offset}, train={"steps": 2})
        small.convert(replace(one, recipe=how))
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    plain, noised = losses(tmp_path / "plain", 0.0), losses(tmp_path / "noised", 0.5)
    assert noised[0] == plain[0]
    assert noised[1] != plain[1]
