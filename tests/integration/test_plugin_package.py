"""docs/how-to/plugins.md: the package that it shows is written, installed and used by the commands that it shows."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/how-to/plugins.md").read_text()
COMMANDS = re.findall(r"```text\n(ivg .*)\n```", PAGE)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the page's files, and what pip leaves of the page's pyproject.toml."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (table,) = re.findall(r"```toml\n(# pyproject.toml .*?)```", PAGE, re.DOTALL)
    groups = tomllib.loads(table)["project"]["entry-points"]
    info = folder / "my_ivg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-ivg\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in named.items()) for group, named in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(package, command):
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-W", "error::UserWarning:ivg", "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=package, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "left out" not in done.stderr
    return done.stdout


def test_all_are_listed(package):
    found = json.loads(run(package, "ivg models --json"))
    assert [(p["name"], p["group"]) for p in found["plugins"]] == [
        ("cautious", "ivg.methods"),
        ("keywords", "ivg.values"),
        ("verses", "ivg.tasks"),
    ]


def test_the_page_shows_a_command_for_each():
    assert [line.split()[1] for line in COMMANDS] == ["generate", "generate", "eval"]


@pytest.fixture(scope="module")
def generated(package):
    """What the first command prints."""
    return run(package, COMMANDS[0])


def test_the_method_generates(generated):
    assert generated.startswith("The movie was")


def test_the_value_chooses(package, generated):
    plain, topic = (sum(text.count(word) for word in ("music", "actors")) for text in (generated, run(package, COMMANDS[1])))
    assert plain < topic


@pytest.mark.long
def test_the_task_is_evaluated(package):
    run(package, COMMANDS[2])
    rows = json.loads((package / "verses/results.json").read_text())["methods"]
    assert {"base", "cautious"} <= set(rows)
    assert all(row["task"]["words"] > 0 for row in rows.values())


@pytest.mark.parametrize("code", re.findall(r'```python title="[^"]+"\n(.*?)```', PAGE, re.DOTALL), ids=["method", "value", "task"])
def test_each_is_short(code):
    assert len([line for line in code.splitlines() if line]) <= 22
