"""AlpacaEval: files as alpaca_eval reads them, judges, plain and length-controlled win rates."""

import csv
import gzip
import hashlib
import json
import math
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA
from ivg.errors import ConfigError, JudgeError
from ivg.evaluation import length_control
from ivg.evaluation.alpaca import INSTRUCTIONS, Alpaca
from ivg.evaluation.judges import AlpacaEvalJudge, ChatJudge, Pair, RewardJudge, Verdict, judge_all
from ivg.evaluation.length_control import GLM_COLUMNS, length_controlled
from ivg.evaluation.task import Answer
from ivg.evaluation.winrate import average_over_seeds, read_judgements, win_rate
from ivg.settings.recipe import EvalConfig
from ivg.types import Reward
from ivg.utils.jsonl import read_jsonl
from ivg.utils.rng import uniform

PUBLISHED = DATA / "alpaca_eval"
MODELS = ("Mixtral-8x7B-Instruct-v0.1_concise", "OpenHermes-2.5-Mistral-7B", "gpt-3.5-turbo-1106")


def row(preference, length_1=10, length_2=10, **more):
    names = {"generator_1": "reference", "generator_2": "model"}
    return {"instruction": "?", "output_1": "a" * length_1, "output_2": "b" * length_2, "preference": preference, **names, **more}


# Plain win rates


def published(name):
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="module")
def leaderboard():
    with published("leaderboard.csv").open() as file:
        return {r[""]: r for r in csv.DictReader(file)}


@pytest.mark.parametrize("model", MODELS)
def test_published_win_rates_are_reproduced(leaderboard, model):
    known = leaderboard[model]
    found = win_rate(read_judgements(PUBLISHED / f"annotations_{model}.json.gz"))
    for rate in ("win_rate", "standard_error", "discrete_win_rate"):
        assert getattr(found, rate) == pytest.approx(float(known[rate]), abs=0.01)
    for count in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        assert getattr(found, count) == int(known[count])
    assert int(found.avg_length) == int(known["avg_length"])


def test_a_win_rate_by_hand():
    found = win_rate([row(1.0, length_2=4), row(1.25), row(1.5), row(0), row(2, length_2=16), row(None), row(math.nan)])
    won = [0, 0.25, 0.5, 0.5, 1]
    assert found.win_rate == pytest.approx(45)
    assert found.standard_error == pytest.approx(100 * np.std(won, ddof=1) / math.sqrt(5))
    assert (found.n_wins, found.n_wins_base, found.n_draws, found.n_total, found.n_missing) == (1, 2, 2, 5, 2)
    assert found.discrete_win_rate == pytest.approx(40)
    assert found.avg_length == pytest.approx((4 + 16 + 5 * 10) / 7)


def test_the_plain_rate_is_alpaca_evals(published_or_synthetic):
    pytest.importorskip("alpaca_eval", reason="alpaca_eval is not installed")
    with length_control.suppress_logs():
        from alpaca_eval.metrics import get_winrate

        expected = get_winrate(published_or_synthetic)
    found = win_rate(published_or_synthetic)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(float(value)), name


@pytest.fixture
def published_or_synthetic():
    rng = np.random.default_rng(4)
    return [row(p) for p in [1.0, 1.5, 2.0, 0.0, *(1 + rng.random(60)).round(6)]]


def test_a_seed_is_no_instruction():
    rows = [row(p, id=str(i), seed=s) for s, ps in enumerate([(1, 2, None), (2, 2, None)]) for i, p in enumerate(ps)]
    assert [r["preference"] for r in average_over_seeds(rows)] == [1.5, 2, None]
    assert win_rate(average_over_seeds(rows)).n_total == 2


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no judgements"),
        ([{"instruction": "a", "preference": 1}], "no output_1, output_2"),
        ([row(1), row(1, generator_2="other")], "generator_2"),
        ([row(2.5)], "preference 2.5"),
        ([row(None)], "none of 1 judgements"),
    ],
)
def test_unusable_judgements_are_errors(tmp_path, rows, says):
    path = tmp_path / "judgements.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=says):
        win_rate(read_judgements(path))
    with pytest.raises(ConfigError, match="no such file"):
        read_judgements(tmp_path / "absent.json")


# Length control


