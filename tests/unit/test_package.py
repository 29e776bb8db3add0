"""The package as a whole: names, dependencies, layers, packaging."""

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_sparsity

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_sparsity"
MODULES = sorted(PACKAGE.rglob("*.py"))
METHODS = sorted((PACKAGE / "callbacks").glob("*/*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_public_names_exist_and_are_documented() -> None:
    names = lightning_sparsity.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(lightning_sparsity, name).__doc__, name


@pytest.mark.parametrize("name", lightning_sparsity.__all__)
def test_public_names_are_explained_to_users(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in pages)


def test_version_is_that_of_the_installed_package() -> None:
    assert version("lightning-sparsity") == lightning_sparsity.__version__


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_declared_packages_are_needed(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path)}
    allowed = {"torch", "torchmetrics", "lightning", "typing_extensions", "lightning_sparsity"}
    if relative(path) == "export/compact.py":
        allowed.add("safetensors")  # inside a function, with an error that names the extra
    assert roots - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_pure_modules_do_not_know_lightning(path: Path) -> None:
    knows = {
        "callbacks",
        "core",
        "lottery",
        "metrics",
        "monitors",
        "monitors.py",
        "testing.py",
    }
    if Path(relative(path)).parts[0] not in knows:
        assert not any(name.split(".")[0] == "lightning" for name in imports(path))


@pytest.mark.parametrize("path", METHODS, ids=relative)
def test_methods_do_not_import_each_other(path: Path) -> None:
    ours = {name for name in imports(path) if name.startswith("lightning_sparsity.callbacks")}
    shared = {"base", "examples", "learned_mask", "scored", "thresholds"}
    assert ours <= {f"lightning_sparsity.callbacks.{name}" for name in shared}


def test_every_declared_dependency_has_a_pin() -> None:
    # Read by pattern: Python 3.10 has no TOML reader.
    declared = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[.*?\])?[<>=]', _project(), re.MULTILINE)
    pins = re.findall(r"^([^=#\s]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert "torch" in declared
    assert {_plain(name) for name in declared} <= {_plain(name) for name in pins}


def test_the_type_marker_is_there() -> None:
    assert (PACKAGE / "py.typed").exists()


def _project() -> str:
    return (ROOT / "pyproject.toml").read_text()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
