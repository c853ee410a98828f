"""Facts about the project itself."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_version_matches():
    import ivg

    assert ivg.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_typed_and_licensed():
    assert (ROOT / "src/ivg/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def imported(folder):
    """Top-level names of the packages that any file imports, anywhere in it."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core, *extras = (
        {re.split(r"[^\w.-]", d)[0].lower().replace("-", "_") for d in listed}
        for listed in (project["dependencies"], *project["optional-dependencies"].values())
    )
    declared = {"sklearn" if d == "scikit_learn" else d for part in (core, *extras) for d in part}
    found = set(imported(ROOT / "src" / "ivg")) - set(sys.stdlib_module_names) - {"ivg"}
    through = {
        "starlette": "fastapi",
        "h11": "uvicorn",
        "huggingface_hub": "transformers",
        "pydantic_core": "pydantic",
        "typing_extensions": "pydantic",
        "pandas": "alpaca_eval",
        "tqdm": "lm_eval",
        "PIL": "pillow",
    }
    assert {through.get(name, name) for name in found} <= declared
    assert core <= found


@pytest.mark.parametrize(
    "module", ["ivg", "ivg.cli.app", "ivg.types", "ivg.settings.recipe", "ivg.search.searcher", "ivg.search.methods", "ivg.testing"]
)
def test_imports_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_short():
    long = [str(p) for p in (ROOT / "src").rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert not long


def test_the_wheel_holds_the_package_alone():
    """Every file of the wheel is a file of src/ivg with the same path; no recipe, benchmark or test."""
    from hatchling.builders.wheel import WheelBuilder

    files = {Path(f.distribution_path) for f in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert Path("ivg/model.py") in files
    assert all((ROOT / "src" / file).is_file() for file in files)
    assert {f.suffix for f in files} <= {".py", ".typed", ".html", ".jinja", ".css", ".js", ".json", ".md", ".safetensors"}
    assert not {"demo", "recipes", "benchmarks", "tests"} & {part for f in files for part in f.parts}
    assert not [f for f in files if re.match("naive|test_", f.name)]


def test_public_names_exist():
    import ivg

    for name in ivg.__all__:
        assert getattr(ivg, name) is not None


def test_readme_starts_with_two_commands():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first


def test_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dated = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert dated.groups() == (version, citation["date-released"])
    assert citation["version"] == version


def test_workflow_tests_every_python_that_is_declared():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = {c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)}
    assert declared == set(re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/test.yml").read_text()))


def renamed():
    table = (ROOT / "CHANGELOG.md").read_text().partition("### Renamed")[2].partition("| command line")[0]
    for old, new in re.findall(r"^\|(?: `ivg\.`)? \| (`.+?) \| (`.+?) \|$", table, re.MULTILINE):
        yield from zip(re.findall(r"`(\w+)", old), re.findall(r"`(\w+)", new), strict=True)


@pytest.mark.parametrize(("old", "new"), renamed())
def test_names_that_the_changelog_renames_work_with_a_warning(old, new):
    import ivg

    with pytest.warns(DeprecationWarning, match=f"ivg.{old} is now ivg.{new}"):
        assert getattr(ivg, old) is getattr(ivg, new)
