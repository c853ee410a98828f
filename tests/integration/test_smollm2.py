"""The experiments on SmolLM2 (benchmarks/smollm2, recipes/smollm2): rows, judges, every step and every recipe, on a tiny base."""

import hashlib
import importlib.util
import json
import math
import random
import re
from pathlib import Path

import pytest

from benchmarks.smollm2.calibration import calibration
from benchmarks.smollm2.data import is_test, prepare
from benchmarks.smollm2.steps import Scale, best_responses, steps, subject_labels
from benchmarks.smollm2.words import fit_words, log_odds
from ivg.evaluation.summarization import Summarization
from ivg.settings.eval import EvalConfig
from ivg.utils.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]
RECIPES = {
    "sentiment": {"sentiment": 15, "sentiment-dev": 8, "sentiment-beyond": 4, "sentiment-steps": 5},
    "summarization": {"summarization": 15, "summarization-dev": 10},
    "instructions": {"alpaca": 15, "alpaca-dev": 10},
}
"""Experiment -> recipe -> its number of methods, at least."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up rows in the form of the data sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words, count):
        return " ".join(rng.choice(words) for _ in range(count))

    def save(name, rows):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)

    plain = ["the", "film", "a", "plot", "of", "and", "scene", "actor", "was", "is", "long", "short"]
    labelled = [{"text": text([*plain, *(["great", "lovely"] if i % 2 else ["awful", "dull"])], 70), "label": i % 2} for i in range(60)]
    save("imdb/train.parquet", labelled)
    save("imdb/unsupervised.parquet", [{"text": text(plain, 30), "label": -1} for _ in range(10)])
    save("imdb/test.parquet", [{"text": f"{i} {text(plain, 12)}", "label": i % 2} for i in range(700)])
    mails = [
        {"id": str(i), "email": f"mail{i} {text(plain, 20)}", "subject": f"about mail{i}", "annotated_subjects": ["x y"]} for i in range(80)
    ]
    for split, rows in (("train", mails[:40]), ("dev", mails[40:60]), ("test", mails[60:])):
        save(f"aeslc/{split}.parquet", rows)
    asked = [f"question {i}" for i in range(60)]
    train, test = [q for q in asked if not is_test(q)], [q for q in asked if is_test(q)]
    judged = [
        {"instruction": q, "output": text(plain, 3 + 5 * k), "score": score + rng.random()}
        for q in train
        for k, score in enumerate((-6, 5, -2, 3))
    ]
    save("alpaca_eval/judged.parquet", judged)
    import gzip

    with gzip.open(folder / "alpaca_eval" / "reference_outputs_gpt4_1106_preview.json.gz", "wt") as file:
        json.dump([{"instruction": q, "output": "an answer", "dataset": "made up", "generator": "gpt4"} for q in asked], file)
    assert test
    return folder


@pytest.fixture(scope="module")
def work(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(data, folder, scale=0.002)
    return folder


def judges(work, monkeypatch):
    monkeypatch.setenv("IVG_SMOLLM2", str(work))
    spec = importlib.util.spec_from_file_location("judges", ROOT / "recipes" / "smollm2" / "judges.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_row_of_training_is_in_the_test(work):
    """Prompts that measure are of other reviews, e-mails and instructions than those that train."""
    for train, test in (
        ("imdb-prompts", "imdb-test"),
        ("imdb-dev", "imdb-beyond"),
        ("aeslc-prompts", "aeslc-test"),
        ("aeslc-reward", "aeslc-test"),
        ("aeslc-prompts", "aeslc-beyond"),
    ):
        rows = [{r["prompt"] for r in read_jsonl(work / f"{name}.jsonl")} for name in (train, test)]
        assert rows[0] and rows[1] and not rows[0] & rows[1]
    mails, beyond = ([str(r["id"]) for r in read_jsonl(work / f"aeslc-{name}.jsonl")] for name in ("test", "beyond"))
    first = Summarization().examples(EvalConfig(data=str(work / "aeslc-test.jsonl"), prompts=len(mails) - len(beyond)))
    assert first and set(beyond) == set(mails) - {example.id for example in first}
    asked = {r["instruction"] for r in read_jsonl(work / "alpaca-test.jsonl")}
    assert asked and all(int(hashlib.sha256(q.encode()).hexdigest(), 16) % 4 == 0 for q in asked)
    assert not asked & {r["prompt"] for r in read_jsonl(work / "alpaca-judged.jsonl")}
    assert not asked & {r["instruction"] for r in read_jsonl(work / "alpaca-dev.jsonl")}
    assert {r["score"] for r in read_jsonl(work / "imdb-labels.jsonl")} == {0, 1}
    assert not {r["prompt"] + r["response"] for r in read_jsonl(work / "imdb-labels.jsonl")} & {
        r["prompt"] + r["response"] for r in read_jsonl(work / "imdb-labels-2.jsonl")
    }


def test_words_are_fitted_as_a_logistic_regression():
    """Two words, one for each label in 9 of 10 texts: the log-odds are those of the counts, but for the penalty."""
    rows = [("good", 1)] * 900 + [("good", 0)] * 100 + [("bad", 0)] * 900 + [("bad", 1)] * 100
    weights = fit_words(rows)
    assert log_odds(weights, "good") == pytest.approx(2.197, abs=0.05)
    assert log_odds(weights, "a bad one") == pytest.approx(-2.197, abs=0.05)


def test_calibration_by_hand():
    """Two texts of p = 0.731, one of them positive; two of p = 0.269, both negative."""
    found = calibration([1.0, 1.0, -1.0, -1.0], [1, 0, 0, 0])
    assert found["accuracy"] == 0.75
    assert found["calibration_error"] == pytest.approx((0.7311 - 0.5 + 0.2689) / 2, abs=1e-3)
    assert found["log_loss"] == pytest.approx((3 * 0.31326 + 1.31326) / 4, abs=1e-4)
    assert (found["lowest"], found["highest"]) == (-1, 1)


def test_judges_by_hand(work, monkeypatch):
    j = judges(work, monkeypatch)
    weights = json.loads((work / "words.json").read_text())
    assert j.bag_of_words("great", " film") == pytest.approx(
        weights[""] + weights["great"] + weights["film"] + weights.get("great film", 0.0)
    )
    judge = json.loads((work / "judgement-words.json").read_text())
    good, film = sorted(judge["weights"])[:2]
    shares = judge["weights"][good] * math.log1p(75) + judge["weights"][film] * math.log1p(25)
    assert j.word_shares("a question", f"{good} {good} {film} {good.upper()}") == pytest.approx((judge["intercept"] + shares) * 4 / 14)
    assert j.word_shares("a question", " ") == judge["lowest"]
    rows = list(read_jsonl(work / "alpaca-judged.jsonl"))
    scores = [j.word_shares(r["prompt"], r["response"]) for r in rows]
    totals = [len(re.findall(r"\w+|[^\w\s]", r["response"])) for r in rows]
    full = [score * (total + 10) / total for score, total in zip(scores, totals, strict=True)]  # as if few words counted like many
    assert sum(full) / len(full) == pytest.approx(0, abs=0.01)
    assert min(scores) == pytest.approx(judge["lowest"], abs=0.01)
    mail = next(read_jsonl(work / "aeslc-test.jsonl"))
    own = mail["response"]
    assert j.agreement(mail["prompt"], own) == 1
    assert j.agreement(mail["prompt"], own + " and more words") == pytest.approx(2 * 2 / (2 + 5))
    assert j.agreement(mail["prompt"], "nothing") == j.agreement(mail["prompt"], "") == 0
    assert j.retrieval(mail["prompt"], own) == 1  # no other e-mail has its number
    assert j.retrieval(mail["prompt"], "") == 0.5  # fits all alike
    other = list(read_jsonl(work / "aeslc-test.jsonl"))[1]
    assert j.retrieval(mail["prompt"], other["response"]) < 0.5


def tiny_base(folder):
    from ivg.testing import byte_tokenizer, tiny_model

    tiny_model("llama", 1, context=4096).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("experiment", RECIPES)
def test_all_steps_and_the_recipe(experiment, work, tmp_path, ivg, monkeypatch):
    """Each step is a command that works and that finds its results the second time; then the recipe's methods answer and are scored."""
    base = tiny_base(tmp_path / "base")
    found = steps(experiment, str(base), work, Scale(0.002, 16, "--set max_steps=1 --max-length 2000", trained=False))
    done = set()
    for step in found:
        assert done >= set(step.after)
        done.add(step.name)
        if callable(step.command):
            step.command()
        else:
            code, _, err = ivg(*step.words)
            assert code == 0, (step.name, err)
    for step in found:
        if not callable(step.command):
            assert ivg(*step.words)[0] == 0
    judges(work, monkeypatch)
    small = ("--prompts", 2, "--seeds", 1, "--base-samples", 2, "--max-new-tokens", 6, "--dtype", "float32")
    for name, methods in RECIPES[experiment].items():
        recipe = (ROOT / "recipes" / "smollm2" / f"{name}.toml").read_text()
        recipe = recipe.replace('"smollm2"', f'"{base}"').replace("../../build/smollm2", str(work)).replace("build/smollm2", str(work))
        recipe = recipe.replace('"judges.py', f'"{ROOT}/recipes/smollm2/judges.py').replace('"../grounded', f'"{ROOT}/recipes/grounded')
        (tmp_path / "recipe.toml").write_text(recipe)
        task = name.split("-")[0]
        code, _, err = ivg("eval", task, "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / name, *small)
        assert code == 0, (name, err)
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert len(results["methods"]) >= methods and all(not m["errors"] for m in results["methods"].values())


def test_opposite_tastes(tmp_path, ivg):
    """praise.toml and pan.toml: one value selects with opposite signs (on a tiny base)."""
    from ivg import ExplicitValue
    from ivg.testing import hypothesis, tiny_lm

    base, scores = tiny_base(tmp_path / "base"), {}
    for taste in ("praise", "pan"):
        recipe = (ROOT / "recipes" / "smollm2" / f"{taste}.toml").read_text().replace('"smollm2"', f'"{base}"')
        (tmp_path / f"{taste}.toml").write_text(recipe)
        code, _, err = ivg("generate", "A film", "--recipe", tmp_path / f"{taste}.toml", "--output", tmp_path / f"{taste}.jsonl")
        assert code == 0, err
        row = next(read_jsonl(tmp_path / f"{taste}.jsonl"))
        value = ExplicitValue.from_pretrained("embedded:value")
        scores[taste] = value.score([hypothesis("A film", row["text"], tiny_lm())])[0]
        assert row["score"] == pytest.approx(scores[taste] * (1 if taste == "praise" else -1), abs=0.3)
    assert scores["praise"] > scores["pan"]


def rows_in(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_of_subjects_by_hand(tmp_path):
    """The next two e-mails' subjects; a sampled one where it is about as long; an empty one for every fourth e-mail."""
    subjects = ["one", "two words", "three little words", "four", "five"]
    mails = rows_in(tmp_path / "mails", [{"id": str(i), "prompt": f"mail {i}", "response": s} for i, s in enumerate(subjects)])
    sampled = {"0": " like it ", "1": "one two three four five", "2": "Three Little Words", "3": " "}
    samples = rows_in(
        tmp_path / "samples", [{"id": i, "text": text} for i, text in sampled.items()] + [{"id": "4", "error": "e", "text": "x"}]
    )
    subject_labels(mails, samples, tmp_path / "out")
    found = {}
    for row in read_jsonl(tmp_path / "out"):
        if row["score"] == 1:
            assert row["response"] == subjects[int(row["prompt"].split()[1])]
        else:
            found.setdefault(row["prompt"], []).append(row["response"])
    assert found["mail 0"] == ["two words", "three little words", " like it", ""]
    assert found["mail 1"] == ["three little words", "four"]  # the sampled one is three words longer
    assert found["mail 2"] == ["four", "five"]  # the sampled one is the sender's
    assert found["mail 3"] == ["five", "one"]
    assert found["mail 4"] == ["one", "two words", ""]


def test_best_responses_by_hand(tmp_path):
    """The highest score among complete answers; with length controlled, of those at equal length."""

    def row(prompt, response, score, reason="stop"):
        return {"prompt": prompt, "response": response, "score": score, "finish_reason": reason}

    rows = [row("a", "x " * n, math.log1p(n)) for n in (1, 2, 4, 8)]  # what length explains
    rows += [row("a", "x x y ", math.log1p(3) + 0.2), row("a", "cut", 99.0, "length"), row("a", "", 50.0)]
    rows += [{"prompt": "a", "error": "failed"}]
    scored = rows_in(tmp_path / "rollouts", [*rows, row("b", "only ", -1.0)])
    best_responses(scored, tmp_path / "plain")
    assert [(r["prompt"], r["response"]) for r in read_jsonl(tmp_path / "plain")] == [("a", ("x " * 8).rstrip()), ("b", "only")]
    longer = rows_in(tmp_path / "longer", [*rows[:5], row("b", "only ", -1.0)])
    best_responses(longer, tmp_path / "controlled", control_length=True)
    assert next(read_jsonl(tmp_path / "controlled"))["response"] == "x x y"
