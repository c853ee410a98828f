"""Rows of chats: variables of the chat template for each row, and the thinking of rollouts in a column of its own."""

import json

import pytest

from ivg.errors import ConfigError
from ivg.jobs.prompts import prompt_key, prompt_of
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.settings.chat import ChatSettings
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.training.data import read_preferences, read_prompts, read_rated, read_sft_examples
from ivg.training.encoding import encode_rated
from ivg.training.rollout import rollout
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines
from ivg.utils.rng import as_seed, mix
from ivg.values.base import FunctionValue

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
NEW = 6


@pytest.fixture
def base(tmp_path):
    lm = tiny_lm("base", seed=3)
    lm.tokenizer.chat_template = TEMPLATE
    for part in (lm.network, lm.tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def written(path, rows):
    path.write_text(as_lines(rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(ivg, base, source, output, *more):
    settings = ("--base", base, "--method", "base", "--max-new-tokens", NEW, "--dtype", "float32", "--device", "cpu", "--seed", 1)
    return ivg("generate", *settings, "--input", source, "--output", output, *more)


def test_each_row_is_read_with_its_own_variables(ivg, base, tmp_path):
    variants = [OFF, ON, None, json.dumps(OFF)]  # a text: as CSV has it
    rows = [{"id": i, "messages": HI, "chat_template_kwargs": k} for i, k in enumerate(variants)]
    code, _, err = run(ivg, base, written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert code == 0, err
    model, found = GuidedModel.from_pretrained(base, options=LoadOptions(device="cpu", dtype="float32")), read(tmp_path / "out.jsonl")
    again = as_seed(mix(1, 1))  # the last row asks what the first asks
    for kwargs, row, seed in zip((OFF, ON, {}, OFF), found, (1, 1, 1, again), strict=True):
        settings = {"temperature": 0.7, "max_new_tokens": NEW, "seed": seed}
        expected = model.generate(HI, "base", chat_template_kwargs=kwargs, **settings)
        assert row["token_ids"] == list(expected.token_ids) and row["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert [row.get("chat_template_kwargs") for row in found] == variants
    assert found[0]["usage"]["prompt_tokens"] > found[1]["usage"]["prompt_tokens"]


def test_a_row_with_other_variables_is_answered_again(ivg, base, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {"id": 1, "messages": HI, "chat_template_kwargs": OFF}
    assert run(ivg, base, written(source, [row]), output)[0] == 0
    assert "already done 1" in run(ivg, base, written(source, [row | {"chat_template_kwargs": json.dumps(OFF)}]), output)[2]
    err = run(ivg, base, written(source, [row | {"chat_template_kwargs": ON}]), output)[2]
    assert "prompts have changed under the same id" in err and "answered 1" in err
    on, off, none = ({"chat_template_kwargs": kwargs} for kwargs in (ON, OFF, None))
    assert prompt_key(HI) == prompt_key(HI, {}) == prompt_key(HI, none) != prompt_key(HI, on) != prompt_key(HI, off)


def test_rows_without_an_id_are_told_apart_by_their_variables(ivg, base, tmp_path):
    rows = [{"messages": HI, "chat_template_kwargs": k} for k in (OFF, ON)]
    outputs = []
    for order in (rows, rows[::-1]):
        outputs.append(tmp_path / f"{len(outputs)}.jsonl")
        assert run(ivg, base, written(tmp_path / "in.jsonl", order), outputs[-1])[0] == 0
    first, second = ({row["id"]: row["token_ids"] for row in read(path)} for path in outputs)
    assert first == second and len(first) == 2


def test_unusable_variables_fail_their_row_alone(ivg, base, tmp_path):
    bad = ["{enable", [1], {"tokenize": True}, 3]
    rows = [{"messages": HI, "chat_template_kwargs": k} for k in bad] + [{"prompt": "a text", "chat_template_kwargs": ON}, {"messages": HI}]
    code, _, err = run(ivg, base, written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert code == 1 and len(read(tmp_path / "out.jsonl")) == 1
    assert err.count("chat_template_kwargs must be") == len(bad)
    assert "in.jsonl, line 5: chat_template_kwargs, but the base reads this prompt in no chat template" in err


def test_rows_of_training_have_variables(tmp_path):
    row = {"prompt": HI, "chat_template_kwargs": OFF}
    wanted = Prompt(Prompt.of(HI).content, chat=ChatSettings(chat_template_kwargs=OFF))
    path = tmp_path / "rows.jsonl"
    assert read_prompts(written(path, [row, row | {"chat_template_kwargs": ON}]))[0] == wanted == prompt_of(row)
    assert len(read_prompts(path)) == 2
    assert read_rated(written(path, [row | {"response": "a", "score": 1}]))[0].prompt == wanted
    assert read_sft_examples(written(path, [row | {"response": "a"}]))[0].prompt == wanted
    assert (
        read_sft_examples(written(path, [{"messages": [*HI, {"role": "assistant", "content": "a"}], "chat_template_kwargs": OFF}]))[
            0
        ].prompt
        == wanted
    )
    assert read_preferences(written(path, [row | {"chosen": "a", "rejected": "b"}]))[0].prompt == wanted
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (encoded,) = encode_rated(read_rated(written(path, [row | {"response": "a", "score": 1}])), tokenizer, "chat", 100)
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]) == "<user>Hi\n<assistant><think></think>"


def test_rollouts_keep_the_variables_of_their_prompts(base, tmp_path):
    seen = []
    model = GuidedModel.from_pretrained(base)
    prompts = [prompt_of({"messages": HI, "chat_template_kwargs": k}) for k in (OFF, None)]
    reward = FunctionValue(lambda prompt, response: seen.append(prompt) or 1.0, "mine")

    def go(these):
        return rollout(model, these, tmp_path / "r.jsonl", reward, samples=1, max_new_tokens=NEW)

    rows = read(go(prompts))
    assert [row.get("chat_template_kwargs") for row in rows] == [OFF, None]
    assert [row.prompt for row in read_rated(tmp_path / "r.jsonl")] == prompts
    assert read(go(prompts)) == rows
    with pytest.raises(ConfigError, match="row 1: answers another prompt than this run"):
        go(prompts[::-1])


@pytest.fixture(scope="module")
def thinker():
    return GuidedModel(tiny_lm("base", seed=1), {"explicit": tiny_value(seed=5)})


@pytest.mark.parametrize("read_", ["answer", "all"])
def test_rollouts_of_models_that_think(thinker, tmp_path, read_):
    """The response is what values read; the thinking has a column of its own."""
    prompts, seen = [Prompt(p) for p in ("The movie was", "I have")], []
    reward = FunctionValue(lambda prompt, response: seen.append(response) or float(len(response)), "mine")
    settings = {"guide_after": "</t>", "thinking_budget": 5, "values_read": read_, "max_new_tokens": 20, "ignore_eos": True}
    rows = read(rollout(thinker, prompts, tmp_path / "r.jsonl", reward, method="base", samples=2, **settings))
    for row in rows:
        prompt = Prompt(row["prompt"])
        text = thinker.base.vocabulary.response_text(thinker.base.prompt_ids(prompt), row["token_ids"])
        assert row["reasoning_content"] and text == row["response"] and row["score"] == len(text)
        assert ("</t>" in row["response"]) == (read_ == "all")
        whole = row["response"] if read_ == "all" else f"{row['reasoning_content']}</t>{row['response']}"
        assert whole.startswith(f"{row['reasoning_content']}</t>") and (len(row["token_ids"]) < 20) == (read_ == "answer")
    assert seen == [row["response"] for row in rows]
    (first, *_) = encode_rated(read_rated(tmp_path / "r.jsonl"), thinker.base.tokenizer, None, 100)
    assert first.ids[first.prompt_length :] == rows[0]["token_ids"]


def test_rollouts_without_an_answer_have_an_error(thinker, tmp_path):
    reward = FunctionValue(lambda prompt, response: 1.0, "mine")
    (row,) = read(rollout(thinker, [Prompt("I")], tmp_path / "r.jsonl", reward, samples=1, guide_after="no such text", max_new_tokens=4))
    assert row["error"].startswith("no answer: 'no such text' (guide_after) has not come; give a thinking_budget")
    assert row["reasoning_content"] and "response" not in row and "score" not in row
