"""Every causal language model of transformers gives the outputs of a plain pass over each row alone, or is refused when it is loaded."""

import json
import random
import re

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import naive
from architectures import NAMES, VARIANTS, tiny
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ModelError, PromptError
from ivg.models.cache import PassLimits
from ivg.models.cached_lm import CachedLM
from ivg.models.loading import LoadOptions, load_causal
from ivg.models.runner import ModelRunner
from ivg.models.state_cache import StateCache
from ivg.models.support import context_of
from ivg.search.methods import get_method
from ivg.search.searcher import Request, Searcher
from ivg.testing import byte_tokenizer, tiny_model
from ivg.types import Prompt, SamplingParams
from ivg.values.implicit import ImplicitValue
from ivg.values.reward import RewardModel
from naive import compare, outputs_of, wander

pytestmark = pytest.mark.numerics

BORDER = 12
LONGROPE = {
    "original_max_position_embeddings": BORDER,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": BORDER,
    },
}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.6}  # PhiMoE's
REFUSED = {
    "is not causal: its outputs behind a text change with the tokens after it": "cpmant prophetnet xlm xlnet",
    "takes no past_key_values, and takes no cache": "openai-gpt reformer",
    "a running state instead of keys and values per token, and returns no cache": "recurrent_gemma",
}
REASONS = {name: reason for reason, names in REFUSED.items() for name in names.split()}
UNTOLD = ("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody")
"""Lack an argument that is needed, so that they are refused; a tiny one is not easily made."""
NOT_BUILT = (*UNTOLD, "blt", "gemma3n", "dots3_note")  # the text parts of the last two are gemma3n_text and dots3_note_text
UNSTABLE = ("deepseek_v32+smalltopk", "glm_moe_dsa+smalltopk")
"""Of equal scores of their index transformers keeps others in passes of other lengths: a plain pass differs from one over its beginning."""
CLAMPED = ("zamba2", "nemotron_h")
"""transformers bounds their time steps from below where it reads several tokens at once, not where it reads one."""
STATE = {
    "mamba": r"linear_attention: they keep a running state",
    "nemotron_h+attn": "hold no attention",
    "lfm2": r"conv: they keep a running state",
    "falcon_h1": "beside keys and values",
    "deepseek_v32": "by an index of their own",
    "deepseek_v4": "one key and value for several tokens",
    "llama4_text": "attend within chunks",
    "gpt_neo": "cuts its local layers by columns",
    "minimax+swa": "no other cache than its own",
    "bloom": r"takes distances \(ALiBi\) from columns of the batch",
    "bart": "takes no position_ids",
    "rwkv": "takes no position_ids",
}
"""Why the slots do not do for them."""
FAST = ("afmoe", "roberta", "xmod", "bert", "falcon", "gpt_neo+global", "gpt_oss", "gemma3n_text", "deepseek_v3", "qwen2+swa", "cohere")


def check(name, steps=1, tolerance=2e-3, **more):
    model = ModelRunner(tiny(name, **more), name)
    for seed in range(steps):
        model.reset_cache()
        wander(model, random.Random(f"{name} {seed}"), 256, tolerance)
    return model


@pytest.mark.parametrize("name", FAST)
def test_rows_equal_plain_passes(name):
    check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FAST) - set(NOT_BUILT) - set(UNSTABLE)))
def test_every_architecture_is_exact_or_refused(name):
    network = tiny(name)
    if name in REASONS:
        with pytest.raises(ModelError, match=f"^{name.replace('+', '.')}: .*{REASONS[name]}"):
            ModelRunner(network, name)
    elif (limit := ModelRunner(network, name).max_positions) is not None and limit < 64:
        assert name in ("moshi", "doge+keep4", "llama+dynamic")
    else:
        check(name, tolerance=0.1 if name in CLAMPED else 2e-3)


@pytest.mark.parametrize("name", STATE)
def test_rows_with_the_state_of_transformers_equal_plain_passes(name):
    model = check(name, steps=2)
    assert isinstance(model.cache, StateCache)
    assert re.search(STATE[name], model.support.state_reason)


