"""Models on several devices, run by test_devices.py in a process of its own: two devices that are made up, or GPUs.

``IVG_CHECK_DEVICES=fake:0,fake:1 python -m pytest tests/device_checks.py``
"""

import copy
import os
import random
from contextlib import nullcontext

import pytest
import torch
from accelerate import dispatch_model

from architectures import tiny
from fake_devices import TYPE, fake_devices
from ivg import GuidedModel
from ivg.diagnostics.preference_check import CheckSettings, check_preferences
from ivg.diagnostics.sweep import SweepSettings
from ivg.integrations.transformers import GuidanceLogitsProcessor
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.slot_cache import SlotCache
from ivg.models.state_cache import StateCache
from ivg.testing import byte_tokenizer, models, tiny_model, tiny_value
from ivg.types import Preference, Prompt, SamplingParams, TokenGuidance
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue
from ivg.values.reward import RewardModel
from naive import compare, outputs_of, wander

FIRST, SECOND = os.environ.get("IVG_CHECK_DEVICES", "fake:0,fake:1").split(",")
models.DEVICE = "cpu"  # where the plain models stay

METHODS = {
    "base": {},
    "cbs-explicit": {"width": 2, "successors": 2, "chunk_length": 4},
    "eft": {},
    "ivg": {"width": 2, "successors": 2, "chunk_length": 4, "record": True, "alternatives": 2},
    "pair drafts": {"method": "eft", "draft": 2},
    "pair drafts, beta 2": {"method": "eft", "draft": 2, "beta": 2.0},
    "genarm": {},
    "candidates": {"method": "custom", "token": "explicit", "candidates": 5},
    "gate": {"method": "eft", "gate": 0.5},
    "composite": {"method": "custom", "weights": {"implicit": 0.5, "explicit": 0.5, "arm": 0.2}},
    "composite selects": {"method": "custom", "select_weights": {"implicit": 0.5, "explicit": 2.0}, "successors": 3, "chunk_length": 4},
    "bon": {"method": "bon", "select": "reward", "successors": 3},
    "cards": {},
    "contrast": {"contrast": "Answer in one word.", "beta": 1.5},
    "smc": {"method": "smc"},
    "rsd": {"acceptance": "sigmoid", "accept_threshold": 0.0, "chunk_length": 4},
    "gsi": {"acceptance": "sigmoid", "accept_threshold": 0.0, "chunk_length": 4, "successors": 2},
    "mcts": {"width": 2, "successors": 2, "chunk_length": 4},
}


@pytest.fixture
def copies():
    """Copies from device to device, as far as they are counted."""
    with fake_devices() if FIRST.startswith(TYPE) else nullcontext({}) as found:
        yield found


@pytest.mark.parametrize("other", ["cpu", SECOND])
def test_tensors_of_two_devices_do_not_meet(other, copies):
    """The devices that are made up refuse what GPUs refuse: else the tests below could not fail."""
    a, b = torch.ones(2, 2, device=FIRST), torch.ones(2, 2, device=other)
    row = torch.tensor([0], device=FIRST)
    for mix in (
        lambda: a + b, lambda: a @ b, lambda: torch.cat([a, b]), lambda: a.index_select(0, b[0].long()), lambda: a.gather(1, b.long()),
        lambda: a.index_put_((row,), b[:1]), lambda: a.sub_(b), lambda: torch.where(a > 0, a, b),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="device"):
            mix()
    assert (a + b.to(a.device))[torch.tensor([0])].tolist() == [[2.0, 2.0]]


def networks():
    return {
        "base": tiny_model(seed=0),
        "tuned": tiny_model(seed=1),
        "untuned": tiny_model(seed=2),
        "explicit": tiny_value(seed=3).network,
        "arm": tiny_model("gpt2", seed=4),
    }


def guided(place):
    """A model of these networks, each where ``place`` says."""
    tokenizer = byte_tokenizer()
    found = {name: CachedLM(ModelRunner(network.to(place[name]), name), tokenizer) for name, network in networks().items()}
    values = {
        "implicit": ImplicitValue(found["tuned"], found["untuned"]),
        "explicit": ExplicitValue(found["explicit"]),
        "arm": AutoregressiveReward(found["arm"]),
        "reward": RewardModel(classifier().to(place["explicit"]), tokenizer),
    }
    return GuidedModel(found["base"], values)


def classifier():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        num_labels=1,
        pad_token_id=0,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("name", METHODS)
def test_answers_do_not_depend_on_where_models_lie(name, copies):
    settings = {"method": name, "max_new_tokens": 10, "seed": 3, "temperature": 0.7} | METHODS[name]
    expected = guided(dict.fromkeys(networks(), "cpu")).generate(["The film", "It"], **settings)
    place = {"base": FIRST, "tuned": SECOND, "untuned": FIRST, "explicit": SECOND, "arm": "cpu"}
    got = guided(place).generate(["The film", "It"], **settings)
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert [c.score for c in got] == pytest.approx([c.score for c in expected], abs=1e-3)


