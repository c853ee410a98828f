"""What files of rollouts keep: scores of any scale, and prompts in Parquet as they were."""

import json

import numpy as np
import pytest

from ivg.diagnostics.pairs import pair_accuracy
from ivg.diagnostics.ranking import ScoredPairs, pair_accuracies
from ivg.jobs.prompts import prompt_of
from ivg.model import GuidedModel
from ivg.testing import tiny_lm
from ivg.training import rollout as rollouts
from ivg.training.data import read_prompts, read_rated
from ivg.types import Preference, Prompt
from ivg.utils.jsonl import read_jsonl
from ivg.utils.rounding import keep_digits
from ivg.values.base import FunctionValue

TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name, **arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def test_scores_of_any_scale_keep_six_digits(tmp_path):
    scores = iter([1.23456789e-7, 1.23459e-7, -3.2e-9, 0.0, 1234567.891, 12.34567])
    reward = FunctionValue(lambda prompt, response: next(scores), "mine")
    model, settings = GuidedModel(tiny_lm("base")), {"samples": 6, "max_new_tokens": 2, "ignore_eos": True}
    out = rollouts.rollout(model, [Prompt("I")], tmp_path / "r.jsonl", reward, **settings)
    found = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    assert found == [1.23457e-7, 1.23459e-7, -3.2e-9, 0.0, 1234567.891, 12.3457]


def test_rounding_is_never_coarser_than_the_decimals():
    for number in (0.0, 1.0, -1 / 3, 2e-5, 99999.123456, 1e300, 5e-324):
        assert abs(keep_digits(number, 4) - number) <= min(0.5e-4, 0.51e-5 * abs(number) + 5e-324)
    assert np.isnan(keep_digits(np.nan, 4)) and keep_digits(-np.inf, 4) == -np.inf


def test_pairs_of_a_reward_of_small_scale_are_no_ties():
    pairs = [Preference(Prompt(f"p{i}"), "a", "b") for i in range(40)]
    scores = np.zeros((40, 4, 2))
    scores[:, 1:, 0] = 1e-6  # the chosen one is better, but for its beginning, which is the same
    scores[:, 0, 0] = 1e-9
    found = pair_accuracy("small", scores, pairs, {"words": np.ones((40, 2))})
    assert [p.rate for p in found.accuracy] == [0.5, 1, 1, 1]
    better, worse = np.arange(0, 80, 2), np.arange(1, 80, 2)
    scored = ScoredPairs(better, worse, np.ones(40), np.arange(40))
    rewards = {"reward": np.tile([1e-6, 0.0], 40)}
    assert pair_accuracies(scored, np.ones(80), rewards)["pairs"]["reward"]["rate"] == 1.0


CHATS = {
    "tools": [
        {"prompt": HI, "tools": [tool("f", a={"type": "string"})]},
        {"prompt": HI, "tools": [tool("g", b={"type": "integer"}, c={"type": "string", "enum": ["x"]})]},
        {"prompt": HI, "chat_template_kwargs": {"enable_thinking": False}},
    ],
    "messages of several forms": [
        {"prompt": HI},
        {"prompt": "Hi"},
        {"prompt": [*HI, call("f", a=1), {"role": "tool", "content": "2"}]},
        {"prompt": [*HI, call("g", b="x"), {"role": "tool", "content": "2"}]},
    ],
    "plain chats": [{"prompt": HI}, {"prompt": [{"role": "system", "content": "Be kind."}, *HI]}],
}


@pytest.mark.parametrize("name", CHATS)
def test_prompts_come_back_from_parquet_as_they_were(tmp_path, name):
    pytest.importorskip("pyarrow")
    prompts = [prompt_of(row) for row in CHATS[name]]
    lm = tiny_lm("base")
    lm.tokenizer.chat_template = TEMPLATE
    reward = FunctionValue(lambda prompt, response: 1.0, "mine")
    rollouts.rollout(GuidedModel(lm), prompts, tmp_path / "r.parquet", reward, samples=1, max_new_tokens=2, ignore_eos=True)
    assert not [row["error"] for row in read_jsonl(tmp_path / "r.jsonl") if "error" in row]
    assert read_prompts(tmp_path / "r.parquet") == prompts
    assert read_rated(tmp_path / "r.parquet") == read_rated(tmp_path / "r.jsonl")
    assert [row.prompt for row in read_rated(tmp_path / "r.parquet")] == prompts


def test_messages_that_hold_the_answer_are_no_prompt(tmp_path):
    row = {"prompt": None, "messages": [*HI, {"role": "assistant", "content": "a"}], "response": "a", "score": 1}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="no prompt, and messages end with the answer"):
        read_rated(tmp_path / "r.jsonl")