class World:
    """Instructions with difficulties; judgements by a known law: sigmoid(a tanh(length difference, standardised) + b d + c)."""

    def __init__(self, n=600, a=-2.0, b=0.8, c=-0.4, seed=0, gamed=-0.5):
        rng = np.random.default_rng(seed)
        self.difficulty = rng.normal(size=n)
        self.truth = 100 * sigmoid(b * self.difficulty + c).mean()
        shift = rng.integers(-300, 900, size=n)  # the model is mostly longer, and length is liked: a is of reference - model
        lengths = [(1000, 1000 + int(s)) for s in shift]
        delta = np.array([x - y for x, y in lengths], float)
        self.x = np.column_stack([np.tanh(delta / delta.std(ddof=1)), self.difficulty, np.ones(n)])
        self.y = sigmoid(self.x @ [a, b, c])
        self.rows = [row(1 + p, *both) for p, both in zip(self.y, lengths, strict=True)]
        lengths = rng.normal(size=2 * n)
        self.gamed_x = np.column_stack([np.tanh(lengths), np.tile(self.difficulty, 2), np.zeros(2 * n)])
        self.gamed_y = sigmoid(gamed * np.tanh(lengths))
        self.gamed = lengths

    def write(self, path, columns=GLM_COLUMNS):
        n = len(self.difficulty)
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, columns, extrasaction="ignore")
            out.writeheader()
            for i in range(2 * n):
                judged = {"preference": self.gamed_y[i], "std_delta_len": self.gamed[i], "not_gamed_baseline": False}
                out.writerow({"index": i % n, "instruction_difficulty": self.difficulty[i % n], "model": f"g{i // n}", **judged})
        return path


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fit(x, y, weight):
    """Weighted logistic regression on probabilities by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = sigmoid(x @ w)
        w += np.linalg.solve((x * (weight * p * (1 - p))[:, None]).T @ x, x.T @ (weight * (y - p)))
    return w


@pytest.fixture
def alpaca_eval():
    return pytest.importorskip("alpaca_eval.metrics.glm_winrate", reason="alpaca_eval is not installed: pip install 'ivg[alpaca]'")


@pytest.mark.parametrize("seed", range(3))
def test_length_control_is_the_logistic_fit(alpaca_eval, tmp_path, seed):
    world = World(seed=seed)
    found = length_controlled(world.rows, world.write(tmp_path / "df_gamed.csv"))
    # alpaca_eval: its two gamed baselines together weigh 0.2; a slight L1 penalty, chosen by cross-validation, is all that differs
    n = len(world.y)
    weights = np.r_[np.ones(n), np.full(2 * n, 0.1)]
    w = fit(np.r_[world.x, world.gamed_x], np.r_[world.y, world.gamed_y], weights)
    expected = sigmoid(w[1] * world.difficulty + w[2])
    assert found.reason == ""
    assert found.win_rate == pytest.approx(100 * expected.mean(), abs=0.02)
    assert found.standard_error == pytest.approx(100 * expected.std(ddof=1) / math.sqrt(n), rel=0.01)


def test_length_control_finds_the_rate_at_equal_length(alpaca_eval, tmp_path):
    world = World(gamed=-2.0)  # the judge likes length in the gamed baselines' answers as in the model's
    found = length_controlled(world.rows, world.write(tmp_path / "df_gamed.csv"))
    assert found.win_rate == pytest.approx(world.truth, abs=1)
    assert win_rate(world.rows).win_rate > world.truth + 15  # what longer answers make of it


def test_difficulty_goes_by_index(alpaca_eval, tmp_path):
    world = World(n=300)
    path = world.write(tmp_path / "df_gamed.csv")
    whole = length_controlled(world.rows, path).win_rate
    numbered = [{**r, "index": i} for i, r in enumerate(world.rows)]
    assert length_controlled(numbered, path).win_rate == whole
    assert length_controlled(numbered, tmp_path).win_rate == whole  # its folder will do
    part = numbered[200:]
    with_index, shifted = length_controlled(part, path).win_rate, [{**r, "index": i} for i, r in enumerate(part)]
    assert abs(with_index - length_controlled(shifted, path).win_rate) > 0.1
    assert "no column index" in length_controlled(world.rows[200:], path).reason
    assert "no difficulty for instruction 300" in length_controlled([*numbered, {**numbered[0], "index": 300}], path).reason


def test_seeds_are_averaged(alpaca_eval, tmp_path):
    worlds = [World(n=200, seed=0), World(n=200, seed=0, c=1.0)]
    path = worlds[0].write(tmp_path / "df_gamed.csv")
    one, two = (length_controlled(w.rows, path).win_rate for w in worlds)
    both = [{**r, "seed": s, "index": i} for s, w in enumerate(worlds) for i, r in enumerate(w.rows)]
    assert abs(one - two) > 10
    assert length_controlled(both, path).win_rate == pytest.approx((one + two) / 2)


def test_length_control_leaves_no_traces(alpaca_eval, tmp_path):
    import logging
    from importlib.util import find_spec

    import sklearn

    world, fetch = World(n=100), alpaca_eval.hf_hub_download
    before = (sklearn.get_config(), logging.getLogger().level)
    assert length_controlled(world.rows, world.write(tmp_path / "df_gamed.csv")).win_rate is not None
    assert (sklearn.get_config(), logging.getLogger().level) == before
    assert alpaca_eval.hf_hub_download is fetch
    assert not (Path(find_spec("alpaca_eval").origin).parent / "metrics" / "weights").exists()


def test_without_difficulty_the_error_names_the_file(alpaca_eval, tmp_path, monkeypatch):
    monkeypatch.delenv(length_control.ENVIRONMENT, raising=False)
    world, calls = World(n=50), []

    def away(**given):
        calls.append(given)
        assert (given["repo_id"], given["filename"]) == ("tatsu-lab/alpaca_eval", "df_gamed.csv")
        raise OSError("no network")

    monkeypatch.setattr(alpaca_eval, "hf_hub_download", away)
    found = [length_controlled(world.rows) for _ in range(2)][-1]
    assert found.win_rate is None and len(calls) == 1  # the hub's client retries for half a minute
    for word in ("df_gamed.csv", "tatsu-lab/alpaca_eval", "--difficulty", length_control.ENVIRONMENT, "no network", "plain win rate"):
        assert word in found.reason
    monkeypatch.setenv(length_control.ENVIRONMENT, str(world.write(tmp_path / "df_gamed.csv")))
    assert length_controlled(world.rows).win_rate is not None


def test_without_alpaca_eval_the_error_names_the_package(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "alpaca_eval.metrics", None)
    world = World(n=20)
    assert "pip install 'ivg[alpaca]'" in length_controlled(world.rows, world.write(tmp_path / "df_gamed.csv")).reason


def test_unusable_difficulties_are_errors(tmp_path, alpaca_eval):
    world = World(n=20)
    with pytest.raises(ConfigError, match="cannot read the difficulty file"):
        length_controlled(world.rows, tmp_path / "absent.csv")
    short = world.write(tmp_path / "instruction_difficulty.csv", columns=("index", "instruction_difficulty"))
    with pytest.raises(ConfigError, match="no column preference"):
        length_controlled(world.rows, short)
    path = world.write(tmp_path / "df_gamed.csv")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(ConfigError, match="in order"):
        length_controlled(world.rows, path)
    world.write(path)
    assert "5 or more judgements" in length_controlled([row(1.2, index=0), row(1.8, index=1)], path).reason


# Judges

GOOD = "good"


class Endpoint:
    """A local server that speaks as OpenAI's: prefers the answer with GOOD in it, else the first."""

    def __init__(self):
        self.logprobs, self.refuses, self.fails, self.text, self.sure = True, set(), [], None, 0.8
        self.requests, self.lock = [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                status, body = outer.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))), self.headers, self.path)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after", "0")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, body, headers, path):
        with self.lock:
            self.requests.append({**body, "key": headers.get("authorization"), "path": path})
            status = self.fails.pop(0) if self.fails else 200
        if status != 200:
            return status, {"error": {"message": "come back later"}}
        for name in sorted(self.refuses & set(body)):
            return 400, {"error": {"message": f"Unsupported parameter: '{name}'"}}
        prompt = body["messages"][-1]["content"]
        if "TOO LONG" in prompt:
            return 400, {"error": {"message": "context length exceeded"}}
        letters = ("A", "B") if "answer A" in prompt else ("m", "M")
        second = prompt.rsplit("answer B" if letters == ("A", "B") else '"M"', 2)[-2 if letters == ("A", "B") else -1]
        best = letters[GOOD in second]
        other = letters[best == letters[0]]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": best if self.text is None else self.text},
        }
        if self.logprobs and body.get("logprobs"):
            top = [(best, self.sure), (other, (1 - self.sure) / 2), (f" {other}", (1 - self.sure) / 2)]
            tokens = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}], "refusal": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}


