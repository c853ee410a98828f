"""ivg inside transformers' generate: every argument is honoured or refused by name, prompts are the very tokens, nothing is kept."""

import gc
import queue
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
)

from ivg import GuidedModel
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError, PromptError
from ivg.integrations.generate_args import NO_EFFECT, SUPPORTED, UNSUPPORTED, check_config
from ivg.integrations.transformers import GuidanceLogitsProcessor, GuidedGenerate
from ivg.search.searcher import Request, Searcher
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams, TokenGuidance
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer([("t", "h")])
    made.padding_side = "left"
    return made


@pytest.fixture(scope="module")
def base(tokenizer):
    return tiny_lm("base", tokenizer=tokenizer)


def generate(base, tokenizer, prompts, search=None, **settings):
    """Ids of the responses, [rows, longest]."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    custom = {} if search is None else {"custom_generate": search}
    return base.network.generate(**inputs, **custom, **settings)[:, inputs.input_ids.shape[1] :]


# Arguments of generate


def test_every_field_of_generation_config_is_done_without_effect_or_refused():
    """A field that a new transformers brings fails here, and is refused by name until somebody decides."""
    fields = set(vars(GenerationConfig()))
    tables = (SUPPORTED, NO_EFFECT, frozenset(UNSUPPORTED))
    assert fields <= frozenset().union(*tables)
    assert sum(map(len, tables)) == len(frozenset().union(*tables)), "a field in two tables"
    check_config(GenerationConfig())
    with pytest.raises(ConfigError, match=r"brand_new=3 is not supported .*\n.*unknown to this version"):
        check_config(SimpleNamespace(brand_new=3))


HONOURED = {
    "eos_token_id": {"eos_token_id": [8, 111]},
    "no end": {"eos_token_id": None, "pad_token_id": 0, "sequence_bias": [[[0], 99.0]]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(150))},
    "min_length": {"min_length": 12, "eos_token_id": list(range(150))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(1, 120)] + [[130, 131]]},
    "suppress_tokens": {"suppress_tokens": list(range(40, 160))},
    "begin_suppress_tokens": {"begin_suppress_tokens": [6, 197]},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": [[[t], 8.0] for t in range(90, 100)]},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0)},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
    "max_length": {"max_length": 14, "max_new_tokens": None},
    "model's processors": {"processors": True},
}


@pytest.mark.parametrize("name", [*HONOURED])
def test_greedy_base_is_transformers_generate(base, tokenizer, name):
    """Two prompts, one padded: what transformers does with each argument is done, token for token."""

    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + torch.sin(torch.arange(scores.shape[1]) * input_ids[:, -1:] * 0.1) * 9

    settings = {"max_new_tokens": 10, "do_sample": False, **HONOURED[name]}
    own = [Shift()] if settings.pop("processors", None) else []
    expected = generate(base, tokenizer, ["The movie", "abc"], logits_processor=own, **settings)
    got = generate(base, tokenizer, ["The movie", "abc"], GuidedGenerate(tokenizer, {}, "base", processors=own), **settings)
    plain = generate(base, tokenizer, ["The movie", "abc"], max_new_tokens=10, do_sample=False)
    assert torch.equal(got, expected)
    assert name == "renormalize_logits" or got.shape != plain.shape or not torch.equal(got, plain)  # it made a difference


def test_stop_strings_end_rows(base, tokenizer):
    (row,) = generate(base, tokenizer, ["abc"], max_new_tokens=10, do_sample=False).tolist()
    stop = next(piece for piece in map(tokenizer.decode, row[2:]) if piece.isascii())
    criteria = [StopStringCriteria(tokenizer, [stop])]
    expected = generate(base, tokenizer, ["abc"], max_new_tokens=10, do_sample=False, stopping_criteria=criteria)
    got = generate(base, tokenizer, ["abc"], GuidedGenerate(tokenizer, {}, "base"), max_new_tokens=10, stopping_criteria=criteria)
    assert got.tolist() == expected.tolist() and got.shape[1] < 10


def test_several_sequences_and_dictionaries(base, tokenizer):
    search = GuidedGenerate(tokenizer, {}, "base", seed=3)
    settings = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}
    out = generate(base, tokenizer, ["abc"], search, num_return_sequences=3, **settings)
    assert out.shape == (3, 6) and len({tuple(row) for row in out.tolist()}) == 3
    inputs = tokenizer(["abc"], return_tensors="pt")
    found = base.network.generate(**inputs, custom_generate=search, return_dict_in_generate=True, **settings)
    assert found.sequences[0, 3:].tolist() == out[0].tolist()


def test_a_streamer_gets_the_tokens_and_its_end(base, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    out = generate(base, tokenizer, ["abc"], GuidedGenerate(tokenizer, {}, "base"), max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0])
    with pytest.raises(queue.Empty):
        streamer.text_queue.get_nowait()


class Timed(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.ones(len(input_ids), dtype=torch.bool)


class Counting(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise AssertionError("not asked for")


REFUSALS = {
    "num_beams=3": {"num_beams": 3},
    "max_time=1.0": {"max_time": 1.0},
    "typical_p=0.5": {"typical_p": 0.5, "do_sample": True},
    "epsilon_cutoff=0.1": {"epsilon_cutoff": 0.1, "do_sample": True},
    "top_h=0.4": {"top_h": 0.4, "do_sample": True},
    "guidance_scale=2.0": {"guidance_scale": 2.0},
    "encoder_repetition_penalty=2.0": {"encoder_repetition_penalty": 2.0},
    "output_scores=True": {"output_scores": True, "return_dict_in_generate": True},
    "output_hidden_states=True": {"output_hidden_states": True, "return_dict_in_generate": True},
    "stopping_criteria Timed": {"stopping_criteria": [Timed()]},
    "stopping_criteria MaxLengthCriteria has max_length=5": {"stopping_criteria": [MaxLengthCriteria(5)]},
    "stopping_criteria EosTokenCriteria has eos_token_id=[7]": {"stopping_criteria": [EosTokenCriteria(7)]},
    "logits_processor TemperatureLogitsWarper has temperature=0.5": {"do_sample": True, "logits_processor": [TemperatureLogitsWarper(0.5)]},
    "logits_processor TopKLogitsWarper has top_k=3": {"do_sample": True, "logits_processor": [TopKLogitsWarper(3)]},
    "logits_processor Counting": {"logits_processor": [Counting()]},
    "logits_processor PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": lambda row, ids: [1]},
}


@pytest.mark.parametrize("line", [*REFUSALS])
def test_what_cannot_be_done_is_refused_by_name(base, tokenizer, line):
    with pytest.raises(ConfigError) as caught:
        generate(base, tokenizer, ["abc"], GuidedGenerate(tokenizer, {}, "base"), max_new_tokens=4, **REFUSALS[line])
    assert str(caught.value).startswith(line) and "\n  " in str(caught.value)


def test_other_inputs_are_refused_by_name(base, tokenizer):
    inputs = tokenizer(["abc"], return_tensors="pt")
    search = GuidedGenerate(tokenizer, {}, "base")
    with pytest.raises(ConfigError, match="inputs_embeds: GuidedGenerate reads"):
        embeds = base.network.get_input_embeddings()(inputs.input_ids)
        base.network.generate(**inputs, inputs_embeds=embeds, custom_generate=search, max_new_tokens=2)
    with pytest.raises(ConfigError, match="past_key_values: GuidedGenerate has its own cache"):
        cache = base.network(inputs.input_ids[:, :2]).past_key_values
        base.network.generate(**inputs, past_key_values=cache, custom_generate=search, max_new_tokens=2)
    with pytest.raises(ConfigError, match="not directly"):
        search(base.network, inputs.input_ids)
    pair = ImplicitValue(tiny_lm("tuned", tokenizer=tokenizer), tiny_lm("untuned", tokenizer=tokenizer))
    drafting = GuidedGenerate(tokenizer, {"implicit": pair}, "eft", draft=3)
    with pytest.raises(ConfigError, match="draft reads several tokens at once, and NoRepeatNGram"):
        generate(base, tokenizer, ["abc"], drafting, max_new_tokens=2, no_repeat_ngram_size=2)
    chunks = GuidedGenerate(tokenizer, {"implicit": pair}, "rsd", select="implicit")
    with pytest.raises(ConfigError, match="rule=speculate reads several tokens at once, and NoRepeatNGram"):
        generate(base, tokenizer, ["abc"], chunks, max_new_tokens=2, no_repeat_ngram_size=2)


def test_forbidden_tokens_stay_forbidden_under_guidance_and_search(base, tokenizer):
    values = {"explicit": tiny_value(seed=3, tokenizer=tokenizer), "implicit": tiny_value(seed=4, tokenizer=tokenizer)}
    search = GuidedGenerate(tokenizer, values, "ivg", width=2, successors=2, chunk_length=3, beta=4.0)
    banned = list(range(30, 257))
    out = generate(base, tokenizer, ["abc", "The"], search, max_new_tokens=9, do_sample=True, suppress_tokens=banned)
    assert not set(out.flatten().tolist()) & set(banned)


SEVERAL = {"repetition_penalty": 1.6, "no_repeat_ngram_size": 3, "sequence_bias": [[[7], 4.0]], "min_new_tokens": 4}


@pytest.mark.parametrize("method", ["eft", "ivg"])
def test_settings_act_on_guided_logits_as_for_a_guided_model(base, tokenizer, method):
    """One rule: the same settings give the same tokens by either way."""
    pair = ImplicitValue(tiny_lm("tuned", seed=2, tokenizer=tokenizer), tiny_lm("untuned", seed=3, tokenizer=tokenizer))
    values = {"implicit": pair, "explicit": tiny_value(seed=4, tokenizer=tokenizer)}
    sizes = {"width": 2, "successors": 2, "chunk_length": 3} if method == "ivg" else {}
    model = GuidedModel(base, values)
    search = GuidedGenerate(tokenizer, values, method, beta=2.0, **sizes)
    ids = tuple(tokenizer("abc abc").input_ids)
    given = SEVERAL | {"sequence_bias": [((7,), 4.0)]}
    (wanted,) = (model.generate(Prompt("abc abc", ids), method, temperature=0.0, max_new_tokens=12, beta=2.0, **sizes, **given),)
    got = generate(base, tokenizer, ["abc abc"], search, max_new_tokens=12, do_sample=False, **SEVERAL)
    plain = generate(base, tokenizer, ["abc abc"], search, max_new_tokens=12, do_sample=False)
    assert tuple(got[0].tolist()) == wanted.token_ids != tuple(plain[0].tolist())


class Broken(LogitsProcessor):
    """Never gets here where logits are mended first."""

    def __call__(self, input_ids, scores):
        assert scores.isfinite().all()
        return scores


def test_invalid_logits_are_replaced_with_remove_invalid_values(base, tokenizer):
    def break_one(module, args, out):
        return out.index_fill(-1, torch.tensor([5]), float("nan"))

    search = GuidedGenerate(tokenizer, {}, "base", processors=[Broken()])
    settings = {"max_new_tokens": 4, "do_sample": False, "remove_invalid_values": True}
    hook = base.network.get_output_embeddings().register_forward_hook(break_one)
    try:
        assert torch.equal(generate(base, tokenizer, ["abc"], search, **settings), generate(base, tokenizer, ["abc"], **settings))
    finally:
        hook.remove()


# Prompts are tokens


class Watching(FunctionValue):
    """Remembers the prompts that it is asked about."""

    def __init__(self):
        super().__init__(lambda p, r: 0.0)
        self.prompts, self.held = [], set()

    def score(self, hypotheses):
        self.prompts += [h.prompt for h in hypotheses]
        self.held |= {h.key for h in hypotheses}
        return [0.0] * len(hypotheses)

    def release(self, keys):
        self.held -= set(keys)


@pytest.mark.parametrize("mask", [True, False])
def test_processor_gives_guides_the_very_prompt(base, tokenizer, mask):
    """Special tokens in the middle, padding at the left."""
    value = Watching()
    ids = [[5, 0, 7, 8], [0, 0, 9, 10]]  # the second is padded by two
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])}
    processor = GuidanceLogitsProcessor(TokenGuidance(value, 1.0, 2), tokenizer, inputs["attention_mask"] if mask else None)
    base.network.generate(**inputs, max_new_tokens=3, num_return_sequences=2, do_sample=True, logits_processor=[processor])
    assert {p.token_ids for p in value.prompts} == {(5, 0, 7, 8), (9, 10)}
    assert {p.content for p in value.prompts} == {tokenizer.decode([5, 7, 8]), tokenizer.decode([9, 10])}


def test_search_and_processor_read_chats_as_the_base_does(base, tokenizer):
    """Guides of the same vocabulary read the base's tokens; a template of their own would be put around a rendered chat."""
    chat = torch.tensor([[0, 60, 0, 70, 71, 0, 61]])
    pair = ImplicitValue(tiny_lm("tuned", seed=2, tokenizer=tokenizer), tiny_lm("untuned", seed=3, tokenizer=tokenizer))
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(chat)}
    network = base.network
    search = GuidedGenerate(tokenizer, {"implicit": pair}, "eft", beta=0.7)
    by_search = network.generate(chat, custom_generate=search, **settings)
    processor = GuidanceLogitsProcessor(TokenGuidance(pair, 0.7), tokenizer, settings["attention_mask"])
    by_processor = network.generate(chat, logits_processor=[processor], **settings)

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            tuned, untuned = (r.network(input_ids).logits[:, -1] for r in (pair.tuned, pair.untuned))
            return scores + 0.7 * (tuned - untuned)

    expected = network.generate(chat, logits_processor=[Slow()], **settings)
    assert torch.equal(by_search, expected) and torch.equal(by_processor, expected)
    pair.tuned.template = "chat"
    pair.tuned.prompt_ids.cache_clear()
    for custom in ({"custom_generate": search}, {"logits_processor": [GuidanceLogitsProcessor(TokenGuidance(pair), tokenizer)]}):
        with pytest.raises(PromptError, match="rendered already"):
            network.generate(chat, **custom, **settings)


