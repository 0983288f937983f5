"""The page needs nothing else, shows text as text, and comes back from disk as it was written."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluate.example import example

from recast.errors import Refused
from recast.evaluate.loading import how_to_load
from recast.evaluate.losses import losses_by_level
from recast.evaluate.report import load_report, render, write_report
from recast.evaluate.values import Drift, Report, measured, unmeasured
from recast.evaluate.words import rows, summary

NOTHING = Report("m", "eps", "flow", *[unmeasured("nothing ran")] * 4, Drift())
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "img", "br", "hr", "link", "input", "use", "path"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def full() -> Report:
    return example(count=9)


def test_the_page_loads_nothing_from_outside(full: Report) -> None:
    text = render(full)
    page = Page(text)
    for tag, key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, key, value[:60])
        assert not key.startswith("on")
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    style = re.findall(r"<style.*?</style>", text, re.DOTALL)
    assert not any("url(" in part.replace("url(#", "") or "@import" in part for part in style)
    policy = next(v for t, k, v in page.attributes if k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")
    assert page.tags.count("img") == 27
    assert page.tags.count("svg") == 2


@pytest.mark.parametrize("where", ["caption", "setting", "model", "note", "hash", "file"])
def test_markup_in_any_text_is_shown_as_text(full: Report, where: str) -> None:
    evil = {
        "caption": replace(full, shots=(replace(full.shots[0], caption=EVIL),)),
        "setting": replace(full, settings={EVIL: {EVIL: EVIL}}),
        "model": replace(full, model=EVIL, source=EVIL, target=EVIL, command=EVIL),
        "note": replace(full, notes=(EVIL,), alignment=unmeasured(EVIL)),
        "hash": replace(full, hashes={EVIL: EVIL}, timings={EVIL: 1.0}),
        "file": replace(full, files=(replace(full.files[0], name=EVIL, use=EVIL),)),
    }[where]
    page = Page(render(evil))
    assert "script" not in page.tags
    assert EVIL in page.text
    assert not any(key.startswith("on") for _, key, _ in page.attributes)


@given(st.text(max_size=40))
@settings(max_examples=30, deadline=None)
def test_any_text_survives(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    page = Page(render(replace(NOTHING, model=f"-{text}-", command=text)))
    assert page.tags.count("h1") == 1
    assert "script" not in page.tags


def test_an_empty_report_is_a_valid_page(tmp_path: Path) -> None:
    write_report(tmp_path, NOTHING)
    page = Page((tmp_path / "report.html").read_text())
    assert "Nothing was measured" in page.text
    assert "No pictures were made" in page.text
    assert load_report(tmp_path) == NOTHING


def test_what_is_written_comes_back(full: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    assert load_report(tmp_path) == full
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write_report(tmp_path, load_report(tmp_path))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_json_has_the_names_that_scripts_rely_on(full: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    values = json.loads((tmp_path / "report.json").read_text())
    for key in ("alignment", "retention", "leakage", "psnr_same_noise_db", "drift"):
        assert {"original", "converted", "ratio"} <= values[key].keys()
    assert values["psnr_same_noise_db"]["converted"] == 32.8
    assert values["leakage"]["ratio"] is None
    assert (tmp_path / values["shots"][0]["wrong"]).read_bytes() == full.shots[0].wrong


def test_broken_reports_are_refused(full: Report, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no report"):
        load_report(tmp_path)
    for text in ("", "[]", "{}", '{"shots": [{}]}', '{"shots": 3}', "[" * 5000):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(Refused, match="is no report of Recast"):
            load_report(tmp_path)


def test_a_missing_picture_leaves_its_prompt_out(full: Report, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    (tmp_path / "pictures" / "00-original.png").unlink()
    assert load_report(tmp_path).shots == full.shots[1:]


def test_figures_say_what_is_not_a_number() -> None:
    figure = measured(0.5, float("nan"))
    assert (figure.converted, figure.ratio) == (None, None)
    assert "not a number: converted" in figure.note
    assert measured(0.0, 0.0).ratio is None
    assert measured(0.5, 0.25).ratio == 0.5


def test_words_follow_the_bounds(full: Report) -> None:
    assert [row.state for row in rows(full)] == ["kept"] * 6
    assert summary(full) == "Everything that was measured was kept."
    worse = replace(
        full,
        leakage=measured(0, 0.2),
        retention=measured(0.9, 0.83),
        psnr_same_noise_db=measured(None, 24),
    )
    states = {row.key: row.state for row in rows(worse)}
    assert (states["leakage"], states["retention"], states["psnr_same_noise_db"]) == (
        "lost",
        "partly",
        "lost",
    )
    assert "a watermark was learnt" in summary(worse)
    assert {row.state for row in rows(NOTHING)} == {"unknown"}


def test_losses_are_binned_by_level_and_stretch() -> None:
    log = [(step, [1.0, 3.0, float("nan")], [0.05, 0.95, 0.5]) for step in range(1, 11)]
    table = losses_by_level(log, levels=10, stretches=5)
    assert table is not None
    assert table.steps == (2, 4, 6, 8, 10)
    assert table.values[0] == (1.0,) * 5
    assert table.values[9] == (3.0,) * 5
    assert table.values[5] == (None,) * 5
    assert losses_by_level([]) is None


@pytest.mark.parametrize("objective", ["eps", "v", "v-zsnr", "flow", "x0"])
def test_every_objective_can_be_loaded_somewhere(objective: str) -> None:
    comfy, diffusers = how_to_load("sdxl", objective, "m.safetensors", shift=2.5, config="FOLDER")
    assert "m.safetensors" in comfy.text
    compile(diffusers.code, "code", "exec")
    assert "{" not in diffusers.code + comfy.code
