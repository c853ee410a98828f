"""Tokens that a tokenizer and a network do not share: which token ends a text, and texts with tokens that have no embedding."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from test_rewards import encoder

from ivg import GuidedModel
from ivg.diagnostics.logits import response_beam
from ivg.engines.sequences import fork
from ivg.engines.transformers.draft_text import take_over
from ivg.errors import PromptError, ScoreFault
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.vocabulary import Vocabulary
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_model
from ivg.types import ExpandRequest, Prompt, SamplingParams
from ivg.values.implicit import ImplicitValue
from ivg.values.process import ProcessReward
from ivg.values.reward import RewardModel

END, PAD = 257, 257  # ids of added tokens


def with_ends(permute=True):
    """A tokenizer whose own end is the later of the two that its models have."""
    tokenizer = byte_tokenizer(permute=permute)
    tokenizer.add_special_tokens({"eos_token": "<|eot_id|>"})
    return tokenizer


def reader(name, seed, tokenizer, rows=None, eos_ids=None):
    return CachedLM(ModelRunner(tiny_model("llama", seed, vocab_size=rows or len(tokenizer)), name), tokenizer, None, eos_ids)


@pytest.mark.parametrize("eos_ids,expected", [([0, END], END), ([5, 9], 5), ([END], END), ([], None), (None, END)])
def test_the_end_is_the_tokenizers_own_where_the_model_has_it(eos_ids, expected):
    assert Vocabulary(with_ends(), eos_ids).eos_id == expected


def test_a_guide_with_other_tokens_reads_its_tokenizers_end():
    base, other = tiny_lm("base"), with_ends()
    pair = ImplicitValue(*(reader(name, seed, other, eos_ids=[0, END]) for name, seed in (("tuned", 1), ("untuned", 2))))
    h = hypothesis("hello", " you", base, end=True)
    ids = [*other("hello you").input_ids, END]
    assert pair.tuned.ids(h)[0] == ids
    with torch.no_grad():
        logps = [lm.network(torch.tensor([ids])).logits[0].log_softmax(-1) for lm in (pair.tuned, pair.untuned)]
    expected = sum(float(logps[0][i - 1, t] - logps[1][i - 1, t]) for i, t in enumerate(ids) if i >= 5)
    assert pair.score([h])[0] == pytest.approx(expected, abs=1e-4)


def test_a_token_that_only_the_base_has_is_the_tokenizers_end():
    guide = reader("tuned", 1, with_ends(permute=False), eos_ids=[0, END])
    assert guide.own_ids([3, 300]) == [3, END]
    short = reader("tuned", 1, with_ends(permute=False), rows=257, eos_ids=[0, END])
    assert short.eos_id == 0 and short.own_ids([3, END]) == [3, 0]  # the tokenizer's end has no embedding


def test_a_draft_as_text_ends_with_the_tokenizers_end():
    base = reader("base", 1, with_ends(), eos_ids=[0, END])
    (child,) = fork(ExpandRequest(base.root(Prompt("hello"), 8), 1, 8, SamplingParams(max_new_tokens=8), None, 0))
    take_over(base, child, SimpleNamespace(text=" you", finish="stop", error=None))
    assert child.token_ids[-1] == END and child.finish == "stop"


# Tokens without an embedding


def padded(**settings):
    """A tokenizer with a token more than its models have rows: added, never resized for."""
    tokenizer = byte_tokenizer(**settings)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


@pytest.fixture(scope="module")
def model():
    base = reader("base", 0, padded(), rows=257)
    other = padded(permute=True)
    pair = ImplicitValue(*(reader(name, seed, other, rows=257) for name, seed in (("tuned", 1), ("untuned", 2))))
    return GuidedModel(base, {"implicit": pair})


NO_ROW = "prompt token '<pad>' .257. has no embedding in base, whose ids are 0 to 256"


def test_a_prompt_with_such_a_token_is_refused_and_others_are_answered(model):
    async def ask():
        return await asyncio.gather(*(model.agenerate(p, "base", max_new_tokens=4) for p in ("good", "bad <pad>")), return_exceptions=True)

    good, bad = asyncio.run(ask())
    assert good.text == model.generate("good", "base", max_new_tokens=4).text
    with pytest.raises(PromptError, match=NO_ROW):
        raise bad
    with pytest.raises(PromptError, match=NO_ROW):
        model.generate(["good", "bad <pad>"], "base", max_new_tokens=4)


def test_responses_with_such_a_token_are_refused(model):
    for read in (
        lambda: model.logprobs("hello", " <pad>", "base"),
        lambda: model.score("hello", [" <pad>"], "implicit"),
        lambda: response_beam(model.reader, Prompt("hello"), " <pad>"),
    ):
        with pytest.raises(PromptError, match="response token '<pad>'"):
            read()


def test_a_guide_refuses_such_a_prompt_and_reads_such_text_of_a_response_as_an_end():
    """The base writes the letters; to the guide they are its token."""
    base, other = tiny_lm("base"), padded(permute=True)
    pair = ImplicitValue(*(reader(name, seed, other, rows=257) for name, seed in (("tuned", 1), ("untuned", 2))))
    guided = GuidedModel(base, {"implicit": pair})
    with pytest.raises(PromptError, match=r"prompt token '<pad>' \(257\) has no embedding in tuned"):
        guided.generate("bad <pad>", "eft", max_new_tokens=4, token="implicit", candidates=4)
    h = hypothesis("hello", " a<pad>", base)
    assert pair.tuned.ids(h)[0] == [*other("hello a").input_ids, 0]
    assert len(guided.score("hello", [" a<pad>"], "implicit")) == 1


def test_rewards_refuse_such_a_text_alone():
    network, tokenizer = encoder(pad_token_id=0, vocab_size=257), padded()
    reward = RewardModel(network, tokenizer)
    (good, _), (bad, _) = reward.read_all([(Prompt("hi"), " you"), (Prompt("hi"), " <pad>")])
    assert isinstance(good, float)
    assert isinstance(bad, ScoreFault) and "'<pad>' (257) has no embedding in reward" in str(bad)
    with pytest.raises(PromptError, match="no embedding"):
        reward.check(Prompt("hi <pad>"), 4)
    with pytest.raises(PromptError, match="no embedding"):
        reward.rewards(["<pad>"])


def test_process_rewards_refuse_such_a_text_alone():
    from transformers import LlamaForTokenClassification

    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 2, 0
    steps = ProcessReward(LlamaForTokenClassification(config), padded())
    good, bad = steps.log_probabilities([(Prompt("hi"), "a\nb"), (Prompt("hi"), "a\n<pad>")])
    assert not isinstance(good, ScoreFault) and isinstance(bad, ScoreFault)
    with pytest.raises(PromptError, match="no embedding"):
        steps.check(Prompt("hi <pad>"), 4)
