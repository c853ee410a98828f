"""``ivg eval`` refuses what makes a report untrue: files of other settings or weights, a judge that guides, settings that nobody reads."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from test_eval import copy, done, hub, recipe  # noqa: F401  (fixtures)

from ivg.errors import ConfigError, PromptError
from ivg.evaluation import runner
from ivg.evaluation.kl import kl_to_base, truncations
from ivg.evaluation.methods import BASE_SAMPLES
from ivg.evaluation.plan import make_plan
from ivg.evaluation.report import report
from ivg.evaluation.score import read_task_metrics
from ivg.evaluation.sentiment import Sentiment
from ivg.evaluation.summarization import Summarization
from ivg.evaluation.summary import run_metadata, summarise
from ivg.evaluation.transcripts import read_transcripts
from ivg.evaluation.winrate import read_judgements
from ivg.evaluation.worker import Worker
from ivg.jobs import fingerprints
from ivg.search.methods import get_method
from ivg.settings.recipe import EvalConfig, Recipe
from ivg.testing import tiny_value
from ivg.types import SamplingParams
from ivg.utils import cache, environment
from ivg.utils.jsonl import as_lines, read_jsonl, write_json

# Files of other settings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling": {"temperature": 0.5}}, "sampling"),
        ({"eval": {"prompts": 5}}, "prompts"),
        ({"run": {"seed": 7}}, "seed"),
        ({"eval": {"judges": {"another": "embedded:gold"}}}, "judges"),
    ],
)
def test_the_report_is_of_its_own_settings(done, tmp_path, change, says):  # noqa: F811
    p = copy(done, tmp_path / "run")
    before = {f: f.read_bytes() for f in p.out.rglob("*.jsonl*")}
    with pytest.raises(ConfigError, match=f"settings differ from those of its rows: .*{says}"):
        report(make_plan(p.recipe.override(**change), p.out))
    assert {f: f.read_bytes() for f in p.out.rglob("*.jsonl*")} == before


def test_other_methods_settings_are_not_reported(done, tmp_path):  # noqa: F811
    p = copy(done, tmp_path / "run")
    other = recipe_with(p, methods=["base", {"label": "ivg|2", "method": "ivg", "width": 2, "successors": 3, "chunk_length": 3}])
    with pytest.raises(ConfigError, match=r"method\.successors is 3, was 2"):
        read_transcripts(make_plan(other, p.out), "ivg|2")


def test_rows_of_before_a_setting_existed_can_be_reported(done, tmp_path):  # noqa: F811
    """A run is generated on one machine, and its report made by a later version: a new setting has its default there."""
    p = copy(done, tmp_path / "run")

    def forget(path, *names):
        meta = path.with_name(f"{path.name}.meta.json")
        content = json.loads(meta.read_text())
        method = (content.get("transcripts") or content)["method"]
        for name in names:
            del method[name]
        write_json(meta, content)

    for path in (p.transcripts("ivg|2"), p.scores("ivg|2")):
        forget(path, "soft_scale", "select_weights")
    report(p)
    forget(p.transcripts("ivg|2"), "width")  # which is 2, and 1 by default
    with pytest.raises(ConfigError, match=r"method\.width is 2, was not set"):
        report(p)


def recipe_with(p, **settings):
    return p.recipe.override(eval=settings)


def test_rows_are_of_the_plan_s_prompts(done, tmp_path):  # noqa: F811
    p = copy(done, tmp_path / "run")
    rows = list(read_jsonl(p.transcripts("eft")))
    rows[0], rows[1] = rows[1], rows[0]
    p.transcripts("eft").write_text(as_lines(rows))
    with pytest.raises(ConfigError, match="line 1: seed 0 and prompt '1', expected 0 and '0'"):
        summarise(p)


def test_changed_weights_are_refused(hub, tmp_path):  # noqa: F811
    shutil.copytree(hub / "value", tmp_path / "value")
    data = recipe(hub, methods=["bon"], base_samples=0, seeds=1).model_dump(exclude_none=True)
    data["models"]["value"]["path"] = str(tmp_path / "value")
    made = Recipe.parse(data)
    runner.run(make_plan(made, tmp_path / "run"), ["generate"])
    assert len(read_transcripts(make_plan(made, tmp_path / "run"), "bon")) == 6
    (tmp_path / "value").rename(tmp_path / "elsewhere")  # a report needs no models
    assert len(read_transcripts(make_plan(made, tmp_path / "run"), "bon")) == 6
    (tmp_path / "elsewhere").rename(tmp_path / "value")
    tiny_value("vocabulary", seed=8).save_pretrained(tmp_path / "value")
    with pytest.raises(ConfigError, match="settings differ from those of its rows: weights"):
        read_transcripts(make_plan(made, tmp_path / "run"), "bon")
    with pytest.raises(ConfigError, match="settings differ from those of its rows: weights"):
        runner.run(make_plan(made, tmp_path / "run"), ["generate"])


def test_fingerprints(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def brief(prompt, response):\n    return -len(response)\n")
    name = f"{tmp_path}/rewards.py:brief"
    first = fingerprints.fingerprint(name)
    assert first == fingerprints.fingerprint(name)
    (tmp_path / "rewards.py").write_text("def brief(prompt, response):\n    return len(response)\n")
    assert fingerprints.fingerprint(name) != first
    assert fingerprints.fingerprint("someone/model-of-the-hub") is None
    assert fingerprints.fingerprint("embedded:base") != fingerprints.fingerprint("embedded:tuned")
    assert set(fingerprints.weight_fingerprints(Recipe())) == {"base", "tuned", "untuned", "value", "value-other"}
    monkeypatch.chdir(tmp_path)
    assert fingerprints.same_source("rewards.py:brief", name)
    assert not fingerprints.same_source("rewards.py:other", name)
    assert fingerprints.same_source("someone/model", "someone/model")


def test_every_byte_of_a_large_file_counts_and_its_digest_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_FROM", 1 << 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("IVG_CACHE", raising=False)
    folder, marks, read = tmp_path / "model", [], []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or real(file, name))
    folder.mkdir()
    path = folder / "model.safetensors"
    data = bytearray(1 << 14)
    for number, place in enumerate((0, 50, len(data) // 2, len(data) - 5)):
        data[place] += 1
        path.write_bytes(data)
        os.utime(path, (number, number))  # long ago, and not when it was before
        marks += [fingerprints.fingerprint(str(folder))] * 2
        assert fingerprints.fingerprint(str(folder)) == marks[-1]
        assert len(read) == number + 1
    assert len(set(marks)) == 4
    path.write_bytes(data)  # just now: another change could have the same time, so nothing is remembered
    before = len(read)
    assert {fingerprints.fingerprint(str(folder)) for _ in range(2)} == {marks[-1]}
    assert len(read) == before + 2


def test_the_base_of_an_adapter_counts(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = fingerprints.fingerprint(str(adapter))
    (base / "config.json").write_text("{ }")
    assert fingerprints.fingerprint(str(adapter)) != before


def test_figures_of_a_task_are_those_of_its_settings(done, tmp_path):  # noqa: F811
    p = copy(done, tmp_path / "run")
    rows = read_transcripts(p, "eft")
    path = p.out / "scores" / "eft.task.json"
    write_json(path, {"answers": "other", "references": "", "settings": {}, "metrics": {"rate": 1.0}})
    with pytest.raises(ConfigError, match="metrics of other answers and references\n"):
        read_task_metrics(p, "eft", rows)
    runner.run(p, ["score"])  # sentiment has no figures of its own
    assert not path.exists()
    assert read_task_metrics(p, "eft", rows) == {}


# Who computed


def test_who_computed_is_reported(done, tmp_path, monkeypatch):  # noqa: F811
    p = copy(done, tmp_path / "run")
    (made,) = run_metadata(p)
    monkeypatch.setattr(environment, "command", lambda: "ivg eval another day")
    runner.run(p, ["generate", "score", "report"])
    assert run_metadata(p) == [made]  # nothing was computed
    assert "another day" not in (p.out / "report.md").read_text()
    for path in (p.transcripts("eft"), p.scores("eft")):
        path.unlink()
    runner.run(p, ["generate", "score", "report"])
    assert [m["command"] for m in run_metadata(p)] == [made["command"], "ivg eval another day"]
    text = (p.out / "report.md").read_text()
    assert made["command"] in text
    assert "another day" in text
    assert "another day" in (p.out / "report.html").read_text()


def test_the_commit_is_that_of_tracked_code(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for name in ("tracked.py", "untracked.py"):
        (tmp_path / name).write_text("")
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "one")
    assert environment.commit(tmp_path / "tracked.py") == git("rev-parse", "--short=12", "HEAD").strip()
    assert environment.commit(tmp_path / "untracked.py") is None


# Rows


def test_search_settings_that_no_row_has(hub, tmp_path):  # noqa: F811
    wide = recipe(hub, methods=["ivg"]).override(search={"width": 8})
    with pytest.raises(ConfigError, match=r"search\.width = 8 is used by no method"):
        make_plan(wide, tmp_path)
    with pytest.raises(ConfigError, match=r"search\.beta"):
        make_plan(recipe(hub, methods=["bon"]).override(search={"beta": 1.0}), tmp_path)
    with pytest.raises(ConfigError, match=r"search\.weights"):
        make_plan(recipe(hub, methods=["combinations"]).override(search={"weights": {"implicit": 1.0}}), tmp_path)
    assert make_plan(recipe(hub, methods=["ivg"]).override(search={"width": 4}), tmp_path).method_row("ivg").method.width == 4
    both = make_plan(recipe(hub, methods=["ivg", "combinations"]).override(search={"width": 8}), tmp_path)
    assert both.method_row("ivg").method.width == 4
    assert both.method_row("implicit×explicit").method.width == 8
    paper = make_plan(Recipe.parse({"eval": {"task": "alpaca", "methods": ["combinations"]}}), tmp_path)
    assert paper.method_row("none×explicit").method.chunk_length == 30
    assert make_plan(paper.recipe, tmp_path).method_rows == paper.method_rows


def test_the_reward_in_place_of_the_explicit_value_is_recorded(hub, tmp_path):  # noqa: F811
    data = recipe(hub, methods=["bon"]).model_dump(exclude_none=True)
    data["models"]["reward"] = data["models"].pop("value")
    p = make_plan(Recipe.parse(data), tmp_path)
    assert p.provenance("bon")["method"]["select"] == "reward"
    data["eval"]["methods"] = ["combinations"]
    with pytest.raises(ConfigError, match="none×explicit: needs the value explicit; the models provide implicit, reward"):
        make_plan(Recipe.parse(data), tmp_path)


def test_gold_guides_nothing(hub, tmp_path):  # noqa: F811
    data = recipe(hub, methods=[{"label": "cheat", "method": "bon", "select": "reward"}]).model_dump(exclude_none=True)
    data["models"]["reward"] = {"path": str(hub / ".." / hub.name / "gold")}
    with pytest.raises(ConfigError, match="also the value reward, used by cheat"):
        make_plan(Recipe.parse(data), tmp_path)
    data["eval"]["methods"] = ["eft"]
    make_plan(Recipe.parse(data), tmp_path)
    del data["models"]["value"]
    with pytest.raises(ConfigError, match="used by base_samples"):
        make_plan(Recipe.parse(data), tmp_path)
    named = {"values": {"film": {"reward": "embedded:gold"}}, "eval": {"methods": [{"label": "x", "method": "bon", "select": "film"}]}}
    with pytest.raises(ConfigError, match="also the value film, used by x"):
        make_plan(Recipe.parse(named), tmp_path)


@pytest.mark.parametrize("name", ["length", "tokens", "id", "kl", "flops", "label", "repetition", "a/b", "a b", "a.b", "a:b", ""])
def test_names_of_judges(name):
    with pytest.raises(ConfigError, match=r"is taken|cannot be called"):
        Recipe.parse({"eval": {"judges": {name: "x"}}})


def test_a_prompt_too_long_for_the_value_is_a_row_with_an_error(hub, done, tmp_path):  # noqa: F811
    p = make_plan(done.recipe, tmp_path)
    worker = Worker(p)
    value, known = worker.model.values["explicit"], type(worker.model.values["explicit"]).check

    def check(prompt, new_tokens):
        if prompt.content == "A film":
            raise PromptError("too long\n  shorten it")
        known(value, prompt, new_tokens)

    value.check = check
    runner.run_stage(worker, "generate", BASE_SAMPLES, lambda label, rows: None)
    rows, others = list(read_jsonl(p.transcripts(BASE_SAMPLES))), list(read_jsonl(done.transcripts(BASE_SAMPLES)))
    assert [r["id"] for r in rows if r.get("error") == "too long shorten it"] == ["4", "4"]
    assert [r for r in rows if r["id"] != "4"] == [r for r in others if r["id"] != "4"]


def test_judges_have_nothing_of_the_base(hub, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr("ivg.values.reward.load_reward", lambda path, **more: seen.append(more["options"]))
    for dtype in ("auto", "bfloat16"):
        run = {"run": {"dtype": dtype, "revision": "v2", "quantization": {"load_in_4bit": True}}}
        assert set(Worker(make_plan(recipe(hub).override(**run), tmp_path)).judges) == {"gold", "other"}
    assert [o.dtype for o in seen] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert all(o.revision is None and o.quantization is None for o in seen)


# Divergence


def test_no_divergence_where_distributions_are_cut():
    rows = [{"id": "0", "token_ids": [1] * 9, "shift": 2.0}]
    plain = SamplingParams(max_new_tokens=9)
    kinds = {"top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}, "min-p": {"min_p": 0.1}, "greedy choice": {"temperature": 0.0}}
    for what, settings in kinds.items():
        sampling = replace(plain, **settings)
        kl, note = kl_to_base(get_method("eft"), sampling, rows)
        assert kl is None
        assert what in note
        assert kl_to_base(get_method("bon"), sampling, rows)[0]["bound"]
    assert truncations(SamplingParams(repetition_penalty=1.2)) == "repetition penalty"
    assert truncations(SamplingParams(top_p=1.0)) is None
    assert kl_to_base(get_method("eft"), plain, rows)[0]["mean"] == 2.0
    assert kl_to_base(get_method("cards"), plain, rows) == (None, "no useful bound is known for the method")


def test_the_form_of_the_bound_is_the_method_s():
    """One answer of one chunk: only where the settings make all answers one chunk is it a best-of-N."""
    rows = [{"id": "0", "token_ids": [1, 2], "shift": 0.0}]
    many, sampling = get_method("cbs-explicit", width=2, successors=2), SamplingParams(max_new_tokens=9)
    blockwise = get_method("cd-blockwise", successors=4, chunk_length=3)
    assert kl_to_base(replace(many, chunk_length=3), sampling, rows)[0]["mean"] == pytest.approx(math.log(4), abs=1e-5)
    assert kl_to_base(replace(many, chunk_length=9), sampling, rows)[0]["mean"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-5)
    assert kl_to_base(blockwise, sampling, rows)[0]["mean"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-5)


# Input


def evaluate(task, out, **options):
    """``ivg eval`` in this process."""
    from ivg.cli.app import app

    words = [f"--{name}={value}" for name, value in options.items()]
    app(["eval", task, "--out", str(out), *words], standalone_mode=False)


def data(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text(as_lines(rows))
    return str(path)


@pytest.mark.parametrize("task", [Sentiment, Summarization])
@pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": [{"role": "user", "content": "x"}]}, {"other": "x"}])
def test_rows_without_a_text(tmp_path, task, row):
    with pytest.raises(ConfigError, match="row 2: expected a text in prompt"):
        task().examples(EvalConfig(data=data(tmp_path, {"prompt": "x"}, row)))


@pytest.mark.parametrize("task", [Sentiment, Summarization])
def test_too_few_prompts_are_an_error(tmp_path, task):
    path = data(tmp_path, {"prompt": "x"}, {"prompt": "y"})
    with pytest.raises(ConfigError, match="has 2 prompts, expected 3"):
        task().examples(EvalConfig(data=path, prompts=3))
    assert len(task().examples(EvalConfig(data=path))) == 2


def test_sentiment_settings_that_nothing_reads(tmp_path):
    path = data(tmp_path, {"prompt": "x"})
    with pytest.raises(ConfigError, match="leave out shuffle"):
        Sentiment().examples(EvalConfig(data=path, shuffle=1))
    with pytest.raises(ConfigError, match="has no options, got words"):
        Sentiment().examples(EvalConfig(data=path, options={"words": 3}))


def test_reviews_are_as_many_as_there_are(tmp_path):
    path = data(tmp_path, *({"text": f"{i} " + "word " * 12} for i in range(3)), {"text": "short"})
    assert len(Sentiment().examples(EvalConfig(data=path))) == 3
    with pytest.raises(ConfigError, match="has 3 prompts, expected 4"):
        Sentiment().examples(EvalConfig(data=path, prompts=4))
    with pytest.raises(ConfigError, match="row 2: expected a text in text"):
        Sentiment().examples(EvalConfig(data=data(tmp_path, {"text": "x"}, {"text": None})))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"preference": "m"}, "preference 'm'"), ({"preference": True}, "preference True"), ({"output_2": None}, "output_2 is None")],
)
def test_judgements_that_are_none(tmp_path, change, says):
    row = {"instruction": "x", "output_1": "a", "output_2": "b", "preference": 1.5}
    with pytest.raises(ConfigError, match=f"judgement 2: {says}"):
        read_judgements(data(tmp_path, row, row | change))
    assert len(read_judgements(data(tmp_path, row, row | {"preference": None}))) == 2


def test_a_recipe_without_a_task_is_for_any(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[sampling]\nmax_new_tokens = 3\n")
    with pytest.raises(ConfigError, match=r"no such file.*absent\.jsonl"):
        evaluate("summarization", tmp_path / "out", recipe=path, data=str(tmp_path / "absent.jsonl"), methods="base")
    path.write_text('[eval]\ntask = "sentiment"\n')
    with pytest.raises(ConfigError, match="the recipe is for the task 'sentiment'"):
        evaluate("summarization", tmp_path / "out", recipe=path)


def test_sizes_of_a_recipe_are_for_its_own_methods(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[search]\nwidth = 3\n")
    absent = str(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        evaluate("sentiment", tmp_path / "out", recipe=path, data=absent, methods="base,bon")
    with pytest.raises(ConfigError, match=r"search\.width = 5 is used by no method"):
        evaluate("sentiment", tmp_path / "out", recipe=path, data=absent, methods="base,bon", width=5)


def test_data_beside_the_recipe(tmp_path):
    data(tmp_path, {"prompt": "x"})
    (tmp_path / "recipe.toml").write_text('[eval]\ndata = "data.jsonl"\n')
    assert Recipe.load(tmp_path / "recipe.toml").eval.data == str(tmp_path / "data.jsonl")
    (tmp_path / "recipe.toml").write_text('[eval]\ndata = "someone/data"\n')
    assert Recipe.load(tmp_path / "recipe.toml").eval.data == "someone/data"


def test_gold_of_a_check_is_the_recipe_s(monkeypatch):
    from ivg.cli.preference_check import gold_reward

    seen = []
    monkeypatch.setattr("ivg.values.reward.load_reward", lambda path, **more: seen.append(path))
    gold_reward(Recipe())
    gold_reward(Recipe.parse({"models": {"base": "someone/model"}, "eval": {"gold": "someone/reward"}}))
    assert seen == ["embedded:gold", "someone/reward"]
    with pytest.raises(ConfigError, match="--judge gold needs a gold reward"):
        gold_reward(Recipe.parse({"models": {"base": "someone/model"}}))


def test_results_are_json(done):  # noqa: F811
    constants = []
    json.loads((done.out / "results.json").read_text(), parse_constant=constants.append)
    assert not constants  # NaN and Infinity are no JSON


@pytest.mark.parametrize(
    ("task", "data"), [(Sentiment, None), (Summarization, None), (Summarization, "CarperAI/openai_summarize_comparisons")]
)
def test_without_data_and_without_the_hub_the_error_says_data(task, data):
    with pytest.raises(ConfigError, match=r"no such data set in the hub's cache(.|\n)*--data FILE"):
        task().examples(EvalConfig(data=data))
    with pytest.raises(ConfigError, match=r"no such file: none\.jsonl") as e:
        task().examples(EvalConfig(data="none.jsonl"))
    assert "--data" not in str(e.value)
