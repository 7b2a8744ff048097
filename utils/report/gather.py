"""Several runs in one table: any run folders (--mode table), or one per seed (--seeds)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from default import Config, UsageError, settings_of, to_dict
from utils.metrics import METRICS, NAN, nanmean
from utils.report.tables import (
    COLUMNS,
    MEAN,
    OWN_METRICS,
    Table,
    csv_text,
    latex_page,
    markdown_page,
    terminal_page,
    with_deviation,
    write_all,
)  # fmt: skip
from utils.run.folders import new_folder, run_name, write_config
from utils.run.log import plain

# Settings by which two runs do not differ; the seed is looked at apart, and `paths` was `runs` in version 1.0.
SAME = {"seed", "runs", *settings_of("free")}
SETTINGS = "settings"
Spread = tuple[float, float]  # mean, standard deviation


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder's results: fractions, NaN where a class lacks a metric; `deviation` of the means over seeds. Metrics
    of the data set's own stand beside the seven.

    `seed` is None for a summary of several seeds.
    """

    name: str
    path: Path
    seed: int | None
    config: Mapping[str, Mapping[str, Any]]
    classes: Mapping[str, Mapping[str, float]]
    mean: Mapping[str, float]
    deviation: Mapping[str, float]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by which runs differ, without the seed."""
        return {name: v for part in self.config.values() for name, v in part.items() if name not in SAME}


def fraction(value: Any) -> float:
    """A number of a results.json, null as NaN.

    Raises:
        TypeError, OverflowError: it is none.
    """
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"expected a number, but got {value!r}")
    return NAN if value is None else float(value)


def settings_in(config: Any) -> dict[str, dict[str, Any]]:
    """The settings of a results.json; those of versions that are not this one may have other names.

    Raises:
        TypeError: no groups of settings, or a seed that is none.
    """
    seed = config["run"].get("seed")
    if not all(isinstance(part, dict) for part in config.values()) or type(seed) not in (int, type(None)):
        raise TypeError("expected groups of settings and a whole number as seed")
    return config


def completed(row: Mapping[str, float | None], extra: Mapping[str, float | None]) -> dict[str, float]:
    """The seven metrics, their mean, and those of the data set's own, null as NaN."""
    seven = {m: fraction(row.get(m)) for m in METRICS}
    return {m: fraction(v) for m, v in extra.items()} | seven | {"mad": sum(seven.values()) / len(METRICS)}


def read_run(path: str | Path) -> Run:
    """What results.json in a run folder says.

    Raises:
        UsageError: there is none, or it is not one of ours.
    """
    folder = Path(path)
    file = folder / "results.json"
    if not file.is_file():
        raise UsageError(f"PATH: expected a run folder with a results.json, but got {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        extra = content.get("extra", {"classes": {}, "mean": {}})
        return Run(
            name=folder.resolve().name, path=folder, config=settings_in(content["config"]),
            mean=completed(content["mean"], extra["mean"]),
            seed=None if content["config"]["run"].get("seeds") else content["config"]["run"]["seed"],
            classes={n: completed(row, extra["classes"].get(n, {})) for n, row in content["classes"].items()},
            deviation={m: fraction(v) for m, v in content.get("deviation", {}).get("mean", {}).items()},
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"PATH: {file} cannot be read as results of a run") from error


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1) of the values that are not NaN; no deviation of one value."""
    there = [v for v in values if v == v]
    return nanmean(there), statistics.stdev(there) if len(there) > 1 else NAN


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Of each metric over the rows."""
    return {c: spread([row.get(c, NAN) for row in rows]) for c in dict.fromkeys(c for row in rows for c in row)}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a table, `settings` a text that tells it from the others."""

    name: str
    row: Mapping[str, Spread]
    settings: str = ""

    def parts(self) -> dict[str, dict[str, float]]:
        """For JSON: the seven means and their deviations."""
        return {k: {m: self.row[m][i] for m in METRICS} for i, k in enumerate(("mean", "deviation"))}

    @property
    def extra(self) -> dict[str, float]:
        """The means of what stands beside the seven."""
        return {name: mean for name, (mean, _) in self.row.items() if name not in COLUMNS}

    def texts(self) -> dict[str, str]:
        """In per cent."""
        return {c: with_deviation(*value) for c, value in self.row.items()} | {SETTINGS: self.settings}

    def numbers(self) -> dict[str, Any]:
        """For CSV: METRIC and METRIC_sd, fractions."""
        pairs = ((c, pair) for c, pair in self.row.items())
        return {k: v for c, pair in pairs for k, v in zip((c, f"{c}_sd"), pair, strict=True)} | {
            SETTINGS: self.settings
        }


def write_entries(
    folder: Path, stem: str, content: Mapping[str, Any], entries: Sequence[Entry], *, notes: Sequence[str], first: str
) -> str:
    """The four formats, `content` as JSON; the terminal's text."""
    last = [SETTINGS] if any(entry.settings for entry in entries) else []
    extra = list(dict.fromkeys(c for entry in entries for c in entry.extra))
    rows = [(e.name, e.texts()) for e in entries]
    tables = [Table(rows=rows, columns=(*COLUMNS, *last), first=first)]
    if extra:
        tables.append(Table(rows=rows, columns=extra, first=first, title=OWN_METRICS))
    columns = [name for c in (*COLUMNS, *extra) for name in (c, f"{c}_sd")]
    texts = {
        "json": json.dumps(plain(dict(content)), indent=2) + "\n",
        "csv": csv_text([(e.name, e.numbers()) for e in entries], [*columns, *last], first=first),
        "md": markdown_page(tables, notes), "tex": latex_page(tables, notes),
    }  # fmt: skip
    write_all(folder, stem, texts)
    return "\n".join([terminal_page(tables, notes), f"written to: {folder}"])


