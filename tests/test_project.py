"""Facts about the project itself."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_version_matches():
    import ivg

    assert ivg.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_typed_and_licensed():
    assert (ROOT / "src/ivg/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_core_dependencies():
    names = {d.split(">")[0] for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    assert names == {"torch", "transformers", "tokenizers", "safetensors", "pydantic", "typer", "rich", "numpy"}


@pytest.mark.parametrize(
    "module", ["ivg", "ivg.cli.app", "ivg.types", "ivg.config", "ivg.decoding.search", "ivg.decoding.strategies", "ivg.testing"]
)
def test_imports_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_short():
    long = [str(p) for p in (ROOT / "src").rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert not long


def test_public_names_exist():
    import ivg

    for name in ivg.__all__:
        assert getattr(ivg, name) is not None


def test_readme_starts_with_two_commands():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first