def test_one_processor_serves_calls_in_turn(base, tokenizer):
    """The second call's prompt is as long as the first call's text: it is another text all the same."""
    pair = ImplicitValue(tiny_lm("tuned", seed=2, tokenizer=tokenizer), tiny_lm("untuned", seed=3, tokenizer=tokenizer))
    shared = GuidanceLogitsProcessor(TokenGuidance(pair, 2.0), tokenizer)
    for length in (3, 7, 4):
        ids = torch.arange(40, 40 + length)[None] * (length % 3 + 1)
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        fresh = GuidanceLogitsProcessor(TokenGuidance(pair, 2.0), tokenizer)
        expected = base.network.generate(ids, logits_processor=[fresh], **settings)
        assert torch.equal(base.network.generate(ids, logits_processor=[shared], **settings), expected)


@pytest.fixture
def templated(tokenizer):
    """A processor whose guides read the prompt in a template of their own, so that they must know where it ends."""
    pair = ImplicitValue(tiny_lm("tuned", seed=2, tokenizer=tokenizer), tiny_lm("untuned", seed=3, tokenizer=tokenizer))
    for guide in (pair.tuned, pair.untuned):
        guide.template = "Say: {prompt} now"
    return lambda: GuidanceLogitsProcessor(TokenGuidance(pair, 4.0), tokenizer)


