"""``--json``, ``--quiet`` and pipes of ``ivg check``, ``ivg winrate`` and ``ivg eval``: the result alone is on standard output."""

import io
import json
import sys

import pytest
from test_eval import hub  # noqa: F401  (a fixture)

from ivg.evaluation.winrate import read_judgements, win_rate

WON = [
    {"instruction": f"Say {i}.", "output_1": "no", "output_2": "yes" * i, "preference": 1.0 + (i % 3 > 0), "generator_2": "mine"}
    for i in range(12)
]
JUDGED = "".join(json.dumps(row) + "\n" for row in WON)
TEXTS = [(f"Film {i}", " was good.", " was bad, and long.") for i in range(24)]
PAIRS = "".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in TEXTS)
OPTIONS = ["--sweep", 0, "--judge", "none", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def pipe(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_winrate(ivg, pipe, tmp_path, monkeypatch):
    (tmp_path / "judged.jsonl").write_text(JUDGED)
    rate = win_rate(read_judgements(tmp_path / "judged.jsonl")).win_rate
    pipe(JUDGED)
    code, out, err = ivg("winrate", "-", "--plain", "--json", "--output", tmp_path / "out.json")
    (found,) = json.loads(out)
    assert (code, err, found["model"], found["file"]) == (0, "", "mine", "-") and found["win_rate"] == pytest.approx(rate)
    assert json.loads((tmp_path / "out.json").read_text()) == [found]
    glm_winrate = pytest.importorskip("alpaca_eval.metrics.glm_winrate", reason="needs the extra alpaca")
    monkeypatch.setattr(glm_winrate, "hf_hub_download", _away)
    code, out, err = ivg("winrate", tmp_path / "judged.jsonl")
    assert f"{rate:.2f}" in out and "no length-controlled" not in out and err.startswith("no length-controlled win rate: ")
    code, out, err = ivg("winrate", tmp_path / "judged.jsonl", "--json", "--quiet")
    assert json.loads(out)[0]["length_controlled_winrate"] is None and err == ""
    code, out, err = ivg("winrate", "-", "-")
    assert code == 2 and "got - twice" in err and out == ""


def _away(**_):
    raise OSError("no network")


def test_check_of_models(ivg, pipe):
    pipe("A film like this\n")
    code, out, err = ivg("check", "-", "--json", "--quiet", "--beta", 2, "--dtype", "float32", "--device", "cpu")
    found = json.loads(out)
    assert (code, err, found["fits"], found["divergence"]["beta"]) == (0, "", True, 2) and found["divergence"]["tokens"] > 0
    assert [m["name"] for m in found["models"]][:1] == ["base"] and {"eft", "ivg"} <= set(found["methods"])
    assert all(m["same_vocabulary"] or m["examples"] for m in found["models"][1:])
    code, text, _ = ivg("check", "A film like this", "--beta", 2, "--dtype", "float32", "--device", "cpu")
    assert f"KL(tuned‖untuned) {found['divergence']['tuned_untuned']:.3f}" in text and found["divergence"]["summary"] in text


def test_check_of_preferences(ivg, pipe, tmp_path):
    pipe(PAIRS)
    code, out, err = ivg("check", "--preferences", "-", *OPTIONS, "--json", "--quiet", "--output", tmp_path / "out.json")
    found = json.loads(out)
    assert found == json.loads((tmp_path / "out.json").read_text()) and found["pairs"] == len(TEXTS) and err == ""
    pipe(PAIRS + "broken\n")
    again, out, err = ivg("check", "--preferences", "-", *OPTIONS, "--quiet")
    first, *reasons = out.splitlines()
    assert (again, first, err) == (code, f"verdict: {found['verdict']['outcome']}", "")
    assert [line.strip() for line in reasons] == found["verdict"]["reasons"]


def test_eval(ivg, pipe, hub, tmp_path):  # noqa: F811
    models = [f"--{role}={hub / role}" for role in ("base", "tuned", "untuned")]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[eval]\ntask = "sentiment"\nmethods = ["base"]\nseeds = 1\nbase_samples = 0\nthreads = 1\ngold = "{hub / "gold"}"\n'
        '[search]\nwidth = 2\n[sampling]\nmax_new_tokens = 3\n[run]\nbatch_size = 2\ndtype = "float32"\ndevice = "cpu"\n'
    )
    run = ["eval", "sentiment", "--recipe", recipe, *models, "--data", "-", "--methods", "base,eft", "--out", tmp_path / "out"]
    prompts = '{"prompt": "The movie was"}\n{"prompt": "I have"}\n'
    pipe(prompts)
    code, out, err = ivg(*run, "--json", "--quiet")
    assert (code, err) == (0, ""), err
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(out) == saved and set(saved["methods"]) == {"base", "eft"}
    pipe(prompts)
    code, out, err = ivg(*run)
    assert "| method |" in out and "report.html" not in out and "report.html" in err and "of the recipe's [search] ignored" in err
    code, out, err = ivg(*run, "--json", "--stage", "generate")
    assert code == 2 and "--json prints results.json, which the stage report makes" in err and out == ""


@pytest.mark.parametrize("verb", ["check", "winrate", "eval", "compare", "chat"])
def test_the_options_are_the_same_everywhere(ivg, verb):
    out = " ".join(ivg(verb, "--help")[1].split())
    assert "Print the result as JSON." in out and "Print the result alone: no notes, no progress." in out