@pytest.mark.parametrize("name", ["cpmant", "prophetnet", "recurrent_gemma", "xlm", "xlnet"])
def test_what_cannot_be_read_is_refused_with_its_reason(name):
    with pytest.raises(ModelError, match=f"^base: {type(network := tiny(name)).__name__} .*{REASONS[name]}.*\n  expected"):
        ModelRunner(network, "base")


def test_what_is_too_large_to_be_made_here_is_refused():
    import inspect

    import transformers

    with torch.device("meta"):
        blt = transformers.BltForCausalLM(transformers.BltConfig())
    with pytest.raises(ModelError, match="base: BltForCausalLM cuts its text into patches"):
        ModelRunner(blt, "base")
    for name in UNTOLD:
        arguments = inspect.signature(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]).forward).parameters
        assert not {"position_ids", "past_key_values"} <= set(arguments)


def test_networks_that_read_in_both_directions_are_refused():
    with pytest.raises(ModelError, match=r"both directions .*is_decoder"):
        ModelRunner(tiny("bert", is_decoder=False), "base")
    with pytest.raises(ModelError, match=r"both directions .*use_bidirectional_attention"):
        ModelRunner(tiny("gemma3_text", use_bidirectional_attention=True), "base")


@pytest.mark.parametrize(
    ("name", "limit", "reason"),
    [("moshi", 6, "its window"), ("doge+keep4", 4, "keep_window_size"), ("llama+dynamic", 32, "dynamic RoPE")],
)
def test_networks_are_exact_up_to_where_they_go_by_the_batch(name, limit, reason):
    model = ModelRunner(tiny(name), name)
    assert model.max_positions == limit
    rows, g = [model.open([1]), model.open([2])], torch.Generator().manual_seed(0)
    for sizes in ((1, limit - 2), (1, 1)):
        new = [torch.randint(1, 257, (n,), generator=g).tolist() for n in sizes]
        for row, out in zip(rows, model.last_outputs(rows, new), strict=True):
            compare(out, outputs_of(model, row.ids), 1e-3)
    with pytest.raises(PromptError, match=f"at most {limit} tokens .*{reason}"):
        model.last_outputs(rows[:1], [[5] * limit])
    reader = CachedLM(ModelRunner(model.network, "base"), byte_tokenizer())
    with pytest.raises(PromptError, match=rf"context of base \({limit}: beyond, .*{reason}"):
        reader.check_length(Prompt("x" * 40), 1)


def test_tokens_of_padding_have_no_position():
    """RoBERTa counts from padding_idx + 1 and leaves padding out, also where it stands in the text."""
    model = ModelRunner(tiny("roberta", pad_token_id=3), "base")
    assert model.max_positions == 256 - 4
    rows = [model.open([5]), model.open([5])]
    for new in ([[5, 3, 7, 3], [3]], [[8], [9, 3, 3, 4]], [[3], [10]]):
        for row, out in zip(rows, model.last_outputs(rows, new), strict=True):
            compare(out, outputs_of(model, row.ids), 1e-3)


# Rotary factors that go by the length of the text


def longrope(name, seed=1, **more):
    shape = (
        {}
        if name != "minicpm3"
        else {"rope_parameters": {**LONGROPE["rope_parameters"], "short_factor": [1.0, 1.1], "long_factor": [1.5, 2.0]}}
    )
    if name == "phimoe":
        shape = {"rope_parameters": {**LONGROPE["rope_parameters"], **MSCALES}}
    return tiny(name, seed, **{**LONGROPE, **shape, **more})


@pytest.mark.parametrize("name", ["phi3", "phimoe", "minicpm3", "llama"])
def test_rows_on_both_sides_of_the_limit(name):
    """Short rows beside long ones, prompts in pieces, rows that grow over the limit or are cut below it."""
    network = longrope(name)
    for seed, row_tokens in ((0, 5), (1, 2048)):
        wander(ModelRunner(network, name, PassLimits(row_tokens=row_tokens)), random.Random(seed), 256, 2e-3)