@pytest.mark.parametrize("drafts", ["assistant", "assistant that agrees", "lookup"])
def test_drafts_change_no_greedy_answer(base, tokenizer, templated, drafts):
    """Also where drafts are refused: the text then goes back to an earlier one, and its prompt is the same."""
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = generate(base, tokenizer, ["The the the"], logits_processor=[templated()], **settings)
    assistant = base.network if drafts == "assistant that agrees" else tiny_lm("tuned", seed=2, tokenizer=tokenizer).network
    more = {"prompt_lookup_num_tokens": 3} if drafts == "lookup" else {"assistant_model": assistant}
    assert torch.equal(generate(base, tokenizer, ["The the the"], logits_processor=[templated()], **more, **settings), plain)
    assert not torch.equal(generate(base, tokenizer, ["The the the"], **settings), plain)


def test_one_processor_knows_each_prompt(base, tokenizer, templated):
    """Of calls of generate: the second continues the first's text, or begins as it does. By hand texts grow, or are new."""
    shared, settings = templated(), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ids = tokenizer(["abc"], return_tensors="pt").input_ids
    for _ in range(3):
        mask = torch.ones_like(ids)
        expected = base.network.generate(ids, attention_mask=mask, logits_processor=[templated()], **settings)
        assert torch.equal(base.network.generate(ids, attention_mask=mask, logits_processor=[shared], **settings), expected)
        ids = expected
    zeros, by_hand = torch.zeros(1, len(tokenizer)), templated()
    first = by_hand(ids[:, :3], zeros)
    assert torch.equal(first, templated()(ids[:, :3], zeros))
    assert not torch.allclose(by_hand(ids[:, :4], zeros), templated()(ids[:, :4], zeros)), "its prompt is that of the first"
    by_hand(ids[:, :5], zeros)
    assert torch.equal(by_hand(ids[:, :3], zeros), first), "a text that ended earlier is a new prompt"
    assert torch.equal(by_hand(ids[:, :5], zeros), templated()(ids[:, :5], zeros))