@pytest.fixture
def endpoint():
    pytest.importorskip("openai", reason="openai is not installed: pip install 'ivg[alpaca]'")
    server = Endpoint()
    yield server
    server.server.shutdown()
    server.server.server_close()


def judge(endpoint, **settings):
    return ChatJudge("m1", endpoint.url, **{"timeout": 60, "retries": 2, **settings})


PAIRS = [Pair(f"Say something nice, number {i}", f"{'bad' if i % 3 else GOOD} {i}", f"{GOOD if i % 3 else 'bad'} {i}") for i in range(24)]


def test_an_endpoint_judges_by_log_probabilities(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    found = judge(endpoint, key_variable="MY_KEY").compare(PAIRS)
    assert [v.preference for v in found] == [pytest.approx(1.8 if i % 3 else 1.2) for i in range(24)]
    prompts = sorted(a["messages"][0]["content"] for a in endpoint.requests)
    assert all(a["path"] == "/v1/chat/completions" and a["model"] == "m1" and a["key"] == "Bearer sesame" for a in endpoint.requests)
    shown_first = sum(f"answer A =====\n{p.reference}\n" in text for p in PAIRS for text in prompts)
    assert 4 <= shown_first <= 20  # neither always first
    from zlib import crc32

    assert shown_first == sum(uniform(0, crc32(p.instruction.encode())) >= 0.5 for p in PAIRS)
    assert not any("{first}" in t or "{second}" in t or "{instruction}" in t for t in prompts)


def test_a_liking_for_the_first_place_cancels(endpoint):
    same = [Pair(f"instruction {i}", "red", "blue") for i in range(200)]  # the endpoint then always says A
    found = [v.preference for v in judge(endpoint, concurrency=8).compare(same)]
    assert {round(p, 6) for p in found} == {1.2, 1.8}
    assert abs(np.mean(found) - 1.5) < 0.06


def test_texts_cannot_fill_the_template(endpoint):
    judge(endpoint).compare([Pair("x", "{second}", "{first} {instruction}")])
    text = endpoint.requests[0]["messages"][0]["content"]
    assert text.count("{second}") == 1
    assert text.count("{first} {instruction}") == 1


def test_without_log_probabilities_the_letter_counts(endpoint):
    endpoint.logprobs = False
    assert [v.preference for v in judge(endpoint).compare(PAIRS)] == [2.0 if i % 3 else 1.0 for i in range(24)]
    endpoint.text = "Both are fine."
    assert judge(endpoint).compare(PAIRS[:1]) == [Verdict(None, "Both are fine.")]


def test_options_that_an_endpoint_refuses_are_left_out(endpoint):
    endpoint.refuses = {"logprobs", "max_tokens", "temperature"}
    asking = judge(endpoint)
    assert [v.preference for v in asking.compare(PAIRS)] == [2.0 if i % 3 else 1.0 for i in range(24)]
    assert {k for k in endpoint.requests[-1] if k not in ("key", "path")} == {"messages", "model", "max_completion_tokens"}
    assert asking.settings() == judge(endpoint).settings()


def test_requests_to_a_busy_endpoint_are_retried(endpoint):
    endpoint.fails = [429, 500]
    assert judge(endpoint, concurrency=1).compare(PAIRS[:1])[0].preference == pytest.approx(1.2)
    assert len(endpoint.requests) == 3
    endpoint.fails = [500] * 3
    with pytest.raises(JudgeError, match="run the same command again"):
        judge(endpoint, concurrency=1).compare(PAIRS[:1])
    endpoint.fails = [401]
    with pytest.raises(JudgeError, match="m1"):
        judge(endpoint, concurrency=1).compare(PAIRS[:1])
    with pytest.raises(JudgeError, match="no answer from m1"):
        ChatJudge("m1", "http://127.0.0.1:9/v1", retries=0, timeout=2).compare(PAIRS[:1])


def test_one_question_that_is_refused_is_no_verdict(endpoint):
    long = Pair("TOO LONG", "a", "b")
    found = judge(endpoint, concurrency=1).compare([PAIRS[0], long, PAIRS[1]])
    assert [v.preference for v in found] == [pytest.approx(1.2), None, pytest.approx(1.8)]
    with pytest.raises(JudgeError, match="context length"):
        judge(endpoint, concurrency=1).compare([long])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        *[
            (t, 1)
            for t in (" b.", "**B**", "Answer B", "The better answer is B.", "Answer: (B)", "<think>A? no</think>\nB", "Because.\n\nB")
        ],
        ("Verdict: A", 0),
        *[(t, None) for t in ("", "A careful reader would like both", "B is worse than A", "neither", "Bravo", "A or B")],
    ],
)
def test_letters(endpoint, reply, expected):
    """As a plain letter counts; None: as no verdict."""
    endpoint.logprobs, preferences = False, {}
    for endpoint.text in ("A", "B", reply):
        (preferences[endpoint.text],) = (v.preference for v in judge(endpoint).compare(PAIRS[:1]))
    assert {preferences["A"], preferences["B"]} == {1.0, 2.0}
    assert preferences[reply] == (None if expected is None else preferences["AB"[expected]])


