"""Rewards and scores: what is read of texts that are too long, what is refused, and one bad score among good ones."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivg.errors import ConfigError, ModelError, PromptError, ScoreError, ScoreFault
from ivg.evaluation.judges import Pair, RewardJudge
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import FakeEngine, byte_tokenizer, hypothesis, tiny_lm, tiny_model, tiny_value
from ivg.training.rollout import rollout
from ivg.types import Message, Prompt, SamplingParams, TokenGuidance, Value
from ivg.types.scores import checked_scores, require_scores, score_each
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.reward import RewardModel
from ivg.values.truncation import drop_beginning, truncate_prompt

FLOAT32 = LoadOptions(dtype="float32")
SIZES = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def encoder(kind="bert", positions=40, **settings):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{**SIZES, "max_position_embeddings": positions, "num_labels": 1, "initializer_range": 0.5, **settings}
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def alone(network, ids):
    """What transformers itself says of one text."""
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits[0, 0].item()


# Texts that are too long

CHAT = Prompt(
    (Message("system", "Be kind. " * 3), Message("user", "Old. " * 8), Message("assistant", "Yes. " * 8), Message("user", "Last one?"))
)
CASES = {
    "text": (None, Prompt("A long question, with much before it. " * 4), ""),
    "format": ("Q: {prompt} A: {response}!", Prompt("A long question, with much before it. " * 4), "Q: "),
    "chat": ("chat", Prompt("A long question, with much before it. " * 4), "<user>"),
    "messages": (None, CHAT, "<user>"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_response_stays_whole_and_the_prompt_loses_its_beginning(case):
    template, prompt, begins = CASES[case]
    reward = RewardModel(encoder(positions=64, pad_token_id=0), byte_tokenizer(chat=True), template)
    good, bad = "it is truly good", "it is truly bad"
    ids = reward.read(prompt, good).ids
    text = reward.tokenizer.decode(ids)
    whole = reward.text(prompt, good)
    assert len(whole) > 64 and len(ids) == 64  # bytes are tokens: nothing is left out without need
    assert text.startswith(begins) and good in text and text.endswith(whole[-40:])
    assert reward.judge([(prompt, good), (prompt, bad)]) == pytest.approx(
        [alone(reward.network, reward.read(prompt, t).ids) for t in (good, bad)]
    )
    assert len(set(reward.judge([(prompt, good), (prompt, bad)]))) == 2


def test_special_tokens_of_a_cut_text_are_those_of_a_short_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A <eos>".replace("<eos>", tokenizer.eos_token), special_tokens=[("[CLS]", 257), (tokenizer.eos_token, 0)]
    )
    reward = RewardModel(encoder(positions=32, pad_token_id=0), tokenizer)
    ids = reward.read(Prompt("A question that goes on and on. "), "An answer.").ids
    assert (len(ids), ids[0], ids[-1]) == (32, 257, 0)
    assert reward.tokenizer.decode(ids[1:-1]).endswith(" An answer.")


def test_a_row_says_what_was_left_out_and_a_response_too_long_alone_is_an_error():
    model = GuidedModel(tiny_lm("base"), {"reward": RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer())})
    short, long = model.generate(["I", "x" * 40], "bon", successors=2, max_new_tokens=8, ignore_eos=True)
    note = "reward reads at most 32 tokens: the beginning of the prompt was left out"
    assert (short.notes, long.notes) == ((), (note,)) and long.score is not None
    assert json.loads(json.dumps(long.to_dict()))["notes"] == [note] and "notes" not in short.to_dict()
    reward = model.values["reward"]
    with pytest.raises(ScoreError, match=r"response 2 of 2: reward reads at most 32 tokens, and the response alone has 90") as e:
        model.score("I", ["fine", "y" * 90], "reward")
    assert e.value.scores[0] == pytest.approx(reward.judge([(Prompt("I"), "fine")])[0])
    failed = model.generate(["I", "x"], "bon", successors=2, max_new_tokens=60, ignore_eos=True)
    assert all("the response alone has" in c.error for c in failed)


@pytest.mark.parametrize("kind,offset", [("bert", 0), ("roberta", 2), ("xlm-roberta", 2), ("mpnet", 2), ("distilbert", 0), ("llama", 0)])
def test_limits_are_what_the_network_can_read(kind, offset):
    names = {"distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}}.get(kind, {})
    network = encoder(kind, 24, pad_token_id=1, **names)
    reward = RewardModel(network, byte_tokenizer())
    assert reward.limit == 24 - offset
    longest = (list(range(2, 30)) * 2)[: reward.limit]
    assert math.isfinite(reward.logits([longest])[0])
    if kind != "llama":
        with pytest.raises((IndexError, RuntimeError)):
            reward.logits([[*longest, 5]])


words = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.one_of(words, st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=5)),
    st.integers(0, 40),
)
def test_fitting_leaves_out_as_little_as_it_can(content, room):
    prompt = Prompt(content if isinstance(content, str) else tuple(Message(*m) for m in content))

    def size(p):
        return len(p.content) if isinstance(p.content, str) else sum(len(m.content) for m in p.content)

    whole = size(prompt)
    found = truncate_prompt(prompt, lambda p: size(p) <= room)
    if whole <= room:
        assert found == prompt
    elif found is not None:
        assert size(found) == room and found == drop_beginning(prompt, whole - room)
        if not isinstance(found.content, str):
            assert (
                found.content[0].role != "assistant"
                and found.content[-1].content == prompt.content[-1].content[-len(found.content[-1].content) :]
            )
    else:
        text = prompt.content if isinstance(prompt.content, str) else "".join(m.content for m in prompt.content)
        assert len(text) - len(text.rstrip()) + 1 > room or len(text.rstrip()) < 2


# Padding


@pytest.mark.parametrize("pad", [None, 0, 5])
def test_rows_of_a_batch_score_as_alone(pad):
    """Also those that end with the id of padding; and where tokenizer and network know neither padding nor an end."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(7)  # another one than the network's
    if pad is None:
        tokenizer.eos_token = tokenizer.bos_token = None
    network = encoder("llama", 64, pad_token_id=pad, bos_token_id=None, eos_token_id=None)
    rows = [[9, 8, 0], [4], [6, 7, 8, 9, 1], [3, 7, 7]]
    expected = [alone(network, row) for row in rows]
    assert RewardModel(network, tokenizer).logits(rows) == pytest.approx(expected, abs=1e-5)