def test_calls_of_generate_within_others(base, tokenizer, templated):
    """Each has its own prompts: two in one custom_generate, and several by a function of that name that is given one configuration."""
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = tokenizer(["abc"], return_tensors="pt").input_ids
    shared = templated()

    def generate(prompt, processor, generation_config=config, custom_generate=None):
        mask = torch.ones_like(prompt)
        return base.network.generate(prompt, attention_mask=mask, generation_config=generation_config, logits_processor=[processor])

    def twice(model, input_ids, **settings):
        return generate(generate(input_ids, shared), shared)

    expected = generate(generate(ids, templated()), templated())
    assert torch.equal(generate(generate(ids, shared), shared), expected)
    assert torch.equal(
        base.network.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=twice, generation_config=config), expected
    )


def test_an_assistant_with_another_tokenizer_is_not_guided(base, tokenizer, templated):
    """Its tokens mean other text; the answer, which is the base's, is guided."""
    other = byte_tokenizer([("h", "e"), ("o", "v")], permute=True)
    assistant = tiny_lm("assistant", seed=5, tokenizer=other).network
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    inputs = tokenizer(["The the"], return_tensors="pt")
    plain = base.network.generate(**inputs, logits_processor=[templated()], **settings)
    more = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": other}
    assert torch.equal(base.network.generate(**inputs, logits_processor=[templated()], **more, **settings), plain)


