"""The report of a run: one page that needs nothing else, and the same figures as JSON.

`report.html` has its style, pictures and charts inside, runs no script and asks the network for
nothing; a Content-Security-Policy holds it to that. Whatever comes from captions, file names and
metadata is text, never markup.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recast.commit import commit
from recast.errors import Refused
from recast.evaluate.charts import course_chart, drift_chart, loss_chart, null_chart
from recast.evaluate.pictures import embedded, sheet, size_of
from recast.evaluate.values import NULL, Report, picture_names
from recast.evaluate.words import rows, summary
from recast.events import amount

__all__ = ["HTML", "JSON", "Report", "load_report", "render", "write_report"]

HTML, JSON, SHEET = "report.html", "report.json", "pictures.png"
COLUMNS = 8  # pictures side by side
PIXELATED = 160  # pictures up to this many pixels wide are enlarged without smoothing


def write_report(folder: Path, report: Report) -> dict[str, Path]:
    """Write page, JSON and pictures into `folder`, replacing an earlier report; JSON comes last."""
    folder = Path(folder)
    if report.shots or report.null_shots:
        (folder / "pictures").mkdir(exist_ok=True)
    if report.shots:
        _commit(folder / SHEET, sheet(report.shots[:COLUMNS], _labels(report)))
    for group, start in ((report.shots, ""), (report.null_shots, NULL)):
        for k, shot in enumerate(group):
            for kind, name in picture_names(k, shot, start).items():
                _commit(folder / name, getattr(shot, kind))
    _commit(folder / HTML, render(report).encode())
    text = json.dumps(report.as_json(), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    _commit(folder / JSON, text.encode() + b"\n")
    return {"html": folder / HTML, "json": folder / JSON}


def load_report(folder: Path) -> Report:
    """Read back what `write_report` wrote; a picture that is gone leaves its prompt out.

    Raises Refused where `folder` holds no report or a broken one.
    """
    from pydantic import TypeAdapter, ValidationError

    path = Path(folder) / JSON
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for group in ("shots", "null_shots"):
            entries = dict(values).get(group, [])
            values[group] = [shot for entry in entries if (shot := _shot(Path(folder), entry))]
        return TypeAdapter(Report).validate_python(values)
    except OSError as error:
        raise Refused(f"{folder} holds no {JSON}: run `recast convert` to its end first") from error
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(
            f"{path} is no report of Recast ({reason}): run the same command again"
        ) from error


def render(report: Report) -> str:
    """The page as one string."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("recast.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "uri": embedded,
        "bytes": amount,
        "duration": _duration,
        "shown": _shown,
    }
    shots = report.shots
    width, height = size_of(shots[0].original) if shots else (1, 1)
    return environment.get_template("report.html.j2").render(
        report=report,
        rows=rows(report),
        summary=summary(report),
        labels=_labels(report),
        strips=[shots[k : k + COLUMNS] for k in range(0, len(shots), COLUMNS)],
        ratio=f"{width} / {height}",
        pixelated=width <= PIXELATED,
        drift_chart=Markup(drift_chart(report.drift)),
        loss_chart=Markup(loss_chart(report.losses)),
        course_chart=Markup(course_chart(report.course)),
        null_chart=Markup(null_chart(report.null)),
    )


def _labels(report: Report) -> tuple[str, ...]:
    names = ("original", f"converted, {report.target} sampler")
    wrong = any(shot.wrong is not None for shot in report.shots)
    return (*names, f"converted, {report.source} sampler") if wrong else names


def _commit(path: Path, data: bytes) -> None:
    """Write unless the file is that already."""
    if (
        path.is_file()
        and hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    ):
        return
    commit(path, lambda file: file.write(data), size=len(data), force=True)


def _shot(folder: Path, entry: dict[str, Any]) -> dict[str, Any] | None:
    """A shot's values with its pictures read; names may not lead out of the folder."""
    values = dict(entry)
    for kind in ("original", "converted", "wrong"):
        name = entry.get(kind)
        if name is None:
            continue
        path = folder / "pictures" / Path(str(name)).name
        if not path.is_file():
            return None
        values[kind] = path.read_bytes()
    return values if {"original", "converted"} <= values.keys() else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _shown(value: Any) -> str:
    """A setting as text: numbers short, empty strings visible."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return str(value) if value not in ("", None) else "–"