def test_a_guide_elsewhere_costs_one_copy_a_step(copies):
    if not FIRST.startswith(TYPE):
        pytest.skip("copies are counted on devices that are made up")
    model = guided({"base": FIRST, "tuned": SECOND, "untuned": SECOND, "explicit": "cpu", "arm": "cpu"})
    copies.clear()
    completion = model.generate("The film", "eft", max_new_tokens=12, temperature=0)
    assert copies[f"{SECOND} -> {FIRST}"] == len(completion.token_ids)
    assert not copies[f"{FIRST} -> {SECOND}"]


def test_preferences_are_measured_alike(copies):
    pairs = [Preference(Prompt(f"Film {i}"), f" is good{i}", " was so bad") for i in range(3)]
    sampling = SamplingParams(max_new_tokens=4)
    settings = CheckSettings(SweepSettings(batch=2, samples=2, sampling=sampling), prompts=2, guide="implicit")
    place = {"base": FIRST, "tuned": SECOND, "untuned": FIRST, "explicit": SECOND, "arm": "cpu"}
    expected, got = (check_preferences(guided(where), pairs, settings) for where in (dict.fromkeys(networks(), "cpu"), place))
    assert [row.kl.mean for row in got.sweep] == pytest.approx([row.kl.mean for row in expected.sweep], abs=1e-3)
    assert got.divergence_on_chosen.guided_base == pytest.approx(expected.divergence_on_chosen.guided_base, abs=1e-3)


def test_guidance_inside_transformers_by_a_pair_elsewhere(copies):
    tokenizer, texts = byte_tokenizer(), []
    for device, other in (("cpu", "cpu"), (FIRST, SECOND)):
        found = {name: network.to(other) for name, network in networks().items() if name in ("tuned", "untuned")}
        pair = ImplicitValue(*(CachedLM(ModelRunner(network, name), tokenizer) for name, network in found.items()))
        base = tiny_model(seed=0).to(device)
        ids = torch.tensor([tokenizer("The film").input_ids]).to(device)
        with GuidanceLogitsProcessor(TokenGuidance(pair, 1.0), tokenizer) as processor:
            texts.append(base.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[processor]).tolist())
    assert texts[0] == texts[1]


def spread(network):
    """``network`` over two devices, as from_pretrained(device_map=…) leaves it: embedding and first layers, then the others."""
    body, prefix, place = network.base_model, network.base_model_prefix, {}
    for name, child in body.named_children():
        if isinstance(child, torch.nn.ModuleList):
            place |= {f"{prefix}.{name}.{i}": FIRST if i < len(child) // 2 else SECOND for i in range(len(child))}
        else:
            place[f"{prefix}.{name}"] = SECOND if "norm" in name or name == "ln_f" else FIRST
    place["lm_head"] = FIRST if network.config.tie_word_embeddings else SECOND
    return dispatch_model(network, place, main_device=FIRST, force_hooks=True)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "mixtral"])
def test_rows_of_a_network_over_two_devices_are_exact(architecture, copies):
    plain = tiny_model(architecture, seed=1)
    model = ModelRunner(spread(copy.deepcopy(plain)), "base")
    assert (str(model.device), type(model.cache)) == (FIRST, SlotCache)
    wander(model, random.Random(7), 256, 1e-4)
    row = model.open([1, 2, 3])
    compare(model.last_outputs([row], [[1, 2, 3]])[0], outputs_of(ModelRunner(plain, "base"), [1, 2, 3]), 1e-4)
    assert model.cache.network.groups_prefixes  # attention by prefix groups on both
    assert {str(t.device) for t in model.cache.memory.prefixes.tensors} == ({FIRST, SECOND} if SECOND != "cpu" else {FIRST})  # offloaded


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "qwen3_next", "bloom"])
def test_transformers_own_cache_over_two_devices_is_exact(kind, copies):
    model = ModelRunner(spread(tiny(kind)), "base")
    assert (str(model.device), type(model.cache)) == (FIRST, StateCache)
    wander(model, random.Random(7), 20, 1e-3)


def test_a_value_network_over_two_devices(copies):
    value = tiny_value(seed=3)
    body = value.network.backbone
    ids = [1, 2, 3, 4]
    expected = outputs_of(value.model.model, ids)
    place = {"embed_tokens": FIRST, "layers.0": FIRST, "layers.1": SECOND, "norm": SECOND, "rotary_emb": FIRST}
    value.network.backbone = dispatch_model(body, place, main_device=FIRST, force_hooks=True)
    value.network.head.to(FIRST)
    model = ModelRunner(value.network, "explicit")
    compare(model.last_outputs([model.open(ids)], [ids])[0], expected, 1e-4)
