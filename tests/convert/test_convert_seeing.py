"""What a run shows of itself: previews of a prompts file, adapters on the way, speed, changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.convert import small

from recast.adapter import read_adapter
from recast.checkpoint import Checkpoint
from recast.convert import Job, prompted, run
from recast.convert.folder import Folder
from recast.convert.moving import FEWEST, write_picture
from recast.errors import Refused
from recast.events import Stage
from recast.recipe import Recipe, override
from recast.text.encode import Condition

PROMPTS = """# what to look at
a red kite over dunes --n blurry --w 64 --h 96 --d 7 --l 2 --s 2 --ss euler_a
two boats at noon --l 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    small.checkpoint(folder, "sdxl")
    small.images(folder / "images", 6)
    (folder / "watch.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


def recipe(home: Path, **sections: dict[str, Any]) -> Recipe:
    plain = small.recipe(home, objective="same", base="train", steps=4, rank=2)
    return override(plain, **sections)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def job(home: Path, out: Path, how: Recipe) -> Job:
    return Job(home / "sdxl.safetensors", out, how, images=home / "images", measure=False)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def seen(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a LoRA, text encoders too, that shows everything."""
    out = tmp_path_factory.mktemp("seen")
    how = recipe(
        home,
        watch={"prompts": str(home / "watch.txt"), "previews_every": 2, "previews_first": True,
               "validate_epochs": 1, "validate_share": 0.4, "alarm": False, "preview_steps": 2},
        save={"every": 1, "keep_last": 2},
        network={"kind": "lora", "dim": 2, "conv_dim": 2},
        train={"profile": "readout,te1"},
    )  # fmt: skip
    small.convert(job(home, out, how))
    return out


def test_a_prompts_file_is_painted_before_on_the_way_and_at_the_end(seen: Path) -> None:
    names = sorted(path.name for path in (seen / "previews").iterdir())
    lines = ("00-seed7", "01-seed1001")
    assert names == [f"step{step:08d}-{line}.png" for step in (0, 2, 4) for line in lines]
    assert size(seen / "previews" / names[0]) == (64, 96)
    assert size(seen / "previews" / names[1]) == (64, 64)
    first, last = ((seen / "previews" / names[k]).read_bytes() for k in (0, 4))
    assert first != last


def test_the_newest_adapters_stay_as_files(seen: Path) -> None:
    found = sorted((seen / "saved").iterdir())
    assert [path.name for path in found] == ["step00000003.safetensors", "step00000004.safetensors"]
    with Checkpoint(found[0]) as file:
        assert file.metadata["recast.step"] == "3"
    last, lora = read_adapter(found[1]), read_adapter(seen / "lora.safetensors")
    assert last.entries.keys() == lora.entries.keys()
    for name, entry in last.entries.items():
        assert entry.dense().equal(lora.entries[name].dense()), name


def test_the_log_tells_loss_rates_norms_speed_and_changes(seen: Path) -> None:
    found = rows(seen)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row in found:
        assert row.keys() >= {"loss", "grad_norm", "lr", "t", "losses", "pace", "change"}
        assert row["pace"]["it_s"] > 0
        assert row["pace"].get("memory", 1) > 0
    blocks = found[0]["change"]
    assert "OUT" in blocks
    assert {name.partition(".")[0] for name in blocks} >= {"TE1"}
    assert found[-1]["change"]["OUT"] > 0
    held = [row["validation"]["step"] for row in found if "validation" in row]
    assert held == [2, 4], "6 images, 2 of them held out, 2 to a step: a round is 2 steps"


def test_tensorboard_has_the_same(seen: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(seen / "tb")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/current", "loss/average", "lr/unet", "grad_norm", "pace/it_s"} <= tags
    assert {"change/OUT", "validation/data"} <= tags
    assert any(tag.startswith("loss/t0") for tag in tags)


def test_whether_to_stop_is_asked_once_a_step(home: Path, tmp_path: Path) -> None:
    """What processes agree on after a step holds for the whole step."""
    asked: list[str] = []
    stage = ""

    def stopped() -> int:
        asked.append(stage)
        return 0

    for event in run(job(home, tmp_path / "run", recipe(home)), stopped):
        stage = event.name if isinstance(event, Stage) else stage
    assert asked.count("train") == 4


def test_changes_are_drawn_once_there_are_enough(tmp_path: Path) -> None:
    lines = [json.dumps({"step": k, "change": {"OUT": k / 9, "IN": 0.1}}) for k in range(FEWEST)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert not write_picture(tmp_path)
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 99}']) + "\n")
    assert write_picture(tmp_path)
    assert size(tmp_path / "changes.png")[0] > 400


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ({"prompts": "absent.txt"}, "cannot be read as a UTF-8 prompts file"),
        ({"prompts": "odd.txt"}, "line 1: unknown option --q"),
        ({"prompts": "solver.txt"}, "nonsense"),
        ({"preview_solver": "nonsense"}, "nonsense"),
    ],
)
def test_what_cannot_be_painted_is_refused_before_anything_is_written(
    watch: dict[str, str], said: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.txt").write_text("a boat --q 3\n")
    (tmp_path / "solver.txt").write_text("a boat --ss nonsense\n")
    with pytest.raises(Refused, match=said):
        small.convert(job(home, tmp_path / "run", recipe(home, watch=watch)))
    assert not (tmp_path / "run").exists()


class Encoder:
    """Stands for a model: a condition is the length of its prompt."""

    def condition(self, prompts: list[str], size: object = None) -> Condition:
        return Condition(torch.full((1, 2, 3), float(len(prompts[0]))))

    def latent_shape(self, size: object = None) -> tuple[int, int, int]:
        return (4, 8, 8)


def test_lines_that_changed_while_a_run_was_interrupted_are_encoded_anew(
    home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lines.txt"
    how, folder = recipe(home, watch={"prompts": str(file)}), Folder(tmp_path, "run")
    for text in ("abc\n", "abc\nabcdef\n", "abcd\n"):
        file.write_text(text, encoding="utf-8")
        prompted.prepare(Encoder(), folder, how)  # type: ignore[arg-type]
        found = prompted.read(tmp_path, how)
        assert [line.condition.context[0, 0, 0] for line in found] == [
            len(line) for line in text.split()
        ]


def test_lines_take_from_the_recipe_what_they_leave_open(home: Path) -> None:
    how = recipe(home, watch={"prompts": str(home / "watch.txt"), "preview_solver": "heun"})
    first, second = prompted.lines_of(how)
    assert (first.solver, first.steps, first.seed, first.scale) == ("euler_ancestral", 2, 7, 2.0)
    assert (second.solver, second.steps, second.seed) == ("heun", how.watch.preview_steps, 1001)
    assert (first.negative, second.negative) == ("blurry", "")
