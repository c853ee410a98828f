"""The scripts in examples/ run as they stand, from any folder, and do what they say."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ivg.search.request import Request, Search
from ivg.search.searcher import Searcher
from ivg.testing import FakeEngine
from ivg.types import Prompt, SamplingParams
from ivg.values.base import FunctionValue

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_guide_your_model(run):
    out = run("guide_your_model.py")
    assert all(f"\n{method}: " in out for method in ("base", "eft", "cbs-explicit", "ivg"))
    assert len(re.findall(r"^(?:length|stop) ", out, re.MULTILINE)) == 2


def test_own_reward_function(run):
    out = run("own_reward_function.py")
    praise, variety, both = (
        [float(n) for n in re.search(rf"selected by {name}: praise (\S+), variety (\S+)\n", out).groups()]
        for name in ("explicit", "variety", "praise and variety")
    )
    assert praise[0] > both[0] > variety[0]
    assert praise[1] < both[1] < variety[1]


def test_own_reward_function_from_the_command_line(monkeypatch, ivg):
    """The line in its docstring."""
    (line,) = re.findall(r"`(ivg generate .*?)`", (EXAMPLES / "own_reward_function.py").read_text())
    monkeypatch.chdir(EXAMPLES.parent)
    code, out, _ = ivg(*line.split()[1:], "The movie was", "--seed", "1", "--max-new-tokens", "10")
    assert not code
    assert out.strip()


def test_own_selection_rule(run):
    plain, distinct = run("own_selection_rule.py").split("distinct endings:")
    assert number(r"score (\S+)", plain) > 0
    endings = re.findall(r"(\S+)'$", distinct, re.MULTILINE)
    assert len(endings) == len(set(endings)) > 1


def test_own_selection_rule_keeps_no_duplicates():
    """With the fake engine, whose answers are the same on every processor."""
    rule = runpy.run_path(str(EXAMPLES / "own_selection_rule.py"))["DistinctEndings"]

    def duplicates(make_rule):
        engine = FakeEngine("ab ")
        value = FunctionValue(lambda prompt, response: response.count(" "))
        search = Search(value=value, width=3, successors=4, chunk_length=3, make_rule=make_rule)
        request = Request(Prompt("p"), search, SamplingParams(max_new_tokens=12, ignore_eos=True), seed=1, trace=True)
        ((_, completion),) = Searcher(engine).run([request])
        endings = [[tuple(node.text.split()[-1:]) for node in board.kept] for board in completion.trace]
        return sum(len(kept) - len(set(kept)) for kept in endings)

    assert duplicates(None) > 0
    assert duplicates(rule) == 0


@pytest.mark.long
def test_train_a_value(run):
    out = run("train_a_value.py")
    assert number(r"cbs-explicit: (\S+) letters", out) > number(r"base: (\S+) letters", out)


@pytest.mark.long
def test_compare_methods(run, tmp_path):
    out = run("compare_methods.py")
    reward = {name: float(value) for name, value in re.findall(r"^(\S+) +reward (\S+)", out, re.MULTILINE)}
    assert reward["base"] < reward["eft"] < reward["ivg"]
    assert b"<svg" in (tmp_path / "compare.svg").read_bytes()


@pytest.mark.long
def test_serve_and_call(tmp_path):
    ended = subprocess.run([sys.executable, EXAMPLES / "serve_and_call.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert not ended.returncode, ended.stderr
    assert re.search(r"^base: .+\nivg: .+\n", ended.stdout, re.MULTILINE)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short_and_tested(example):
    assert len(example.read_text().splitlines()) < 60
    assert any(f"def test_{example.stem}(" in file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