# What is no reward


def saved(network, folder):
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_other_models_are_refused_with_the_option_they_belong_to(tmp_path):
    from transformers import LlamaForTokenClassification

    process = LlamaForTokenClassification(tiny_model("llama").config)
    torch.nn.init.constant_(process.score.bias, 5.0)
    value = tiny_value("vocabulary").network
    for name, network, said in [
        ("language", tiny_model("llama"), r"(?s)is a language model \(LlamaForCausalLM\).*would be random.*--arm; .*--tuned and --untuned"),
        ("gpt2", tiny_model("gpt2"), r"is a language model \(GPT2LMHeadModel\)"),
        ("tied", tiny_model("gemma3_text"), r"is a language model \(Gemma3ForCausalLM\)"),
        (
            "process",
            process,
            r"(?s)is a LlamaForTokenClassification: it scores every token .*process reward.*expected a sequence classifier",
        ),
        ("value", value, r"(?s)is a value network.*--value"),
    ]:
        with pytest.raises(ModelError, match=said):
            RewardModel.from_pretrained(saved(network, tmp_path / name), options=FLOAT32)
    config = json.loads((tmp_path / "process" / "config.json").read_text())
    (tmp_path / "process" / "config.json").write_text(json.dumps(config | {"architectures": None}))  # its bias tells
    with pytest.raises(ModelError, match=r"holds 1 weight \(score\.bias\) that LlamaForSequenceClassification does not use"):
        RewardModel.from_pretrained(tmp_path / "process", options=FLOAT32)