def test_alpaca_evals_annotators(endpoint, monkeypatch):
    pytest.importorskip("alpaca_eval", reason="alpaca_eval is not installed: pip install 'ivg[alpaca]'")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    asking = AlpacaEvalJudge()
    assert asking.name == "weighted_alpaca_eval_gpt4_turbo"
    found = [v.preference for v in asking.compare(PAIRS)]
    assert found == [pytest.approx(1.8 if i % 3 else 1.2, abs=0.12) for i in range(24)]
    assert {a["model"] for a in endpoint.requests} == {"gpt-4-1106-preview"}
    endpoint.fails = [401]
    with pytest.raises(JudgeError, match="weighted_alpaca_eval_gpt4_turbo failed"):
        asking.compare([Pair("new", "a", "b")])
    with pytest.raises(ConfigError, match="no annotators"):
        AlpacaEvalJudge("no_such_annotators")


class Lengths(Reward):
    """A reward model that likes length."""

    name, template, label = "length", None, None
    calls = 0

    def judge(self, pairs):
        self.calls += len(pairs)
        return [float(len(response)) for _, response in pairs]


def test_a_reward_model_judges():
    reward = Lengths()
    asking = RewardJudge(reward)
    pairs = [Pair("?", "aa", "aaa"), Pair("?", "aa", "a"), Pair("?", "aa", "bb"), Pair("?", "a" * 5000, "")]
    found = [v.preference for v in asking.compare(pairs)]
    assert found == [pytest.approx(1 + sigmoid(1), abs=1e-6), pytest.approx(1 + sigmoid(-1), abs=1e-6), 1.5, 1.0]
    assert reward.calls == 4 + 2
    asking.compare(pairs)
    assert reward.calls == 4 + 2 + 4  # references are read once


