"""report.html: one file with everything to look at after an evaluation. Knows neither models nor data sets."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from default import ABSOLUTE, CALIBRATED, Config, to_dict
from utils.metrics import METRICS, NAN, ClassAccumulator, ClassResult, mean_results
from utils.metrics.decisions import Decided
from utils.report import gallery
from utils.report.charts import SERIES, histogram, line_chart, series_dash, thinned
from utils.report.gallery import Picture, Show, f1_threshold, take_pictures
from utils.report.images import Curves, ImageResult, NormalRange, pick
from utils.report.plots import HOT, ramp
from utils.report.tables import COLUMNS, MEAN, TITLES, extra_rows, percent, values
from utils.report.training import CODEBOOKS, Training, codebook_panels, codebook_rows, number, training_panels
from utils.run.log import read_lines
from utils.run.text import printable
from utils.run.writer import write_whole

PAGE = Path(__file__).parent / "templates"
MOST_CONCEPTS = 64  # columns of the concept matrix

Published = Sequence[tuple[str, Mapping[str, float], str]]  # method, metric -> fraction, note


@dataclass(frozen=True, kw_only=True)
class ClassPage:
    """What the report says of one class: its metrics, `extra` ones of the data set's own, test images and curves, what
    is normal in it, and pictures by `gallery.KINDS`."""

    result: ClassResult
    extra: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[ImageResult]
    curves: Curves
    normal: NormalRange
    pictures: Mapping[str, Sequence[Picture]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run.

    Attributes:
        name: of the run.
        classes: by name, in the tables' order.
        training: entries of metrics.jsonl by model, empty where there was no training: one model, or one per class.
        config: nested plain values.
        shown: the score map that the pictures show.
        unseen: no image that says what is normal was trained on.
        decided: how the checkpoint's thresholds did; None where it has none, and normal images give them.
        published: numbers of others on the same data set.
        shared_model: one model for all classes, so that their concepts are the same.
    """

    name: str
    classes: Mapping[str, ClassPage]
    training: Training
    config: Mapping[str, Mapping[str, Any]]
    shown: str
    unseen: bool
    decided: Decided | None = None
    published: Published = ()
    shared_model: bool


def curves_of(accumulator: ClassAccumulator) -> Curves:
    return Curves(roc=thinned(accumulator.roc_curve()), pro=thinned(accumulator.pro_curve(), accumulator.fpr_limit))


def class_page(
    *, result: ClassResult, extra: Mapping[str, float], curves: Curves, images: Mapping[int, ImageResult],
    normal: NormalRange, show: Show, share: int,
) -> ClassPage:  # fmt: skip
    """Choose a class's pictures and take them.

    Args:
        images: its test images by their numbers in the data set, which `show` shows.
        share: classes in the whole report, which share the bytes of its pictures.
    """
    numbers = list(images)
    places = pick([*images.values()])
    chosen = {kind: {numbers[i]: images[numbers[i]] for i in found} for kind, found in places.items()}
    pictures = {kind: take_pictures(show, found, normal, share) for kind, found in chosen.items()}
    return ClassPage(
        result=result, extra=extra, images=tuple(images.values()), curves=curves, normal=normal, pictures=pictures
    )


def report_run(
    folder: Path,
    pages: Mapping[str, ClassPage],
    config: Config,
    *,
    unseen: bool,
    decided: Decided | None = None,
    published: Published = (),
) -> Path:
    """Write report.html into a run folder, with the training that metrics.jsonl tells of; its path."""
    shared_model = config.data.multi_class
    places = {"all classes": folder} if shared_model else {name: folder / name for name in pages}
    training = {name: lines for name, place in places.items() if (lines := read_lines(place / "metrics.jsonl"))}
    path = folder / "report.html"
    report = Report(
        name=folder.name, classes=pages, training=training, config=to_dict(config), published=published,
        shared_model=shared_model, shown=config.eval.shown_score, unseen=unseen,
        decided=decided,
    )  # fmt: skip
    write_report(path, report)
    return path


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file that refers to no other file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE, encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": number, "jpeg": data_uri, "base64": base64_text}
    page = environment.get_template("report.html").render(content(report))
    write_whole(path, printable(page).encode())


def content(report: Report) -> dict[str, Any]:
    """All that the template shows."""
    results = {name: page.result for name, page in report.classes.items()}
    mean = values(mean_results(results))
    columns = [c for c in COLUMNS if mean[c] == mean[c]]
    with_curves = [n for n, page in report.classes.items() if len(page.curves.roc.x) + len(page.curves.pro.x)]
    images = [image for page in report.classes.values() for image in page.images]
    *_, (_, extra) = extra_rows({name: page.extra for name, page in report.classes.items()})
    return {
        "report": report, "columns": columns, "titles": TITLES, "mean": {**extra, **mean}, "mean_name": MEAN,
        "extra": [*extra], "nan": NAN,
        "headline": [(TITLES[c], mean[c], reference(report.published, c)) for c in columns],
        "rows": class_rows(report.classes), "missing": missing(results), "all": counts(images),
        "series": legend(report.classes, with_curves),
        "curves": curve_charts(report), "histograms": histograms(report.classes),
        "models": legend(report.training, report.training),
        "panels": training_panels(report.training), "books": codebook_rows(report.training),
        "codebook_panels": codebook_panels(report.training), "titles_of_books": CODEBOOKS,
        "concepts": concept_matrix(report.classes), "kinds": gallery.KINDS, "scale": heat_scale(),
        "scores": report.config["eval"], "absolute": ABSOLUTE,
        "calibrated": CALIBRATED,
        "quantile": gallery.QUANTILE, "looked_at": max(p.normal.count for p in report.classes.values()),
    }  # fmt: skip


