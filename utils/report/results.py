"""What an evaluation writes and shows: results.json, .csv, .md and .tex, and the same tables in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from default import CALIBRATED, Config, to_dict
from utils.metrics import METRICS, NAN, ClassResult, mean_results, nanmean
from utils.metrics.bootstrap import Intervals
from utils.metrics.concepts import Agreement
from utils.metrics.decisions import Decided
from utils.metrics.published import class_rows, comparison_rows
from utils.report.tables import (
    BEST,
    COLUMNS,
    MEAN,
    TITLES,
    Table,
    csv_text,
    extra_rows,
    extra_table,
    latex_page,
    markdown_page,
    percent,
    terminal_page,
    values,
    with_interval,
    write_all,
)  # fmt: skip
from utils.run.log import plain
from utils.run.text import printable

OURS = "this run"
Best = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Of a run: each class's metrics, each metric's best mean on the test set over all evaluations with its epoch
    (None where there was one evaluation), intervals if wanted, the concepts' agreement with the classes (None without
    concepts or with one class), how the thresholds did (None without any), the configuration, and whether none of the
    images that calibrate was trained on. What is not `evaluated` had no test images. `extra`: by class, metrics of the
    data set's own."""

    classes: Mapping[str, ClassResult]
    best_on_test: Best | None
    intervals: Intervals | None
    concepts: Agreement | None = None
    decided: Decided | None = None
    evaluated: bool = True
    config: Config
    unseen: bool
    extra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> ClassResult:
        return mean_results(self.classes)


def scores_of(config: Config) -> dict[str, str]:
    """Metric -> the score map that it is made of."""
    chosen = {"image": config.eval.image_score, "pixel": config.eval.pixel_score, "aupro": config.eval.pro_score}
    return {metric: chosen[metric.split("_")[0]] for metric in METRICS}


def left_out(classes: Mapping[str, ClassResult]) -> dict[str, list[str]]:
    """Metric -> the classes that lack it and are left out of its mean."""
    lacking = {
        m: [name for name, result in classes.items() if getattr(result, m) != getattr(result, m)] for m in METRICS
    }
    return {metric: names for metric, names in lacking.items() if names}


def result_rows(results: Results) -> list[tuple[str, dict[str, float]]]:
    """Classes, their mean, and the best on the test set, if known: fractions, intervals as METRIC_low, METRIC_high."""
    rows = []
    for name, result in [*results.classes.items(), (MEAN, results.mean)]:
        row = values(result)
        for metric, (low, high) in interval_row(results, name).items():
            row |= {f"{metric}_low": low, f"{metric}_high": high}
        rows.append((name, row))
    if results.best_on_test:
        best = results.best_on_test
        rows.append((BEST, {name: best[name]["value"] if name in best else NAN for name in COLUMNS}))
    return rows


def interval_row(results: Results, name: str) -> dict[str, tuple[float, float]]:
    """The intervals of a class or of the mean, empty without --bootstrap."""
    return results.intervals.row(None if name == MEAN else name) if results.intervals else {}


def result_table(results: Results) -> Table:
    """One row a class, in per cent."""
    shown = []
    for name, row in result_rows(results):
        ranges = interval_row(results, name) if name != BEST else {}
        shown.append((name, {c: with_interval(row[c], ranges.get(c)) for c in COLUMNS}))
    return Table(rows=shown, columns=columns_of(results))


def columns_of(results: Results) -> tuple[str, ...]:
    """The metrics that some class has, all where none has any: without masks there are no pixel metrics."""
    lost = {m for m, names in left_out(results.classes).items() if len(names) == len(results.classes)}
    return tuple(c for c in COLUMNS if c not in lost and not (c == "mad" and lost)) or COLUMNS


def comparison_table(results: Results) -> Table:
    """Our means above the published ones."""
    rows = [(OURS, {c: percent(v) for c, v in values(results.mean).items()})]
    for name, figures, _ in comparison_rows(results.config.data.dataset):
        complete = dict(figures) | ({"mad": nanmean(list(figures.values()))} if len(figures) == len(METRICS) else {})
        rows.append((name, {c: percent(v) for c, v in complete.items()}))
    return Table(rows=rows, columns=columns_of(results), first="method", title="Means beside the published ones")


def class_table(results: Results) -> Table:
    """Per class beside the methods that published per class; the means are over the classes shown."""
    methods = class_rows(results.config.data.dataset, results.classes.keys())
    by_method = {OURS: {name: asdict(result) for name, result in results.classes.items()}} | methods
    columns: dict[str, tuple[str, str]] = {
        f"{TITLES[metric]} {method}": (method, metric)
        for metric in ("image_auroc", "pixel_auroc")
        for method in by_method
        if metric in columns_of(results)
    }
    rows = [
        (
            name,
            {c: percent(by_method[method].get(name, {}).get(metric, NAN)) for c, (method, metric) in columns.items()},
        )
        for name in results.classes
    ]
    mean = {
        c: percent(nanmean([f[metric] for f in by_method[method].values()])) for c, (method, metric) in columns.items()
    }
    return Table(rows=[*rows, (MEAN, mean)], columns=tuple(columns), title="Per class beside the published figures")


def tables_of(results: Results) -> list[Table]:
    """The results, and with --compare the published figures."""
    own = [extra_table(results.extra)] if results.extra else []
    compared = [comparison_table(results)] if results.config.compared else []
    if compared and class_rows(results.config.data.dataset):
        compared.append(class_table(results))
    return [result_table(results), *own, *compared]


