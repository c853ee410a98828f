"""The baselines of rewards: on answers whose score is a word's, and on answers whose score is their length's."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks import reward_baselines as baselines
from ivg import testing
from ivg.settings.train import PairSettings
from ivg.training.data import RatedResponse
from ivg.training.pairing import compare
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines
from ivg.utils.rng import uniform


def answers(score, count=60):
    out = []
    for i in range(count):
        for k in range(6):
            text = " ".join(["so"] * (3 + int(9 * uniform(i, k, 1))) + ["good"] * int(3 * uniform(i, k, 2)))
            out.append({"instruction": f"do {i}", "output": text, "score": score(text), "preference": 1.0})
    return out


def write(folder, rows):
    (folder / "judged.jsonl").write_text(as_lines(rows))
    return folder / "judged.jsonl"


def test_words_beat_length_where_words_matter(tmp_path):
    file = write(tmp_path, answers(lambda text: 2.0 * text.count("good")))
    found = baselines.measure(file, 0.2, words=50)
    assert found["pairs"]["words"]["rate"] == found["pairs"]["words and length"]["rate"] == 1.0
    assert found["clear_pairs_of_like_length"]["words"]["rate"] == 1.0
    assert found["pairs"]["length"]["rate"] < 0.9
    file = write(tmp_path, answers(lambda text: float(len(text.split()))))
    found = baselines.measure(file, 0.2, words=50)
    assert found["pairs"]["length"]["rate"] == found["spearman_within_prompts"]["length"] == 1.0


def test_the_test_split_is_left_out_and_the_rest_split_as_in_training(tmp_path):
    rows = answers(lambda text: float(text.count("good")))
    kept = [row for row in rows if not baselines.is_test(row["instruction"])]
    assert 0 < len(kept) < len(rows)
    assert baselines.is_test("do 0") == (int(__import__("hashlib").sha256(b"do 0").hexdigest(), 16) % 4 == 0)
    found = baselines.measure(write(tmp_path, rows), 0.25, words=20)
    rated = [RatedResponse(Prompt(r["instruction"]), r["output"], r["score"]) for r in kept]
    held_out = compare([rated], PairSettings(pairs_per_prompt=3, label="higher"), eval_share=0.25).held_out
    assert found["answers_of_test_instructions_left_out"] == len(rows) - len(kept)
    assert found["instructions_held_out"] == len(held_out)
    assert found["answers_held_out"] == sum(row.prompt in held_out for row in rated)


def test_ridge_regression_by_its_normal_equations():
    rows = [RatedResponse(Prompt("p"), text, score) for text, score in (("a", 0.0), ("b", 1.0), ("a b b", 5.0))]
    rows += [RatedResponse(Prompt("q"), text, score) for text, score in (("b", 3.0), ("a a", -1.0))]
    features = baselines.Features(rows, 2)
    table = features(rows)
    raw = np.log1p([[r.response.split().count(word) for word in features.columns] + [len(r.response.split())] for r in rows])
    assert table[:3] == pytest.approx(raw[:3] - raw[:3].mean(0), abs=1e-6)
    (weights,) = baselines.solutions(table, rows, [0.7])
    scores = np.array([-2, -1, 3, 2, -2])
    stacked = np.vstack([table, np.sqrt(0.7) * np.eye(3)])  # the penalty as three more rows of least squares
    assert weights == pytest.approx(np.linalg.lstsq(stacked, np.append(scores, [0, 0, 0]), rcond=None)[0], abs=1e-4)


def test_word_shares_do_not_follow_length(tmp_path):
    found = baselines.measure(write(tmp_path, answers(lambda text: float(len(text.split())) + 2.0 * ("good" in text))), 0.2, words=50)
    assert found["pairs"]["length"]["rate"] > 0.9
    rows = [RatedResponse(Prompt("p"), text, 0.0) for text in ("good so", "good good so so", "so", "")]
    shares = baselines.Features(rows, 2, shares=True)
    plain = shares.plain(rows)
    assert plain[:2, :2] == pytest.approx(np.log1p(np.full((2, 2), 50.0)))
    assert plain[2, shares.columns["so"]] == pytest.approx(np.log1p(100.0))
    assert not plain[3].any()
    judged = [RatedResponse(Prompt(r["instruction"]), r["output"], r["score"]) for r in answers(lambda text: float(len(text.split())))]
    features, weights, _ = baselines.fit_word_shares(judged, 2)
    slope = weights[features.columns["good"]] * np.log1p(50.0)  # a score that is length alone has nothing left to explain
    features, weights, _ = baselines.fit(judged, 2, length=True)
    assert abs(slope) < 0.1 * weights[-1]


def test_a_trained_reward_gets_a_row(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    body = testing.tiny_model().config
    network = LlamaForSequenceClassification(LlamaConfig(**{**body.to_dict(), "num_labels": 1, "pad_token_id": 0}))
    network.save_pretrained(tmp_path / "reward")
    testing.byte_tokenizer().save_pretrained(tmp_path / "reward")
    file = write(tmp_path, answers(lambda text: 2.0 * text.count("good"), 30))
    arguments = ["--data", file, "--reward", tmp_path / "reward", "--device", "cpu", "--words", "20", "--out", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["reward_baselines", *map(str, arguments)])
    baselines.main()
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert f"| reward | {found['pairs']['reward']['rate']:.3f} |" in shown
    assert "| words and length | 1.000 |" in shown
    assert found["pairs"]["reward"]["low"] < found["pairs"]["reward"]["high"]