def heat_scale() -> dict[str, Any]:
    """The colours of the heat maps and what they mean."""
    return {
        "hot": HOT, "middle": (1 + HOT) / 2, "step": gallery.STEP, "quantile": gallery.PIXEL_QUANTILE,
        "stops": ramp()[::51].tolist(),
    }  # fmt: skip


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64_text(data)


def legend(order: Iterable[str], shown: Iterable[str]) -> list[tuple[int, str, int, int]]:
    """Number, name, colour and dash of the lines that are shown."""
    return [(i, name, i % SERIES, series_dash(i)) for i, name in enumerate(order) if name in shown]


def reference(published: Published, metric: str) -> tuple[str, float] | None:
    """The first of the published rows that has this metric: method and value."""
    return next(((name, row[metric]) for name, row, _ in published if row.get(metric) is not None), None)


def counts(images: Sequence[ImageResult]) -> dict[str, int]:
    """Good images and those of them with an alarm; defective ones, those found; of these the ones that have masks, and
    those whose peak lies in the mask."""
    good, bad = ([i for i in images if bool(i.label) == label] for label in (False, True))
    found = [i for i in bad if i.defective]
    return {
        "good": len(good), "alarms": sum(bool(i.defective) for i in good), "defective": len(bad), "found": len(found),
        "placed": sum(i.hit is not None for i in found), "hits": sum(i.hit is True for i in found),
    }  # fmt: skip


def class_rows(classes: Mapping[str, ClassPage]) -> list[dict[str, Any]]:
    """Rows of the per-class table; `lowest` names the metrics in which no class is lower, but another is higher."""
    table = {name: {**page.extra, **values(page.result)} for name, page in classes.items()}
    columns = dict.fromkeys(c for row in table.values() for c in row)
    known = {c: [row[c] for row in table.values() if row.get(c, NAN) == row.get(c, NAN)] for c in columns}
    low = {c: min(found) for c, found in known.items() if found and min(found) < max(found)}
    return [
        {
            "name": name, "counts": counts(page.images), "values": table[name],
            "lowest": {c for c, value in low.items() if table[name].get(c) == value},
        }
        for name, page in classes.items()
    ]  # fmt: skip


def missing(results: Mapping[str, ClassResult]) -> list[tuple[str, str, int]]:
    """Metrics that some classes do not have, but others do: their names, and how many classes are left for the mean."""
    gaps = [(TITLES[m], [n for n, r in results.items() if getattr(r, m) != getattr(r, m)]) for m in METRICS]
    return [
        (title, ", ".join(names), len(results) - len(names)) for title, names in gaps if 0 < len(names) < len(results)
    ]


def curve_charts(report: Report) -> dict[str, Markup]:
    """ROC and PRO curves of all classes."""
    order, limit = list(report.classes), report.config["eval"]["fpr_limit"]
    curves = {name: page.curves for name, page in report.classes.items()}
    roc = {n: (c.roc.x, c.roc.y) for n, c in curves.items() if len(c.roc.x)}
    pro = {n: (c.pro.x, c.pro.y) for n, c in curves.items() if len(c.pro.x)}
    found = ("false-positive rate of images", "true-positive rate of images")
    regions = ("false-positive rate of pixels", "mean share of a region found")
    charts = {"roc": line_chart(roc, order=order, labels=found, limits=(1, 1)) if roc else ""}
    charts["pro"] = line_chart(pro, order=order, labels=regions, limits=(limit, 1)) if pro else ""
    return {name: Markup(chart) for name, chart in charts.items()}


def histograms(classes: Mapping[str, ClassPage]) -> list[dict[str, Any]]:
    """Image scores of each class with two thresholds, and how the label-free one does."""
    made = []
    for name, page in classes.items():
        good, bad = ([i.score for i in page.images if bool(i.label) == label] for label in (False, True))
        cuts, best = sorted({i.threshold for i in page.images if i.threshold is not None}), f1_threshold(good, bad)
        chart = Markup(histogram(good, bad, [*((cut, "-") for cut in cuts), (best, ":")]))
        made.append(
            {"name": name, "chart": chart, "cuts": cuts[:1] + cuts[1:][-1:], "best": best} | counts(page.images)
        )
    return made


def concept_matrix(classes: Mapping[str, ClassPage]) -> dict[str, Any] | None:
    """How many test images of each class chose which concept; the most used concepts, None without codebooks."""
    used = {n: Counter(i.concept for i in p.images if i.concept is not None) for n, p in classes.items()}
    if not any(used.values()):
        return None
    total = sum(used.values(), Counter())
    shown = sorted(concept for concept, _ in total.most_common(MOST_CONCEPTS))
    rows = [(name, [(c[k], c[k] / max(c.total(), 1)) for k in shown]) for name, c in used.items()]
    return {"columns": shown, "rows": rows, "left_out": len(total) - len(shown)}