def test_every_position_has_the_factors_of_its_own_prefix():
    model = ModelRunner(longrope("phi3"), "phi3", PassLimits(row_tokens=5))
    plain = naive.PrefixByPrefix(model.network)
    ids = [list(range(1, 31)), list(range(40, 49))]
    rows = [model.open(ids[0][:1]), model.open(ids[1][:1])]
    got = {0: [], 1: []}
    for i, out in model.forward(rows, ids, [30, 9]):
        got[i].append(out)
    for i in (0, 1):
        compare(torch.cat(got[i]), naive.outputs(plain, ids[i]), 1e-3)


def test_beams_that_cross_the_limit_together_share_their_prefix(monkeypatch):
    model = ModelRunner(longrope("phi3"), "phi3")
    root = model.open(list(range(1, 10)))
    model.last_outputs([root], [list(range(1, 10))])
    rows = [root, *(model.fork(root) for _ in range(3))]
    model.last_outputs(rows, [[50 + i, 60 + i] for i in range(4)])
    read, forward = [], model.cache.forward
    monkeypatch.setattr(model.cache, "forward", lambda rows, new, keep: read.append(sum(map(len, new))) or forward(rows, new, keep))
    for row, out in zip(rows, model.last_outputs(rows, [[70, 71 + i] for i in range(4)]), strict=True):
        compare(out, outputs_of(model, row.ids), 1e-3)
    assert len({row.group for row in rows}) == 1
    assert sum(read) == 9 + 4 * 4  # what they share once, the rest for each


def test_phi3_equals_transformers_generate_over_the_border():
    network = longrope("phi3")
    reader = CachedLM(ModelRunner(network, "base"), byte_tokenizer())
    prompts = ["I am", "What a long prompt this one is", "never a", "abc"]
    sampling = SamplingParams(max_new_tokens=16, temperature=0)
    requests = [Request(Prompt(p), get_method("base").search({}), sampling, 0) for p in prompts]
    done = dict(Searcher(TransformersEngine(reader)).run(requests))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([reader.tokenizer(prompt).input_ids], device=reader.model.device)
        expected = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
        assert list(done[i].token_ids) == expected


def test_guidance_and_values_over_the_border_equal_naive():
    networks = {role: longrope("phi3", seed, num_hidden_layers=2) for role, seed in (("base", 1), ("tuned", 2), ("untuned", 3))}
    base, tuned, untuned = (CachedLM(ModelRunner(network, role), byte_tokenizer()) for role, network in networks.items())
    plain = {role: naive.PrefixByPrefix(network) for role, network in networks.items()}
    values, reference = {"implicit": ImplicitValue(tuned, untuned)}, {"implicit": naive.Implicit(plain["tuned"], plain["untuned"])}
    s = get_method("ivg", width=2, successors=2, chunk_length=4, select="implicit")
    sampling = SamplingParams(max_new_tokens=8)
    prompts = ["I am fine", "What a prompt this is"]
    done = dict(Searcher(TransformersEngine(base)).run([Request(Prompt(p), s.search(values), sampling, 5) for p in prompts]))
    for i, prompt in enumerate(prompts):
        tokens, score = naive.search(plain["base"], reference, s, base.tokenizer(prompt).input_ids, 5, 1.0, 8)
        assert list(done[i].token_ids) == tokens
        assert done[i].score == pytest.approx(score, abs=1e-3)


def test_a_network_whose_factors_cannot_be_held_ends_at_the_border(monkeypatch):
    from ivg.models import support

    monkeypatch.setattr(support, "rotary_modules", lambda network: [])
    model = ModelRunner(longrope("phi3"), "base")
    assert model.max_positions == BORDER
    with pytest.raises(PromptError, match=f"at most {BORDER} tokens .*LongRoPE"):
        model.last_outputs([model.open([1])], [[1] * 13])


