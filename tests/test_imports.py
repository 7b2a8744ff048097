"""Imports go one way.

default <- utils <- datasets, models <- judging, stage, steps <- resume, supply, show <- test, trainer, export <- engine
<- detector <- train, predict, submit <- main; datasets <- inspect_data <- main; stage <- count <- plan <- main.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "default": set(),
    "utils": {"default", "utils"},
    "datasets": {"default", "utils", "datasets"},
    "models": {"default", "utils", "models"},
    "stage": {"default", "utils", "datasets", "models"},
    "steps": {"default", "utils", "datasets", "models"},
    "resume": {"default", "utils", "datasets", "models", "stage"},
    "supply": {"default", "utils", "datasets", "models", "stage"},
    "show": {"default", "utils", "datasets", "models", "stage"},
    "judging": {"default", "utils", "datasets", "models"},
    "test": {"default", "utils", "datasets", "models", "stage", "show", "judging"},
    "trainer": {"default", "utils", "datasets", "models", "stage", "steps", "resume", "supply"},
    "train": {"default", "utils", "datasets", "models", "stage", "resume", "supply", "show", "test", "trainer"},
    "export": {"default", "utils", "datasets", "models", "stage"},
    "engine": {"default", "utils", "datasets", "models", "stage", "export"},
    "prediction": {"default", "engine"},
    "detector": {"default", "utils", "datasets", "models", "stage", "engine", "prediction"},
    "predict": {"default", "utils", "datasets", "models", "stage", "detector", "prediction"},
    "inspect_data": {"default", "utils", "datasets"},
    "count": {"default", "utils", "datasets", "models", "stage"},
    "plan": {"default", "utils", "models", "count"},
    "submit": {"default", "utils", "datasets", "models", "stage", "detector"},
    "main": {
        "default",
        "utils",
        "datasets",
        "models",
        "stage",
        "show",
        "test",
        "train",
        "export",
        "predict",
        "inspect_data",
        "submit",
        "plan",
    },
}
FILES = sorted(
    p
    for name in MAY_IMPORT
    for p in ([ROOT / f"{name}.py"] if (ROOT / f"{name}.py").is_file() else (ROOT / name).rglob("*.py"))
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            assert top not in MAY_IMPORT or top in allowed, f"{path.name} line {node.lineno} imports {name}"


def test_default_imports_only_the_standard_library() -> None:
    import sys

    tree = ast.parse((ROOT / "default.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def test_models_print_nothing() -> None:
    for path in (ROOT / "models").glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path