def test_labels_that_are_not_there():
    with pytest.raises(ConfigError, match=r"has 1 labels, got label=1"):
        RewardModel(encoder(pad_token_id=0), byte_tokenizer(), label=1)


# One bad score among good ones


def shout(prompt, response):
    answers = {"bad": ZeroDivisionError("secret"), "nan": math.nan, "inf": -math.inf, "none": None, "pair": torch.ones(2)}
    found = answers.get(prompt, len(response))
    if isinstance(found, Exception):
        raise found
    return found


WRONG = {
    "bad": "raised ZeroDivisionError: secret",
    "nan": "gave NaN: expected a finite number",
    "inf": "gave -infinity: expected a finite number",
    "none": "gave None: expected a number",
    "pair": "gave a Tensor of shape (2,): expected a number",
}


class Whole(Value):
    """A value that breaks off altogether where one hypothesis is bad, as users write them."""

    name = "whole"

    def __init__(self):
        self.calls = 0

    def score(self, hypotheses):
        self.calls += 1
        return torch.tensor([float(shout(str(h.prompt.content), h.text)) for h in hypotheses])


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("value", [FunctionValue(shout, "mine"), Whole()], ids=["function", "object"])
def test_search_fails_only_the_request_whose_score_is_bad(value, wrong):
    requests = [Request(Prompt(p), Search(value=value, successors=2), SamplingParams(max_new_tokens=3)) for p in ("ok", wrong, "fine")]
    engine = FakeEngine()
    good, bad, other = (c for _, c in sorted(Searcher(engine).run(requests), key=lambda pair: pair[0]))
    assert good.error is None and other.error is None and good.score == len(good.text)
    expected = "raised ValueError" if wrong == "pair" and isinstance(value, Whole) else WRONG[wrong].partition(":")[0]
    expected = "raised TypeError" if wrong == "none" and isinstance(value, Whole) else expected
    assert bad.finish_reason == "error" and value.name in bad.error and expected in bad.error
    assert not engine.held


def test_numbers_of_any_kind_and_in_any_container():
    import numpy as np

    answers = [torch.tensor(1.5), np.float32(2.5), 3, True, torch.tensor([4.0])]
    found = checked_scores("mine", lambda items: [answers[i] for i in items], range(5))
    assert found == [1.5, 2.5, 3.0, 1.0, 4.0] and all(type(x) is float for x in found)
    json.dumps(found, allow_nan=False)
    assert (
        checked_scores("mine", lambda items: np.array([1.0, 2.0]), "ab")
        == checked_scores("mine", lambda items: torch.tensor([[1.0], [2.0]]), "ab")
        == [1.0, 2.0]
    )


@pytest.mark.parametrize(
    "ask,said",
    [
        (lambda items: [1.0] * (len(items) + 1), "mine gave 4 scores for 3 responses: expected one for each"),
        (lambda items: [1.0], "mine gave 1 score for 3 responses: expected one for each"),  # not the score of each, one by one
        (lambda items: [], "mine gave 0 scores for 3 responses: expected one for each"),
        (lambda items: None, "mine gave None instead of a list of scores for 3 responses: expected one for each"),
        (lambda items: 0.5, "mine gave 0.5 instead of a list of scores for 3 responses: expected one for each"),
        (lambda items: {"a": 1}, "mine gave {'a': 1} instead of a list of scores for 3 responses: expected one for each"),
    ],
)
def test_a_wrong_number_of_scores(ask, said):
    assert checked_scores("mine", ask, "abc") == [said] * 3
    with pytest.raises(ScoreError, match="response 1 of 3: mine gave"):
        require_scores(checked_scores("mine", ask, "abc"))


