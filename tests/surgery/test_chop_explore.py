"""Which blocks make the pictures: the mixture of weights, the greedy choice, the page."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.adapter.loaders import answer, change, network

from recast import pocket
from recast.adapter import Adapter, attach, read_adapter, write_adapter
from recast.adapter.formats import open_raw
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.errors import Refused
from recast.layout import detect
from recast.layout.names import PART_NAMES
from recast.lowrank import LowRank
from recast.model import open_model
from recast.surgery.chop import chop
from recast.surgery.contents import held
from recast.surgery.explore import groups_of
from recast.surgery.mix import Mix
from recast.surgery.page import file_size, heat, strength
from recast.surgery.weights import only


def test_a_mixture_is_the_attached_adapter_and_goes_back_to_the_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors")) as checkpoint:
        layout = detect(checkpoint)
        sites = [s for s in layout.sites("all") if s.block in ("OUT04", "IN04", "OUT")]
        write_adapter(tmp_path / "a", change(checkpoint, sites))
        adapter = read_adapter(tmp_path / "a", layout)
        with open_raw(tmp_path / "a", layout) as raw:
            groups = groups_of(held(raw, tmp_path / "a", layout)[0])
        model = open_model(checkpoint)
        mix = Mix(model, adapter, {m.spot.lora: g.name for g in groups for m in g.modules})
        before = answer(model.unet, layout, "unet")
        mix.set(["OUT", "IN04"])
        mix.set(["OUT04", "IN04"])
        mine = [site for site in sites if site.block != "OUT"]
        entries = {f"{s.lora}.weight": adapter.entries[f"{s.lora}.weight"] for s in mine}
        net = network(checkpoint, "unet")
        attach({"unet": net}, Adapter(entries, adapter.metadata), mine)
        wanted = answer(net, layout, "unet")
        assert (answer(model.unet, layout, "unet") - wanted).norm() < 1e-5 * wanted.norm()
        assert (wanted - before).norm() > 0.01 * before.norm()
        mix.set([])
        assert torch.equal(answer(model.unet, layout, "unet"), before)


def test_heat_is_black_where_nothing_changed_and_white_where_most_did() -> None:
    one = torch.zeros(3, 2, 2)
    other = one.clone()
    other[:, 0, 0] = 0.02
    found = heat(one, other, strength([one], [other]))
    assert torch.equal(found[:, 1, 1], torch.full((3,), -1.0))
    assert torch.equal(found[:, 0, 0], torch.ones(3))  # however little that is, down to one level
    assert strength([one], [one]) == 255


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A change of two blocks of pocket-xl that shows, and one, IN08, of the size of dust."""
    path = tmp_path_factory.mktemp("explore") / "lora.safetensors"
    with Checkpoint(pocket.path("pocket-xl")) as checkpoint:
        sites = [s for s in detect(checkpoint).sites("all")
                 if s.block in ("IN08", "OUT07", "OUT08")]  # fmt: skip
        made = change(checkpoint, sites)
        dust = {s.lora for s in sites if s.block == "IN08"}
        entries = {
            name: LowRank(e.up * 1e-4, e.down) if name.removesuffix(".weight") in dust else e
            for name, e in made.entries.items()
            if isinstance(e, LowRank)
        }
    write_adapter(path, Adapter(dict(entries), made.metadata), dtype="F16")
    return path


def test_the_page_suggests_what_makes_the_pictures(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block without effect is not suggested; likeness and size are those of the chopped file."""
    torch.set_num_threads(1)
    page = tmp_path / "page.html"
    words = ["chop", lora, "--explore", "pocket-xl", "--prompt", "</script><b>a red circle",
             "--steps", 2, "--kept", 0.999, "--out", page, "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main([*map(str, words)])
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["suggested"] == "OUT07,OUT08"
    assert 0.999 <= found["kept"] <= 1
    rows = found["blocks"]
    assert list(rows) == ["IN08", "OUT07", "OUT08"]
    assert rows["IN08"]["without_kept"] > 0.999
    assert rows["IN08"]["alone_kept"] < 0.01
    assert rows["OUT08"]["without_kept"] < 0.999
    text = page.read_text(encoding="utf-8")
    assert "<b>a red circle" not in text
    assert not re.search(r"(src|href)=.?https?:", text)
    assert text.count("<img") == 3 + 4 * 3
    assert not re.search(r'<img src=""|<img src="[^d]', text)
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    assert set(data["bytes"]) == set(rows)
    assert data["dialects"]["21"][8:10] == [["IN08"], []]
    done = chop(lora, tmp_path / "small.safetensors", only(found["suggested"]))
    assert done.bytes == pytest.approx(found["bytes"], rel=0.03)
    with open_raw(lora) as raw:
        groups = groups_of(held(raw, lora)[0])
        assert file_size(groups, list(rows)) == pytest.approx(lora.stat().st_size, rel=0.01)


def test_networks_take_turns_in_the_device_s_usual_precision(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the verbs that sample do: SDXL in fp32, all of it at once, fits few devices."""
    asked: list[dict[str, object]] = []

    def opened(*_: object, **keywords: object) -> None:
        asked.append(keywords)
        raise Refused("far enough")

    monkeypatch.setattr("recast.model.open_model", opened)
    monkeypatch.setattr("recast.model.usual_dtype", lambda device: (torch.bfloat16, device))
    with pytest.raises(SystemExit):
        main(["chop", str(lora), "--explore", "pocket-xl", "--prompt", "a", "--device", "cpu",
              "--out", str(tmp_path / "x.html")])  # fmt: skip
    assert asked == [{"dtype": (torch.bfloat16, "cpu"), "device": "cpu", "parts": PART_NAMES,
                      "objective": None, "lazily": True}]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.html"], "give --prompt"),
        (["--prompt", "a", "--out", "x.safetensors"], "page.html"),
        (["--prompt", "a"], "page.html"),
        (["--prompt", "a", "--out", "x.html", "--kept", "2"], "no share"),
        (["--prompt", "a", "--out", "x.html", "--keep", "OUT07"], "leave out --keep"),
        (["--prompt", "a", "--out", "x.html", "--size", "63"], "multiples of 8|--size"),
        (["--prompt", "a", "--out", "x.html", "--device", "nowhere"], "--device"),
    ],
)
def test_mistakes_end_in_one_sentence(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    given = [str(tmp_path / word) if word.startswith("x.") else word for word in words]
    with pytest.raises(SystemExit) as left:
        main(["chop", str(lora), "--explore", "pocket-xl", *given])
    assert left.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_and_one_without_effect_are_refused(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = read_adapter(lora)
    still = {n: LowRank(torch.zeros_like(e.up), e.down) for n, e in adapter.entries.items()
             if isinstance(e, LowRank)}  # fmt: skip
    write_adapter(tmp_path / "still", Adapter(dict(still), adapter.metadata))
    model = tiny.checkpoint(tmp_path / "other.safetensors")
    page = ["--prompt", "a", "--steps", "1", "--out", str(tmp_path / "x.html")]
    for words, said in (
        ([str(tmp_path / "still"), "--explore", "pocket-xl"], "changes no pixel"),
        ([str(lora), "--explore", str(model)], "another (size|architecture)"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["chop", *words, *page])
        assert left.value.code == 2
        assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "x.html").exists()
