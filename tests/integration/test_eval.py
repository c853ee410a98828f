"""``ivg eval`` on tiny models: files of every stage, what a kill leaves, what cannot be, what the report says."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from conftest import DATA
from ivg.errors import ConfigError, IVGError
from ivg.evaluation import runner
from ivg.evaluation.base_samples import SampleGroup
from ivg.evaluation.methods import BASE_SAMPLES
from ivg.evaluation.plan import make_plan
from ivg.evaluation.report import markdown, publish, read_results
from ivg.evaluation.score import read_scored
from ivg.evaluation.sentiment import Sentiment, opening_words
from ivg.evaluation.summarization import Summarization
from ivg.evaluation.summary import summarise
from ivg.evaluation.tables import tables
from ivg.settings.eval import STAGES
from ivg.settings.recipe import EvalConfig, Recipe
from ivg.testing import byte_tokenizer, tiny_model, tiny_value
from ivg.utils.jsonl import as_lines, read_jsonl
from killed import run_killed

FIGURES = ("reward-kl", "reward-compute", "reward-kl-other", "reward-compute-other", "pareto-gold-other")
METHODS = ["base", "eft", "bon", {"label": "ivg|2", "method": "ivg", "width": 2, "successors": 2, "chunk_length": 3}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Directories of tiny models, and prompts.jsonl: six prompts, the fourth too long for the models."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("base", "tuned", "untuned")):
        tiny_model("llama", seed, context=96).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    tiny_value("vocabulary", seed=7).save_pretrained(folder / "value")
    config = DistilBertConfig(vocab_size=257, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=2, max_position_embeddings=256)
    for name in ("gold", "other"):
        DistilBertForSequenceClassification(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    prompts = ["The movie was", "I have", "Never <b>again", "x" * 200, "A film", "It is"]
    (folder / "prompts.jsonl").write_text(as_lines({"prompt": p} for p in prompts))
    return folder


def recipe(hub, **more):
    return Recipe.parse(
        {
            "models": {role: str(hub / role) for role in ("base", "tuned", "untuned", "value")},
            "sampling": {"max_new_tokens": 9},
            "run": {"batch_size": 2, "dtype": "float32", "device": "cpu"},
            "eval": {
                "data": str(hub / "prompts.jsonl"),
                "seeds": 2,
                "methods": METHODS,
                "gold": str(hub / "gold"),
                "judges": {"other": str(hub / "other")},
                "base_samples": 4,
                "threads": 1,
                **more,
            },
        }
    )


@pytest.fixture(scope="module")
def done(hub, tmp_path_factory):
    """A finished run."""
    p = make_plan(recipe(hub), tmp_path_factory.mktemp("run"))
    runner.run(p)
    return p


def copy(p, folder):
    import shutil

    shutil.copytree(p.out, folder)
    return make_plan(p.recipe, folder)


# Files


def test_every_answer_has_a_row_and_every_row_scores(done):
    for method in done.method_rows:
        pairs = read_scored(done, method.label)
        assert [(r["seed"], r["id"]) for r, _ in pairs] == [(seed, str(i)) for seed in (0, 1) for i in range(6)]
        for row, judged in pairs:
            assert ("error" in row) == (row["id"] == "3")
            assert ("gold" in judged) == (row["id"] != "3")
            if "error" not in row:
                assert row["finish_reason"] in ("stop", "length")
                assert 1 <= len(row["token_ids"]) <= 9
                assert judged["base_logp"] < 0
                assert math.isfinite(judged["other"])


def test_the_base_answers_are_the_first_base_samples(done):
    base = list(read_jsonl(done.transcripts(done.base_row.label)))
    samples = list(read_jsonl(done.transcripts(BASE_SAMPLES)))
    good = [(a, b) for a, b in zip(base, samples, strict=True) if "error" not in a]
    assert len(good) == 10
    assert all(a["text"] == b["samples"][0]["text"] for a, b in good)
    assert all(len({s["text"] for s in b["samples"]}) > 1 for _, b in good)


def test_scores_are_what_the_models_say(done):
    import torch

    from ivg.models.loading import LoadOptions, load_causal
    from ivg.values.reward import RewardModel

    options = LoadOptions(device="cpu", dtype="float32")
    base = load_causal(done.recipe.models.given["base"].path, "base", options)
    gold = RewardModel.from_pretrained(done.config.gold.path, options=options)
    for row, judged in read_scored(done, "eft")[:3]:
        assert judged["gold"] == pytest.approx(gold.rewards([row["prompt"] + row["text"]])[0][0], abs=1e-4)
        ids = base.tokenizer(row["prompt"]).input_ids + row["token_ids"]
        logps = base.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(ids) - len(row["token_ids"])
        expected = sum(logps[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert judged["base_logp"] == pytest.approx(expected, abs=1e-3)


def test_the_shift_is_the_log_ratio_of_guided_and_base(done):
    """Sum over tokens of log softmax((z + z_T - z_U) / T) - log softmax(z / T), from plain forward passes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = {r: done.recipe.models.given[r].path for r in ("base", "tuned", "untuned")}
    nets = {r: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for r, path in places.items()}
    tokenizer = AutoTokenizer.from_pretrained(places["base"])
    for row, _ in read_scored(done, "eft")[:3]:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = prompt + row["token_ids"]
        with torch.no_grad():
            z = {r: n(torch.tensor([ids])).logits[0] for r, n in nets.items()}
        z["base"][:, tokenizer.eos_token_id] = -torch.inf  # sentiment: no answer ends before its length
        mixed = (z["base"] + z["tuned"] - z["untuned"]) / 0.7
        ratio = mixed.log_softmax(-1) - (z["base"] / 0.7).log_softmax(-1)
        expected = sum(ratio[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert row["shift"] == pytest.approx(expected, abs=1e-3)


def test_results_add_up(done):
    results = json.loads((done.out / "results.json").read_text())
    assert set(results["methods"]) == {"base", "eft", "bon", "ivg|2"}
    for m in results["methods"].values():
        assert (m["answers"], m["errors"]) == (10, 2)
        assert m["gold"]["low"] <= m["gold"]["mean"] <= m["gold"]["high"]
    base, eft, bon, ivg = results["methods"].values()
    assert base["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "bound": False}
    assert base["win_rate"]["mean"] == 0.5
    assert not eft["kl"]["bound"]
    assert bon["kl"]["mean"] == pytest.approx(math.log(16) - 15 / 16, abs=1e-5)
    rows = [r for r, _ in read_scored(done, "ivg|2") if "error" not in r]
    by_prompt = {}
    for r in rows:
        chunks = -(-len(r["token_ids"]) // 3)
        bound = math.log(4) + (chunks - 1) * math.log(2)
        by_prompt.setdefault(r["id"], []).append(r["shift"] + bound)
    assert ivg["kl"]["mean"] == pytest.approx(sum(sum(v) / 2 for v in by_prompt.values()) / 5, abs=1e-4)
    pairs = [(r, s) for r, s in read_scored(done, "eft") if "error" not in r]
    mean = sum(s["gold"] for _, s in pairs) / len(pairs)
    assert eft["gold"]["mean"] == pytest.approx(mean, abs=1e-5)
    read = sum(r["forward_tokens"]["base"] for r, _ in pairs) / len(pairs)
    assert eft["forward_tokens"]["base"] == pytest.approx(read, abs=0.01)
    assert eft["flops"] == pytest.approx(2 * sum(n * results["parameters"][k] for k, n in eft["forward_tokens"].items()), rel=1e-3)
    assert eft["best_of_n"]["flops"] <= eft["flops"] or eft["best_of_n"]["n"] == 1
    assert set(results["timings"]) == {"base", "eft", "bon", "ivg|2", "base_samples"}


def test_best_of_n_selects_by_the_value_never_by_gold(done):
    samples = [(r, s) for r, s in read_scored(done, BASE_SAMPLES) if "error" not in r]
    curve = json.loads((done.out / "results.json").read_text())["base_samples"]["curve"]
    for n in (1, 3):
        by_prompt = {}
        for r, s in samples:
            place = max(range(n), key=lambda i: r["samples"][i]["value"])
            by_prompt.setdefault(r["id"], []).append(s["gold"][str(place)])
        assert curve[n - 1]["gold"]["mean"] == pytest.approx(sum(sum(v) / len(v) for v in by_prompt.values()) / len(by_prompt), abs=1e-5)
    assert [c["n"] for c in curve] == [1, 2, 3, 4]


def test_base_samples_cost_what_one_request_of_that_size_reads(done):
    """Best-of-4 in one request: the prompt once, four answers. Base samples cost the same for N = 4."""
    from ivg.factory import recipe

    model = recipe.load_models(done.recipe)
    row = next(r for r in read_jsonl(done.transcripts(BASE_SAMPLES)) if r["id"] == "0")
    sampling = {"max_new_tokens": 9, "temperature": 0.7, "seed": 0, "ignore_eos": True}
    c = model.generate("The movie was", "bon", successors=4, **sampling)
    prompt = len("The movie was")
    # The value reads the prompt's last token once for every answer: its row is forked before that.
    assert c.usage.forward_tokens == {"base": prompt + 4 * 8, "explicit": prompt + 4 * 8 + 3}
    assert row["shared_tokens"] == {"base": prompt, "explicit": prompt}
    for s in row["samples"]:
        assert s["forward_tokens"] == {"base": s["tokens"] - 1, "explicit": s["tokens"] - 1}


# The report


def test_report_files(done):
    page = (done.out / "report.html").read_text()
    text = (done.out / "report.md").read_text()
    assert "Never &lt;b&gt;again" in page
    assert "<b>again" not in page
    assert page.count('<svg role="img"') == 5
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://creativecommons.org", "")
    assert "src=" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "`ivg\\|2`" in text
    assert "≤" in text
    assert {p.name for p in (done.out / "figures").iterdir()} == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    for name in re.findall(r"\((figures/[^)]+)\)", text):
        assert (done.out / name).exists()
    import torch

    assert torch.__version__ in text
    assert torch.__version__ in page


def test_svg_is_valid_and_has_a_description(done):
    from xml.etree import ElementTree

    paths = list((done.out / "figures").glob("*.svg"))
    assert paths
    for path in paths:
        root = ElementTree.fromstring(path.read_text())
        assert root.attrib["role"] == "img"
        assert any(m.label in root.attrib["aria-label"] for m in done.method_rows)  # the best of them; random models make any the best
        assert all(m.label in "".join(root.itertext()) for m in done.method_rows)
        assert "prefers-color-scheme:dark" in path.read_text()


def test_publish(done, tmp_path):
    publish(done, tmp_path / "docs")
    found = {str(p.relative_to(tmp_path / "docs")) for p in (tmp_path / "docs").rglob("*") if p.is_file()}
    assert {"report.md", "results.json", "figures/reward-kl.svg"} <= found
    whole, shown = ((folder / "report.md").read_text() for folder in (done.out, tmp_path / "docs"))
    assert "## Samples" in whole
    assert "## Samples" not in shown  # they quote the data
    assert whole.partition("## Samples")[0] + "## How" + whole.partition("\n## How")[2] == shown


def test_results_of_version_0_1_can_be_read(done, tmp_path):
    results = json.loads((done.out / "results.json").read_text())
    old = {k: v for k, v in results.items() if k not in ("base_samples", "timings")} | {"clock": results["timings"]}
    old["bank"] = {"by" if k == "selected_by" else k: v for k, v in results["base_samples"].items()}
    old["methods"] = {label: {"strategy" if k == "method" else k: v for k, v in m.items()} for label, m in results["methods"].items()}
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_results(tmp_path / "results.json") == results == read_results(done.out / "results.json")


def test_without_judges_there_is_still_a_report(hub, tmp_path):
    data = recipe(hub, judges={}, base_samples=0).model_dump(exclude_none=True)
    del data["eval"]["gold"]
    p = make_plan(Recipe.parse(data).override(eval={"prompts": 2, "seeds": 1}), tmp_path)
    runner.run(p)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["judges"] == []
    assert "Reward" in markdown(results, [], [])
    assert tables(results)[0].header == ["method", "KL to base, nats", "distinct-2", "repetition", "words", "tokens"]


# What cannot be


def test_scores_of_other_transcripts_are_refused(done, tmp_path):
    p = copy(done, tmp_path / "run")
    path = p.transcripts("eft")
    rows = list(read_jsonl(path))
    rows[1]["text"] += "!"
    path.write_text(as_lines(rows))
    with pytest.raises(ConfigError, match="transcripts are not those that were scored"):
        summarise(p)
    with pytest.raises(ConfigError, match="transcripts are not those that were scored"):
        runner.run(p, ["score"])


def test_stages_need_the_one_before(hub, tmp_path):
    p = make_plan(recipe(hub), tmp_path)
    with pytest.raises(ConfigError, match="run the stage generate"):
        runner.run(p, ["score"])
    with pytest.raises(ConfigError, match="run the stage generate"):
        runner.run(p, ["report"])


def test_half_a_transcript_is_not_scored(done, tmp_path):
    p = copy(done, tmp_path / "run")
    lines = p.transcripts("bon").read_text().splitlines(keepends=True)
    p.transcripts("bon").write_text("".join(lines[:5]))
    with pytest.raises(ConfigError, match="has 5 of 12 answers"):
        summarise(p)


def test_another_run_s_folder_is_refused(done, tmp_path):
    p = copy(done, tmp_path / "run")
    other = make_plan(p.recipe.override(sampling={"temperature": 0.5}), p.out)
    with pytest.raises(ConfigError, match="settings differ"):
        runner.run(other)


def test_seeds_can_be_added(hub, tmp_path):
    one = make_plan(recipe(hub, seeds=1, base_samples=0, methods=["eft"]), tmp_path)
    runner.run(one)
    first = one.transcripts("eft").read_bytes()
    two = make_plan(recipe(hub, seeds=2, base_samples=0, methods=["eft"]), tmp_path)
    runner.run(two)
    assert two.transcripts("eft").read_bytes().startswith(first)
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["eft"]["answers"] == 10
    runner.run(one)
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["eft"]["answers"] == 5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ["nonsense"]}, "unknown method"),
        ({"methods": ["eft", "eft"]}, "label eft is used twice"),
        ({"methods": [{"label": "base_samples", "method": "eft"}]}, "label base_samples is used twice or reserved"),
        ({"methods": [{"label": "a/b", "method": "eft"}]}, "names files"),
        ({"task": "poetry"}, "unknown task"),
        ({"judges": {"gold": "x"}}, "gold is taken"),
        ({"unknown": 1}, "unknown setting"),
    ],
)
def test_wrong_settings_are_errors(hub, tmp_path, settings, says):
    with pytest.raises(IVGError, match=says):
        runner.run(make_plan(recipe(hub, **settings), tmp_path), ["generate", "score"])