# Judgements, and their resumption


class Counting:
    name = "counting"

    def __init__(self, breaks_after=10**9):
        self.seen, self.breaks_after = [], breaks_after

    def compare(self, pairs):
        if len(self.seen) >= self.breaks_after:
            raise JudgeError("away")
        self.seen += pairs
        return [Verdict(1 + uniform(7, len(p.answer)), "B") for p in pairs]

    def settings(self):
        return {"judge": self.name}


def many(n):
    return [{"id": str(i), "instruction": f"i{i}", "output_1": f"r{i}", "output_2": "x" * (i + 1)} for i in range(n)]


def test_judging_goes_on_where_it_stopped(tmp_path):
    whole = judge_all(Counting(), many(20), tmp_path / "whole.jsonl", block=4)
    first, path = Counting(breaks_after=8), tmp_path / "parts" / "a.jsonl"
    with pytest.raises(JudgeError):
        judge_all(first, many(20), path, block=4)
    with path.open("a") as file:
        file.write('{"id": "8", "torn')
    rest = Counting()
    assert judge_all(rest, many(20), path, block=4) == whole
    assert [p.instruction for p in first.seen + rest.seen] == [f"i{i}" for i in range(20)]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert judge_all(Counting(breaks_after=0), many(20), path, block=4) == whole  # nobody is asked
    more = Counting()
    assert judge_all(more, many(30), path, block=4)[:20] == whole  # a seed more
    assert len(more.seen) == 10