@given(st.sets(st.integers(0, 15)), st.integers(1, 16))
def test_every_other_item_keeps_its_score(bad, count):
    calls = []

    def ask(items):
        calls.append(len(items))
        if bad & set(items):
            raise KeyError("x")
        return [float(i) for i in items]

    found = checked_scores("mine", ask, range(count))
    assert [isinstance(s, ScoreFault) for s in found] == [i in bad for i in range(count)]
    assert [s for s in found if not isinstance(s, ScoreFault)] == [float(i) for i in range(count) if i not in bad]
    assert len(calls) <= 1 + 2 * len(bad) * math.ceil(math.log2(count) if count > 1 else 0)


def test_a_model_that_cannot_be_used_is_no_matter_of_one_response():
    def dead(items):
        raise ModelError("the engine died")

    with pytest.raises(ModelError, match="died"):
        checked_scores("mine", dead, "ab")


def test_functions_are_called_once_for_each_response():
    calls = []

    def count(prompt, response):
        calls.append(response)
        return shout(prompt, response)

    base = tiny_lm("base")
    beams = [hypothesis(p, "x", base) for p in ("ok", "bad", "fine", "nan")]
    found = score_each(CompositeValue([(2.0, FunctionValue(count)), (1.0, FunctionValue(shout))]), beams)
    assert len(calls) == 4 and [found[0], found[2]] == [3.0, 3.0]
    assert "value function raised ZeroDivisionError" in found[1] and "gave NaN" in found[3]
    assert "secret" in found[1] and "secret" not in found[1].said


def test_candidates_without_a_score_fail_their_own_row():
    model = GuidedModel(tiny_lm("base"), {"mine": FunctionValue(shout, "mine")})
    requests = [
        Request(
            Prompt(p),
            Search(guidance=TokenGuidance(model.values["mine"], candidates=3, gate=g)),
            SamplingParams(max_new_tokens=3, ignore_eos=True),
        )
        for p in ("ok", "bad", "nan")
        for g in (0.0, 1e-6)
    ]
    done = [c for _, c in sorted(model.run(requests), key=lambda pair: pair[0])]
    assert [c.error for c in done] == [None] * 2 + ["the value mine raised ZeroDivisionError: secret"] * 2 + [
        "the value mine gave NaN: expected a finite number"
    ] * 2


def test_a_function_that_ends_the_process_fails_for_its_row_alone():
    def leaves(items):
        if 2 in items:
            raise SystemExit(0)
        return [float(i) for i in items]

    assert checked_scores("mine", leaves, [1, 2, 3]) == [1.0, "mine raised SystemExit: 0", 3.0]


def test_one_number_is_a_score_in_whatever_it_is_wrapped():
    ones = [1, 1.0, True, np.float32(1), np.array([1.0]), np.array(1.0), torch.tensor(1.0), torch.tensor([[1.0]])]
    assert checked_scores("mine", list, ones) == [1.0] * len(ones)
    assert all(isinstance(s, ScoreFault) for s in checked_scores("mine", list, [np.array([1.0, 2.0]), torch.ones(2), None, "x", [1.0], 1j]))


def test_one_response_in_place_of_a_list_is_an_error():
    """Its characters would be scored, one by one."""
    model = GuidedModel(tiny_lm("base"), {"mine": FunctionValue(shout, "mine")})
    with pytest.raises(PromptError, match=r"responses is the text 'fine'\n  expected a list"):
        model.score("ok", "fine", "mine")


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None])
def test_weights_of_a_sum_are_finite_numbers(weight):
    with pytest.raises(ConfigError, match="the weight of mine must be a finite number"):
        CompositeValue([(weight, FunctionValue(shout, "mine"))])