def notes_of(results: Results) -> list[str]:
    """What a reader of the tables must know."""
    config = results.config
    made = "last epoch" if config.run.mode == "train" else f"checkpoint {config.eval.eval_ckpt}"
    if not results.evaluated:
        return [f"no test images: there was no evaluation; the model of the {made} judges images with --mode predict"]
    notes = [
        f"scores: image metrics from {config.eval.image_score}, pixel metrics from {config.eval.pixel_score}, AUPRO "
        f"from {config.eval.pro_score}; maps and masks at {sizes_of(config)}; {made}"
    ]
    if config.data.resize != "squash" or config.data.center_crop or config.data.tile:
        notes.append(shape_of(config))
    if not results.unseen and set(scores_of(config).values()) & set(CALIBRATED):
        notes.append("units from images that were trained on (no --holdout): unseen normal images look stranger")
    if results.decided:
        notes.append(str(results.decided))
    if found := results.concepts:
        notes.append(
            f"concepts: {found.used} of {config.model.k_cpc} used on the test images, purity {found.purity:.2f}, "
            f"mutual information with the classes {found.mutual_information:.2f} of {found.entropy:.2f} bits"
        )
    if config.eval.fpr_limit != 0.3:
        notes.append(f"AUPRO up to a false-positive rate of {config.eval.fpr_limit:g}")
    groups: dict[tuple[str, ...], list[str]] = {}
    for metric, names in left_out(results.classes).items():
        groups.setdefault(tuple(names), []).append(TITLES[metric])
    for lacking, titles in groups.items():
        count, total = len(results.classes) - len(lacking), len(results.classes)
        notes.append(
            f"{', '.join(titles)}: not defined for {', '.join(lacking)}; the mean is over {count} of {total} classes"
        )
    if results.intervals:
        notes.append(
            f"in brackets: 95 % intervals, {results.intervals.resamples} resamples of the test images, good and "
            "defective ones apart"
        )
    return notes + (published_notes(results) if config.compared else [])


def sizes_of(config: Config) -> str:
    """In what size maps and masks are compared."""
    if config.native:
        return "each image's own size"
    if config.data.tile:
        return f"{config.eval.eval_size} x {config.eval.eval_size}"
    padded = " less what is padded" if config.data.resize == "pad" else ""
    return f"{config.score_size} x {config.score_size}{padded}"


def shape_of(config: Config) -> str:
    """How images become squares."""
    data = config.data
    if data.tile:
        return f"tiles of {data.tile} pixels that share {data.shared}, each resized to {data.input_size}"
    how = {
        "squash": "both sides resized to", "pad": "longer side resized to, the shorter one padded to",
        "crop": "shorter side resized to, the longer one cropped to",
    }[data.resize]  # fmt: skip
    middle = f", of which the middle {data.center_crop} x {data.center_crop} counts" if data.center_crop else ""
    return f"images (--resize {data.resize}): {how} {data.input_size}{middle}"


def published_notes(results: Results) -> list[str]:
    """Setting, protocol and source of each method, and what our mean lacks."""
    dataset = results.config.data.dataset
    known = next(iter(class_rows(dataset).values()), {})
    missing = len(known.keys() - results.classes.keys())
    partial = [f"{OURS}: {len(results.classes)} of the {len(known)} classes that the published means are over"]
    return (partial if missing else []) + [f"{name}: {note}" for name, _, note in comparison_rows(dataset)]


def results_json(results: Results) -> dict[str, Any]:
    """`{"classes": {name: metrics}, "mean": metrics, "best_on_test": {metric: {value, epoch}}, "config": ...}` and
    notes; fractions, NaN as null; a metric that no class has is absent."""

    def there(result: ClassResult) -> dict[str, float]:
        return {name: value for name, value in asdict(result).items() if name in columns_of(results)}

    content: dict[str, Any] = {
        "classes": {name: there(result) for name, result in results.classes.items()},
        "mean": there(results.mean),
        "best_on_test": results.best_on_test or {},
        "config": to_dict(results.config),
        "scores": scores_of(results.config),
        "left_out": left_out(results.classes),
        "evaluated": results.evaluated,
    }
    if results.decided:
        content["decision"] = results.decided.plain()
    if results.concepts:
        content["concepts"] = asdict(results.concepts)
    if results.extra:
        content["extra"] = {"classes": results.extra, "mean": extra_rows(results.extra)[-1][1]}
    if results.intervals:
        content["intervals"] = results.intervals.plain()
    if results.config.compared:
        dataset = results.config.data.dataset
        rows = [{"name": name, "mean": figures, "note": note} for name, figures, note in comparison_rows(dataset)]
        content["published"] = {"methods": rows, "classes": class_rows(dataset)}
    return plain(content)


def write_results(folder: Path, results: Results) -> str:
    """Write the files and give the terminal's text.

    results.json and .csv are in fractions, results.md and .tex in per cent. published.csv is the comparison, a table
    of its own, as a CSV file holds one.
    """
    tables, notes = tables_of(results), notes_of(results)
    rows = result_rows(results)
    columns = list(dict.fromkeys([*COLUMNS, *(c for _, row in rows for c in row)]))
    texts = {
        "json": json.dumps(results_json(results), indent=2) + "\n", "csv": csv_text(rows, columns),
        "md": markdown_page(tables, notes), "tex": latex_page(tables, notes),
    }  # fmt: skip
    write_all(folder, "results", texts)
    if results.config.compared:
        ours = (OURS, {**asdict(results.mean), "note": notes[0]})
        theirs = [(n, {**row, "note": note}) for n, row, note in comparison_rows(results.config.data.dataset)]
        columns = [*(c for c in COLUMNS if c != "mad"), "note"]
        write_all(folder, "published", {"csv": csv_text([ours, *theirs], columns, first="method")})
    return printable(terminal_page(tables if results.evaluated else [], notes))