def test_a_model_in_training_stays_in_training(tokenizer):
    network = tiny_lm("base", tokenizer=tokenizer).network.train()
    frozen = network.get_output_embeddings().eval()
    failing = GuidedGenerate(tokenizer, {"explicit": FunctionValue(lambda p, r: float("nan"))}, "cbs-explicit", width=1, successors=2)
    ids = torch.tensor([[60, 61]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    network.generate(ids, custom_generate=GuidedGenerate(tokenizer, {}, "base"), **settings)
    with pytest.raises(ConfigError, match="NaN"):
        network.generate(ids, custom_generate=failing, **settings)
    assert [m for m in network.modules() if not m.training] == [frozen]


def test_positions_of_the_caller(base, tokenizer):
    """Those that count the tokens are what a search does; others are refused."""
    ids, mask = torch.tensor([[0, 60, 61], [62, 63, 64]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    search, settings = GuidedGenerate(tokenizer, {}, "base"), {"max_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    expected = base.network.generate(ids, custom_generate=search, **settings)
    counted = torch.tensor([[7, 0, 1], [0, 1, 2]])
    assert torch.equal(base.network.generate(ids, custom_generate=search, position_ids=counted, **settings), expected)
    with pytest.raises(ConfigError, match="position_ids: GuidedGenerate counts the tokens"):
        base.network.generate(ids, custom_generate=search, position_ids=counted + 3, **settings)


def test_processor_refuses_a_guide_with_a_short_context(base, tokenizer):
    guide = tiny_value(tokenizer=tokenizer)
    guide.model.max_positions = 6
    processor = GuidanceLogitsProcessor(TokenGuidance(guide), tokenizer)
    with pytest.raises(PromptError, match=r"context of explicit \(6\)"):
        generate(base, tokenizer, ["abc"], max_new_tokens=8, do_sample=False, eos_token_id=None, logits_processor=[processor])


# Nothing is kept


def test_processor_frees_its_rows(base, tokenizer):
    guide = tiny_value(tokenizer=tokenizer)
    settings = {"max_new_tokens": 4, "do_sample": False}
    processor = GuidanceLogitsProcessor(TokenGuidance(guide), tokenizer)
    first = generate(base, tokenizer, ["abc", "xy"], logits_processor=[processor], **settings)
    again = generate(base, tokenizer, ["abc", "xy"], logits_processor=[processor], **settings)  # may be used again
    assert torch.equal(first, again) and guide.model.model.live_rows == 2
    processor.close()
    assert guide.model.model.live_rows == 0
    with GuidanceLogitsProcessor(TokenGuidance(guide), tokenizer) as held:
        generate(base, tokenizer, ["abc"], logits_processor=[held], **settings)
        assert guide.model.model.live_rows == 1
    assert guide.model.model.live_rows == 0
    generate(base, tokenizer, ["abc"], logits_processor=[GuidanceLogitsProcessor(TokenGuidance(guide), tokenizer)], **settings)
    gc.collect()
    assert guide.model.model.live_rows == 0


def test_searches_free_their_rows(base, tokenizer):
    value = tiny_value("scalar", tokenizer=tokenizer)
    search = GuidedGenerate(tokenizer, {"explicit": value}, "cbs-explicit", width=2, successors=2, chunk_length=2)
    inputs = ["abc", "The"]
    out = generate(base, tokenizer, inputs, search, max_new_tokens=6, do_sample=True, top_k=0)
    assert value.model.model.live_rows == 0
    requests = [Request(Prompt(p), search.search, SamplingParams(max_new_tokens=6), 0, i) for i, p in enumerate(inputs)]
    done = dict(Searcher(TransformersEngine(base)).run(requests))
    assert [row[: len(done[i].token_ids)] for i, row in enumerate(out.tolist())] == [list(done[i].token_ids) for i in (0, 1)]


def test_a_failing_row_is_an_error(base, tokenizer):
    nan = FunctionValue(lambda p, r: float("nan"))
    search = GuidedGenerate(tokenizer, {"explicit": nan}, "cbs-explicit", width=1, successors=2, chunk_length=2)
    with pytest.raises(ConfigError, match=r"row 0: .*NaN"):
        generate(base, tokenizer, ["abc"], search, max_new_tokens=4)