def test_rollouts_keep_what_could_be_scored(tmp_path):
    model = GuidedModel(tiny_lm("base"), max_beams=8)
    prompts = [Prompt(p) for p in ("ok", "bad", "nan", "fine")]
    out = rollout(model, prompts, tmp_path / "r.jsonl", FunctionValue(shout, "mine"), samples=1, max_new_tokens=3, ignore_eos=True)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]
    raised, nan = "the value mine raised ZeroDivisionError: secret", "the value mine gave NaN: expected a finite number"
    assert [("score" in r, r.get("error")) for r in rows] == [(True, None), (False, raised), (False, nan), (True, None)]
    with pytest.raises(PromptError, match=r"reads at most 32 tokens, got 40"):
        RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer()).rewards(["x", "x" * 40])
    document = RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer())
    assert document.rewards(["x" * 40], truncate=True) == document.rewards(["x" * 32])
    reward = RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer())
    out = rollout(model, [Prompt("x" * 40)], tmp_path / "n.jsonl", reward, samples=1, max_new_tokens=3, ignore_eos=True)
    row = json.loads(out.read_text())
    assert row["notes"] == [reward.note(Prompt("x" * 40), row["response"])] and "left out" in row["notes"][0]


def test_a_judge_gives_no_verdict_where_an_answer_cannot_be_scored():
    judge = RewardJudge(RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer()))
    fine, long = judge.compare([Pair("I", "yes", "no"), Pair("I", "yes", "n" * 90)])
    assert 1 <= fine.preference <= 2 and long.preference is None and "the response alone has 90" in long.reply


def test_a_fault_goes_to_other_processes_whole():
    import pickle

    fault = ScoreFault("all", said="less", prompt=True)
    again = pickle.loads(pickle.dumps(fault))
    assert (again, again.said, again.prompt) == ("all", "less", True)
    with pytest.raises(PromptError):
        RewardModel(encoder(positions=32, pad_token_id=0), byte_tokenizer()).read(Prompt("x"), "y" * 40)


def test_an_evaluation_leaves_out_what_a_judge_has_no_number_for(tmp_path):
    """The row says why, in its method and in the bank; all others are scored and reported."""
    from ivg.evaluation import runner
    from ivg.evaluation.methods import BASE_SAMPLES
    from ivg.evaluation.plan import make_plan
    from ivg.evaluation.score import read_scored
    from ivg.evaluation.summary import summarise
    from ivg.settings.recipe import Recipe
    from ivg.utils.jsonl import read_jsonl

    saved(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, response):\n    return float('nan') if prompt == 'nan' else 1 / (prompt != 'bad') * len(response)\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("ok", "bad", "nan", "fine")))
    settings = {
        "data": str(tmp_path / "prompts.jsonl"),
        "methods": ["base"],
        "gold": f"{tmp_path}/judge.py:judge",
        "threads": 1,
        "base_samples": 2,
    }
    models = {"base": str(tmp_path / "base"), "reward": f"{tmp_path}/mine.py:mine"}
    (tmp_path / "mine.py").write_text("def mine(prompt, response):\n    return 1 / (prompt != 'fine')\n")
    run = {"device": "cpu", "dtype": "float32"}
    p = make_plan(Recipe.parse({"models": models, "sampling": {"max_new_tokens": 3}, "run": run, "eval": settings}), tmp_path / "out")
    runner.run(p, ("generate", "score"))
    raised, nan = "the value gold raised ZeroDivisionError: division by zero", "the value gold gave NaN: expected a finite number"
    assert [r.get("error") for r, _ in read_scored(p, "base")] == [None, raised, nan, None]
    assert [r.get("error") for r, _ in read_scored(p, BASE_SAMPLES)] == [
        None,
        raised,
        nan,
        "the value reward raised ZeroDivisionError: division by zero",
    ]
    for path in p.out.rglob("*.jsonl"):
        list(read_jsonl(path))  # valid JSON
    base = summarise(p)["methods"]["base"]
    assert (base["answers"], base["errors"]) == (2, 2)


def test_what_the_server_says_of_scores():
    from ivg.serving.errors import completion_error

    user = completion_error(score_each(FunctionValue(shout, "mine"), [hypothesis("bad", "x", tiny_lm("base"))])[0])
    assert (user.status, user.code, str(user)) == (500, "model_error", "the value mine failed on this response")
    long = completion_error(ScoreFault("too long\n  shorten it", prompt=True))
    assert (long.status, str(long)) == (400, "too long; shorten it")