def test_judgements_of_other_answers_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    judge_all(Counting(), many(4), path)
    other = [{**r, "output_2": "changed"} for r in many(4)]
    with pytest.raises(ConfigError, match="line 1: judgement of another answer"):
        judge_all(Counting(), other, path)
    another = Counting()
    another.settings = lambda: {"judge": "another"}
    with pytest.raises(ConfigError, match="settings differ"):
        judge_all(another, many(4), path)


def test_equal_and_empty_answers_need_no_judge(tmp_path):
    asking = Counting()
    rows = [{"instruction": "i", "output_1": a, "output_2": b} for a, b in (("x", "x"), ("x", " "), ("", "y"), ("x", "y"))]
    found = judge_all(asking, rows, tmp_path / "a.jsonl")
    assert [r["preference"] for r in found[:3]] == [1.5, 1.0, 2.0]
    assert [p.answer for p in asking.seen] == ["y"]


# The task


@pytest.fixture
def instructions(tmp_path):
    rows = [
        {"dataset": "d", "instruction": f"Do {i}", "output": f"Reference {'long ' * (i % 5)}{i}", "generator": "gpt"} for i in range(12)
    ]
    path = tmp_path / "data.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path, rows


def config(path, **options):
    return EvalConfig(task="alpaca", data=str(path), options=options)


def test_examples(instructions):
    path, rows = instructions
    found = Alpaca().examples(config(path))
    assert [e.prompt.content for e in found] == [r["instruction"] for r in rows]
    assert found[3].reference == rows[3]["output"]
    assert found[3].extra == {"index": 3, "dataset": "d", "generator": "gpt", "alpaca_eval": False}
    part = Alpaca().examples(EvalConfig(task="alpaca", data=str(path), prompts=5, shuffle=1))
    assert len(part) == 5
    assert [e.id for e in part] != ["0", "1", "2", "3", "4"]
    assert all(rows[e.extra["index"]]["instruction"] == e.prompt.content for e in part)


def test_the_805_instructions_are_known():
    found = Alpaca().examples(config(published("reference_outputs_gpt4_1106_preview.json.gz")))
    assert len(found) == 805
    assert hashlib.sha256("\0".join(e.prompt.content for e in found).encode()).hexdigest()[:16] == INSTRUCTIONS
    assert all(e.extra["alpaca_eval"] and e.extra["generator"] == "gpt4_1106_preview" for e in found)


def test_the_hub_is_the_default(monkeypatch, instructions):
    import huggingface_hub

    path, rows = instructions
    calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: calls.append((a, k)) or str(path))
    assert len(Alpaca().examples(EvalConfig(task="alpaca"))) == len(rows)
    assert calls == [(("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"), {"repo_type": "dataset"})]

    def away(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", away)
    with pytest.raises(ConfigError, match=r"no network\n.*--data FILE"):
        Alpaca().examples(EvalConfig(task="alpaca"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jugde": "openai"}, "jugde.*known: judge"),
        ({"judge": "gpt"}, "judge"),
        ({"judge": "reward"}, "option reward"),
        ({"judge": "openai"}, "IVG_JUDGE_MODEL"),
        ({"concurrency": "0"}, "concurrency"),
    ],
)
def test_unusable_options_are_errors(instructions, monkeypatch, options, says):
    monkeypatch.delenv("IVG_JUDGE_MODEL", raising=False)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        Alpaca().examples(config(instructions[0], **options))


def test_unusable_data_are_errors(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"instruction": "a"}]')
    assert len(Alpaca().examples(config(path))) == 1
    with pytest.raises(ConfigError, match="row 1: no output"):
        Alpaca().examples(config(path, judge="alpaca_eval"))
    path.write_text('[{"prompt": "a"}]')
    with pytest.raises(ConfigError, match="row 1: no instruction; got prompt"):
        Alpaca().examples(config(path))


def answers(examples, seeds=1):
    return [
        Answer(e, s, f"  Answer {'more ' * ((i + s) % 7)}{GOOD if i % 3 else ''}\n", "too long" if i == 7 else None)
        for s in range(seeds)
        for i, e in enumerate(examples)
    ]


