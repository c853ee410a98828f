"""``scripts/gpu.sh``: its stages run on the CPU, one that fails or hangs takes nothing from the others, and the report says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def stage(name, code, limit=60, read=lambda _, output: {"said": output.strip()}):
    return gpu.Stage(name, ("timeit", "-n", "1", "-r", "1", code), limit, read, {})


def test_a_stage_that_fails_or_hangs_is_recorded(tmp_path):
    good = gpu.run(stage("good", "print('x')", read=lambda _, output: {"said": output[0]}), tmp_path, rehearse=False)
    assert (good["status"], good["found"]) == (0, {"said": "x"})
    assert gpu.run(stage("bad", "1 / 0"), tmp_path, rehearse=False)["status"] == 1
    hangs = gpu.run(stage("hangs", "import threading; threading.Event().wait()", limit=1), tmp_path, rehearse=False)
    assert hangs["status"] == "timed out"
    assert "ZeroDivisionError" in (tmp_path / "bad.log").read_text()


def test_the_limits_fit_the_time(tmp_path):
    assert sum(s.limit for s in gpu.stages(tmp_path, "cuda", rehearse=False)) <= 450  # of 480 seconds
    assert all((ROOT / path).exists() for path in gpu.EXACTNESS)


def test_the_report_names_tests_that_failed(tmp_path):
    (tmp_path / "exactness.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><failure/></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    (exactness, *_) = gpu.stages(tmp_path, "cuda", rehearse=False)
    found = exactness.read(tmp_path, "")
    assert found == {"passed": 1, "skipped": 1, "failed": ["a::c"]}
    rows = [{"stage": "exactness", "seconds": 3.0, "status": 1, "found": found}, {"stage": "cost", "seconds": 1.0, "status": "timed out"}]
    text = gpu.report({"stages": rows, "machine": {"torch": "2"}, "device": "H", "commit": "c", "command": "scripts/gpu.sh OUT"})
    assert "1 passed, 1 failed, 1 skipped" in text and "failed: `a::c`" in text and "timed out" in text


@pytest.mark.long
def test_a_rehearsal_in_a_python_without_ivg(tmp_path):
    """The stages that need neither the tests nor a compiler; the version of ivg is that of pyproject.toml."""
    command = [ROOT / "scripts" / "gpu.sh", tmp_path / "out", "--rehearse", "--only", "cost", "speculation"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["stage"], row["status"]) for row in found["stages"]] == [("cost", 0), ("speculation", 0)]
    assert found["stages"][0]["found"]["systems"]["ivg"]["over_roofline"] > 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| transformers |" in report and "agreeing, W·K 16" in report