def summarize_seeds(config: Config, folders: Sequence[Path]) -> str:
    """Mean and standard deviation over the seeds' runs, written into a folder of their own; the terminal's text.

    Args:
        config: with `seeds`.
        folders: their run folders, in the same order.
    """
    runs = [read_run(folder) for folder in folders]
    entries = [Entry(name=name, row=spreads([run.classes[name] for run in runs])) for name in runs[0].classes]
    mean = Entry(name=MEAN, row=spreads([run.mean for run in runs]))
    seeds = ", ".join(map(str, config.run.seeds))
    folder = new_folder(config.run.work_dir, run_name(config))
    write_config(folder, config)
    per_class = {entry.name: entry.parts() for entry in entries}
    content = {
        "classes": {name: parts["mean"] for name, parts in per_class.items()}, "mean": mean.parts()["mean"],
        "deviation": {
            "classes": {name: parts["deviation"] for name, parts in per_class.items()},
            "mean": {c: deviation for c, (_, deviation) in mean.row.items()},
        },
        "best_on_test": {}, "config": to_dict(config), "seeds": config.run.seeds, "runs": [str(f) for f in folders],
    }  # fmt: skip
    if mean.extra:
        content["extra"] = {"classes": {entry.name: entry.extra for entry in entries}, "mean": mean.extra}
    notes = [f"mean ± standard deviation (n - 1) over the seeds {seeds}; last epoch"]
    if any(value != value for entry in entries for value, _ in entry.row.values()):
        notes.append("-: not defined for the class, left out of the mean")
    return write_entries(folder, "results", content, [*entries, mean], notes=notes, first="class")


def gather_runs(config: Config) -> str:
    """One row a run and one for runs that differ in their seed alone, written to WORK_DIR/table; the terminal's text.

    Raises:
        UsageError: a folder without results.
    """
    runs = [read_run(path) for path in config.run.paths]
    told = differing([run.settings for run in runs])
    names = [run.name for run in runs]
    entries = [
        Entry(
            name=run.name if names.count(run.name) == 1 else str(run.path), settings=settings_text(run.settings, told),
            row={c: (mean, run.deviation.get(c, NAN)) for c, mean in run.mean.items()},
        )
        for run in runs
    ]  # fmt: skip
    groups = by_settings(runs)
    summaries = [
        Entry(
            name=group_name(group),
            settings=settings_text(group[0].settings, told),
            row=spreads([r.mean for r in group]),
        )
        for group in groups
    ]
    content = {
        "runs": [
            {"name": e.name, "path": str(run.path), "settings": run.settings, **e.parts()}
            for e, run in zip(entries, runs, strict=True)
        ],
        "seeds": [
            {
                "name": e.name,
                "runs": [str(run.path) for run in group],
                "seeds": [run.seed for run in group],
                **e.parts(),
            }
            for e, group in zip(summaries, groups, strict=True)
        ],
    }
    notes = ["means over classes" + ("; ± standard deviation (n - 1) over seeds" if groups else "")]
    folder = new_folder(config.run.work_dir, "table")
    return write_entries(folder, "table", content, [*entries, *summaries], notes=notes, first="run")


def by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of at least two runs that differ in their seed alone; of two runs with one seed the later one counts."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.seed is not None:
            key = json.dumps([run.settings, sorted(run.classes)], sort_keys=True)
            groups.setdefault(key, {})[run.seed] = run
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def group_name(group: Sequence[Run]) -> str:
    """The runs' common name and their seeds."""
    common = group[0].name.rpartition("-seed")[0]
    return f"mean of {common or 'runs'}, seeds {', '.join(str(run.seed) for run in group)}"


def differing(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for settings in every for name in settings)
    return [n for n in names if any(s.get(n) != every[0].get(n) for s in every)]


def settings_text(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """name=value, name=value."""
    return ", ".join(f"{name}={shown(settings.get(name))}" for name in names)


def shown(value: Any) -> str:
    """A value of JSON in words."""
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