def test_model_outputs_are_alpaca_evals(tmp_path, instructions):
    path, rows = instructions
    task = Alpaca()
    task.export(tmp_path, "ivg", answers(task.examples(config(path)), seeds=2))
    found = json.loads((tmp_path / "model_outputs" / "ivg.json").read_text())
    assert all(list(r) == ["dataset", "instruction", "output", "generator"] for r in found)
    assert [r["instruction"] for r in found] == [r["instruction"] for r in rows]
    assert {r["generator"] for r in found} == {"ivg"}
    assert found[1]["output"] == "Answer more good"
    assert found[7]["output"] == ""
    assert json.loads((tmp_path / "model_outputs" / "ivg-seed1.json").read_text())[1]["output"] == "Answer more more good"
    assert json.loads((tmp_path / "reference_outputs.json").read_text()) == rows


def test_alpaca_eval_reads_them(tmp_path, instructions, endpoint, monkeypatch):
    pytest.importorskip("alpaca_eval", reason="alpaca_eval is not installed: pip install 'ivg[alpaca]'")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    task = Alpaca()
    task.export(tmp_path, "ivg", answers(task.examples(config(instructions[0]))))
    with length_control.suppress_logs():
        from alpaca_eval import evaluate

        table, annotations = evaluate(
            model_outputs=str(tmp_path / "model_outputs" / "ivg.json"),
            reference_outputs=str(tmp_path / "reference_outputs.json"),
            fn_metric="get_winrate",
            sort_by="win_rate",
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            caching_path=None,
        )
    assert table.loc["ivg", "n_total"] == 12
    assert win_rate(annotations).win_rate == pytest.approx(table.loc["ivg", "win_rate"])


def test_an_endpoint_measures_the_task(tmp_path, instructions, endpoint, monkeypatch):
    monkeypatch.setenv("IVG_JUDGE_MODEL", "m2")
    task, settings = Alpaca(), config(instructions[0], judge="openai", base_url=endpoint.url, concurrency="2")
    given = answers(task.examples(settings), seeds=2)
    found = task.measure(settings, tmp_path, "ivg", given)
    rows = list(read_jsonl(tmp_path / "judgements" / "ivg.jsonl"))
    assert [r["id"] for r in rows] == [str(i) for i in range(12)] * 2
    assert rows[7]["preference"] == 1.0  # failed: lost, and not asked about
    assert len(endpoint.requests) == 22
    assert all(r["annotator"] == "chat:m2" for r in rows)
    wins = [1.8 if i % 3 else None for i in range(12)]
    assert all(r["preference"] == pytest.approx(w) for r, w in zip(rows, wins, strict=False) if w and r["id"] != "7")
    assert found["judged_win_rate"] == pytest.approx(win_rate(average_over_seeds(rows)).win_rate)
    assert "not AlpacaEval's 805" in found["length_control"]
    assert task.measure(settings, tmp_path, "ivg", given) == found
    assert len(endpoint.requests) == 22


def test_own_difficulties_control_length(tmp_path, instructions, alpaca_eval):
    world = World(n=12)
    difficulty = world.write(tmp_path / "df_gamed.csv")
    settings = config(instructions[0], judge="reward", reward="unused", difficulty=str(difficulty))
    task = Alpaca()
    task.judge = lambda options: RewardJudge(Lengths())
    found = task.measure(settings, tmp_path, "ivg", answers(task.examples(settings)))
    assert 0 < found["length_controlled_win_rate"] < 100
    assert "length_control" not in found


# The command


def test_the_command(tmp_path, ivg, monkeypatch, alpaca_eval):
    world = World(n=200)
    difficulty, judgements = world.write(tmp_path / "df_gamed.csv"), tmp_path / "judgements.json"
    judgements.write_text(json.dumps(world.rows))
    run = partial(ivg, "winrate", columns=120)
    code, out, _ = run(judgements, "--difficulty", difficulty, "--output", tmp_path / "out.json")
    (saved,) = json.loads((tmp_path / "out.json").read_text())
    rate, lc = win_rate(world.rows), length_controlled(world.rows, difficulty)
    assert code == 0
    cells = (rate.win_rate, rate.standard_error, rate.discrete_win_rate, lc.win_rate, lc.standard_error)
    assert re.search("model +" + " +".join(f"{x:.2f}" for x in cells) + f" +{rate.avg_length:.0f} +200", out)
    assert saved["win_rate"] == pytest.approx(rate.win_rate)
    assert saved["length_controlled_winrate"] == pytest.approx(lc.win_rate)
    code, out, _ = run(judgements, "--plain")
    assert code == 0
    assert f"{rate.win_rate:.2f}" in out
    assert "length-controlled win rate" not in out

    def away(**_):
        raise OSError("no network")

    monkeypatch.setattr(alpaca_eval, "hf_hub_download", away)
    code, out, err = run(judgements)
    assert code == 0
    assert f"{rate.win_rate:.2f}" in out
    assert "df_gamed.csv" in err
    code, _, err = run(judgements, "--difficulty", tmp_path / "absent.csv")
    assert code
    assert "cannot read the difficulty file" in err