def test_the_network_is_left_as_it_was():
    network = longrope("phi3")
    short, long = list(range(1, 9)), list(range(1, 20))
    before = [naive.outputs(network, ids) for ids in (short, long)]
    model = ModelRunner(network, "phi3")
    model.last_outputs([model.open(short), model.open(long)], [short, long])
    assert all(torch.equal(naive.outputs(network, ids), b) for ids, b in zip((short, long), before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


# One row never changes another


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_row_of_nan_changes_no_other(name):
    """The embedding of token 9 is NaN; rows beside, forks of its parent and rows that take its memory stay as they are alone."""
    network = longrope(name) if name == "phi3" else tiny_model(name)
    with torch.no_grad():
        network.get_input_embeddings().weight[9] = torch.nan
    model = ModelRunner(network, name)
    first = model.open(list(range(20, 28)))
    model.last_outputs([first], [list(range(20, 28))])
    rows = [first, model.fork(first), model.fork(first)]
    for new in ([[30], [9], [31]], [[40, 41], [42, 43], [44]], [[50] * 3, [51], [52] * 4]):
        out = model.last_outputs(rows, new)
        assert out[1].isnan().any()
        for k in (0, 2):
            compare(out[k], outputs_of(model, rows[k].ids), 1e-3)
    model.free(rows[1])
    again = model.fork(rows[0])
    compare(model.last_outputs([again], [[60]])[0], outputs_of(model, again.ids), 1e-3)


def test_the_lists_of_refusals_name_types_that_there_are():
    assert set(REASONS) | set(NOT_BUILT) | set(FAST) <= set(NAMES)
    assert set(VARIANTS) <= set(NAMES)


# Classifiers, which read whole texts in padded batches


def classifier(name, **more):
    from transformers import AutoModelForSequenceClassification

    from architectures import randomise, tiny_config

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(name, num_labels=1, **more)).eval()
    randomise(model, 0)
    return model


@pytest.mark.parametrize(("name", "more"), [("phi3", LONGROPE), ("qwen3_next", {}), ("bloom", {})])
def test_a_reward_does_not_depend_on_the_texts_beside_it(name, more):
    reward = RewardModel(classifier(name, **more), byte_tokenizer())
    texts = ["I am", "never again", "What a long text this one is, longer than the border", "and on it goes"]
    together = reward.rewards(texts)[0]
    assert together == pytest.approx([reward.rewards([t])[0][0] for t in texts], abs=1e-4)
    for text, score in zip(texts, together, strict=True):
        with torch.no_grad():
            assert float(reward.network(torch.tensor([reward.ids(text)])).logits[0, 0]) == pytest.approx(score, abs=1e-4)


def test_positions_of_roberta_end_before_its_table():
    reward = RewardModel(classifier("roberta", pad_token_id=3, max_position_embeddings=40), byte_tokenizer())
    assert context_of(reward.network) == 36
    assert reward.rewards(["a" * 36])[1] == [36]
    with pytest.raises((IndexError, RuntimeError)):
        reward.network(torch.full((1, 37), 5))


# Networks whose code comes with the checkpoint

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **other):
        {change}
        return super().forward(input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **other)
"""


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sound", "pass", None),
        (
            "columns",
            "position_ids = torch.arange(input_ids.shape[1])[None]",
            r"^base: OwnForCausalLM gives other outputs .*\n  expected",
        ),
        ("forgets", "past_key_values = None", r"^base: OwnForCausalLM gives other outputs .*\n  expected a decoder"),
        (
            "raises",
            "assert past_key_values is None, 'no such cache'",
            r"^base: OwnForCausalLM cannot be read in pieces behind its own cache: no such cache\n",
        ),
    ],
)
def test_networks_with_remote_code_are_tested_at_load(kind, change, message, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / f"code_{kind}.py").write_text(CODE.format(change=change))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": f"code_{kind}.OwnConfig", "AutoModelForCausalLM": f"code_{kind}.OwnForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = LoadOptions("cpu", "float32", trust_remote_code=True)
    if message is None:
        model = load_causal(tmp_path, "base", options).model
        assert model.live_rows == 0
        compare(model.last_outputs([model.open([1, 2])], [[1, 2]])[0], outputs_of(model, [1, 2]), 1e-3)
    else:
        with pytest.raises(ModelError, match=message):
            load_causal(tmp_path, "base", options)