def test_combinations_are_nine(hub, tmp_path):
    p = make_plan(
        recipe(hub, methods=["combinations"]).override(search={"width": 2, "successors": 3, "chunk_length": 7, "beta": 0.5}), tmp_path
    )
    assert len(p.method_rows) == 9
    assert p.base_row.label == "none×none"
    ivg = p.method_row("implicit×explicit").method
    assert (ivg.width, ivg.successors, ivg.chunk_length, ivg.beta) == (2, 3, 7, 0.5)
    eft = p.method_row("implicit×none").method
    assert (eft.width, eft.successors, eft.chunk_length, eft.beta) == (1, 1, None, 0.5)


def test_a_group_without_gold_reports_none():
    assert SampleGroup("a", 0, (1.0, 2.0), (None, None), (1, 1), (1.0, 2.0)).best(2) == 1


# Killed and resumed


def files(out):
    """What two runs must share: bytes of transcripts and scores, results but for clocks and command."""
    found = {str(p.relative_to(out)): p.read_bytes() for part in ("transcripts", "scores") for p in sorted((out / part).iterdir())}
    results = json.loads((out / "results.json").read_text())
    del results["timings"], results["made"]
    return found | {"models.json": (out / "models.json").read_bytes(), "results": results}


SCRIPT = """
import json, os, sys
if any(name.startswith("IVG_TEST_KILL") for name in os.environ):
    import killed  # in the child processes, too, which import this file
from ivg.evaluation import runner
from ivg.evaluation.plan import make_plan
from ivg.settings.recipe import Recipe

if __name__ == "__main__":
    data, out, jobs = sys.argv[1:]
    runner.run(make_plan(Recipe.parse(json.load(open(data))), out), jobs=int(jobs))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("jobs", "moments"),
    [
        ("1", [(r"transcripts.base\.jsonl$", 2), (r"timings\.jsonl$", 9), (r"scores.*\.jsonl$", 3)]),
        ("2", [(r"transcripts.*\.jsonl$", 3)]),
    ],
)
def test_killed_at_any_moment_it_ends_the_same(hub, done, tmp_path, jobs, moments):
    """SIGKILL within the transcripts, between rows and their timing, within the scores; the last start ends like an undisturbed run."""
    out, script, settings = tmp_path / "run", tmp_path / "run.py", tmp_path / "recipe.json"
    script.write_text(SCRIPT)
    settings.write_text(json.dumps(recipe(hub).model_dump(exclude_none=True)))
    arguments = [str(script), str(settings), str(out), jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for pattern, count in moments:
        run_killed(arguments, environment, pattern, count)
    assert not (out / "results.json").exists()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    assert files(out) == files(done.out)


def test_half_a_line_is_cut_off(done, tmp_path):
    p = copy(done, tmp_path / "run")
    for path in (p.transcripts("eft"), p.transcripts(BASE_SAMPLES), p.scores("bon")):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) * 2 // 3])
    (p.out / "results.json").unlink()
    runner.run(p)
    assert files(p.out) == files(done.out)


# Tasks


def test_sentiment_prompts_are_the_embedded_ones(imdb_test):
    found = Sentiment().examples(EvalConfig(data=str(DATA / "imdb"), prompts=5))
    assert [e.prompt.content for e in found] == opening_words([r.text for r in imdb_test], 5, seed=0)


def test_sentiment_refuses_unknown_columns(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ConfigError, match="columns question"):
        Sentiment().examples(EvalConfig(data=str(tmp_path / "x.jsonl")))


def test_summarization_reads_posts_and_mails(tmp_path):
    posts = tmp_path / "posts.jsonl"
    posts.write_text(as_lines({"prompt": f"POST: {i // 2}\nTL;DR:", "label": "short"} for i in range(6)))
    found = Summarization().examples(EvalConfig(task="summarization", data=str(posts)))
    assert sorted(e.prompt.content for e in found) == ["POST: 0\n", "POST: 1\n", "POST: 2\n"]
    assert {e.reference for e in found} == {"short"}
    mails = tmp_path / "mails.jsonl"
    row = {"id": "m", "email": " ".join(map(str, range(100))), "subject": "numbers", "annotated_subjects": "['all', 'numbers']"}
    mails.write_text(as_lines([row]))
    (mail,) = Summarization().examples(EvalConfig(task="summarization", data=str(mails), options={"words": "3"}))
    assert mail.prompt.content == "0 1 2\n\nSubject:"
    assert mail.extra["references"] == ["all", "numbers", "numbers"]
    with pytest.raises(ConfigError, match="expected words"):
        Summarization().examples(EvalConfig(task="summarization", data=str(mails), options={"letters": 3}))


def test_shuffled_as_datasets_does(tmp_path):
    import datasets

    rows = [{"prompt": f"post {i}"} for i in range(50)]
    (tmp_path / "x.jsonl").write_text(as_lines(rows))
    expected = datasets.Dataset.from_list(rows).shuffle(seed=42)["prompt"][:10]
    found = Summarization().examples(EvalConfig(task="summarization", data=str(tmp_path / "x.jsonl"), prompts=10))
    assert [e.prompt.content for e in found] == list(expected)


def test_every_task_is_found_by_its_name_and_has_known_settings():
    from ivg.evaluation.task import TASKS, Task, load_task

    for name in TASKS:
        found = load_task(name)
        assert isinstance(found, Task)
        recipe = Recipe.parse({k: dict(v) for k, v in found.defaults().items()})
        for table, settings in found.defaults().items():
            assert set(settings) <= getattr(recipe, table).model_fields_set


def test_a_missing_package_is_an_error_before_anything_is_generated(done, monkeypatch):
    import importlib.util

    from ivg.cli.eval import run
    from ivg.errors import MissingDependencyError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("worked first"))
    with pytest.raises(MissingDependencyError, match=r"ivg\[eval\]"):
        run(done, STAGES, None)