def test_all_stages(tmp_path, instructions):
    """Embedded models, a reward model as judge: files, figures in the report, and nothing judged twice."""
    from ivg.evaluation.plan import make_plan
    from ivg.evaluation.runner import run
    from ivg.settings.recipe import Recipe

    settings = {"task": "alpaca", "data": str(instructions[0]), "prompts": 3, "seeds": 2, "methods": ["base", "eft"]}
    options = {"judge": "reward", "reward": "embedded:gold"}
    recipe = Recipe.parse({"eval": {**settings, "options": options}, "sampling": {"max_new_tokens": 6}, "run": {"batch_size": 2}})
    run(make_plan(recipe, tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["methods"]) == {"base", "eft"}
    for label, figures in results["methods"].items():
        rows = list(read_jsonl(tmp_path / "out" / "judgements" / f"{label}.jsonl"))
        transcripts = list(read_jsonl(tmp_path / "out" / "transcripts" / f"{label}.jsonl"))
        assert [(r["id"], r["seed"], r["output_2"]) for r in rows] == [(t["id"], t["seed"], t["text"].strip()) for t in transcripts]
        assert figures["task"]["judged_win_rate"] == pytest.approx(win_rate(average_over_seeds(rows)).win_rate)
        written = json.loads((tmp_path / "out" / "model_outputs" / f"{label}.json").read_text())
        assert [w["output"] for w in written] == [r["output_2"] for r in rows[:3]]
    assert "judged win rate" in (tmp_path / "out" / "report.md").read_text()
    before = {p: p.read_bytes() for p in (tmp_path / "out" / "judgements").iterdir()}
    run(make_plan(recipe, tmp_path / "out"), ["score"])
    assert {p: p.read_bytes() for p in (tmp_path / "out" / "judgements").iterdir()} == before


def test_without_gold_the_judge_s_win_rate_is_drawn(tmp_path, instructions):
    """Models are named, so there is no gold: methods are in the order of their win rates, which are the figures' heights."""
    from ivg.evaluation.figures import order
    from ivg.evaluation.plan import make_plan
    from ivg.evaluation.runner import run
    from ivg.settings.recipe import Recipe

    options = {"judge": "reward", "reward": "embedded:gold"}
    settings = {"task": "alpaca", "data": str(instructions[0]), "prompts": 4, "methods": ["base", "eft"], "options": options}
    models = {role: f"embedded:{role}" for role in ("base", "tuned", "untuned")}
    sampling = {"max_new_tokens": 8, "top_k": 0}
    run(make_plan(Recipe.parse({"models": models, "eval": settings, "sampling": sampling}), tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["judges"] == []
    assert results["primary"] == "judged_win_rate"
    rates = {k: m["task"]["judged_win_rate"] for k, m in results["methods"].items()}
    assert order(results) == sorted(rates, key=lambda k: -rates[k])
    for m in results["methods"].values():
        half = 1.96 * m["task"]["judged_standard_error"]
        assert m["primary"]["high"] == pytest.approx(m["task"]["judged_win_rate"] + half)
    assert {p.name for p in (tmp_path / "figures").iterdir()} >= {"reward-kl.svg", "reward-compute.svg"}
    assert "judged win rate" in (tmp_path / "figures" / "reward-kl.svg").read_text()
    changed = make_plan(
        Recipe.parse({"models": models, "eval": {**settings, "options": options | {"label": 1}}, "sampling": sampling}), tmp_path
    )
    with pytest.raises(ConfigError, match="metrics of other settings"):
        run(changed, ["report"])
    silent = make_plan(Recipe.parse({"models": models, "eval": {**settings, "options": {}}, "sampling": sampling}), tmp_path)
    run(silent, ["score", "report"])
    assert not list((tmp_path / "scores").glob("*.task.json"))
