"""LoRA adapters inside the composite: one set of weights, and the outputs of the transformers engine and of merged models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from making import make, make_adapter, merge, models, prompts
from transformers import AutoModelForCausalLM

from ivg.errors import ConfigError, ModelError
from ivg.factory.recipe import load_models
from ivg.settings.recipe import Recipe

peft = pytest.importorskip("peft", reason="no peft in this environment: scripts/vllm_cpu.sh")

GREEDY = {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True}
BETAS = (0.0, 0.5, 1.0, 2.0)
WINDOWS = {"arguments": {"disable_hybrid_kv_cache_manager": True}}


def greedy(model):
    return {beta: [c.token_ids for c in model.generate(prompts(), "eft", beta=beta, **GREEDY)] for beta in BETAS}


def composite(model):
    return model.engine.client.llm_engine.model_executor.driver_worker.worker.model_runner.model


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mistral-window", "opt"])
def test_greedy_tokens_are_those_of_the_transformers_engine(folder, kind):
    """Fused and plain layers, biases, tied and transposed weights; names with and without the network's prefix."""
    base = make(folder, kind, 1)
    paths = {"base": base, "tuned": {"path": base, "adapter": make_adapter(folder, kind, 5), "scale": 0.5}, "untuned": base}
    with (
        models("transformers", models=paths) as slow,
        models("vllm", models=paths, search={"method": "eft"}, vllm=WINDOWS if "window" in kind else {}) as fast,
    ):
        assert fast.engine.submodels == ("base", "tuned"), "untuned has the base's outputs"
        expected = greedy(slow)
        assert len({tuple(tokens) for tokens in expected.values()}) == len(BETAS)
        assert greedy(fast) == expected


def test_experts_are_those_of_each_network(folder):
    """Experts are found by name, and another network comes between the two that share theirs."""
    base, adapter = make(folder, "experts", 1), make_adapter(folder, "experts", 5, target_modules=["q_proj", "v_proj", "o_proj"])
    paths = {"base": base, "tuned": make(folder, "experts", 2), "untuned": {"path": base, "adapter": adapter}}
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "eft"}) as fast:
        assert greedy(fast) == greedy(slow)


@pytest.fixture(scope="module")
def pair(folder):
    """(paths with adapters of the base, of tuned and of a further value; the same as merged models)."""
    base = make(folder, "llama", 1)
    first = make_adapter(folder, "llama", 5)
    second = make_adapter(folder, "llama", 6, r=3, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"])
    with_adapters = {
        "models": {"base": {"path": base, "adapter": second}, "tuned": {"path": base, "adapter": first, "scale": 0.5}, "untuned": base},
        "values": {"more": {"tuned": {"path": base, "adapter": first}, "untuned": base}},
    }
    half, whole, own = merge(base, first, 0.5), merge(base, first, 1.0), merge(base, second, 1.0)
    merged = {"models": {"base": own, "tuned": half, "untuned": base}, "values": {"more": {"tuned": whole, "untuned": base}}}
    return with_adapters, merged


def next_logprobs(model, text, beta):
    """Of the token after ``text``, as vLLM gives them, [vocabulary]."""
    from vllm import SamplingParams

    ids = model.base.tokenizer(text).input_ids
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, extra_args={"ivg_beta.implicit": beta, "ivg_beta.more": 0.3})
    model.engine.client.add(ids, params)
    while not (done := [o.output for o in model.engine.client.step() if o.output.finished]):
        pass
    found = done[0].outputs[0].logprobs[0]
    return torch.tensor([found[token].logprob for token in range(len(found))])


def check_shared(network):
    """The submodels have all modules with weights in common, and attention layers of their own."""
    from vllm.model_executor.layers.attention import Attention

    parts = ("base", "tuned", "untuned", "more_tuned")
    weights, attention = {}, {}
    for part in parts:
        layers = set(network.get_submodule(part).modules())
        attention[part] = {layer for layer in layers if isinstance(layer, Attention)}
        weights[part] = {layer for layer in layers - attention[part] if hasattr(layer, "quant_method") or type(layer).__name__ == "RMSNorm"}
    assert len(weights["base"]) == 3 * (4 + 2) + 3, "four linear layers and two norms in each layer; embedding, head and the last norm"
    assert all(weights[part] == weights["base"] for part in parts)
    assert len(set.union(*attention.values())) == len(parts) * 3
    assert {layer.layer_name for layer in attention["tuned"]} == {f"tuned.model.layers.{i}.self_attn.attn" for i in range(3)}


def test_adapters_of_one_network_equal_merged_models(pair):
    """Base, tuned and a second value, each with an adapter or a scale of its own, beside the network without one."""
    with_adapters, merged = pair
    weights = {"implicit": 1.2, "more": 0.3}
    tables = {"search": {"method": "eft", "weights": weights}, "vllm": {"arguments": {"max_logprobs": -1}}}
    found = {}
    for name, own in (("adapters", with_adapters), ("merged", merged)):
        with models("vllm", **own, **tables) as model:
            if name == "adapters":
                check_shared(composite(model))
            logprobs = [next_logprobs(model, text, beta) for text in prompts(4) for beta in (0.0, 1.0)]
            tokens = [c.token_ids for c in model.generate(prompts(), "eft", weights=weights, **GREEDY)]
            found[name] = (logprobs, tokens, model.engine.submodels, [c.token_ids for c in model.generate(prompts(), "base", **GREEDY)])
    assert found["adapters"][2] == found["merged"][2] == ("base", "tuned", "untuned", "more_tuned")
    assert found["adapters"][1] == found["merged"][1] != found["adapters"][3] == found["merged"][3]
    for one, two in zip(found["adapters"][0], found["merged"][0], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)
    with models("transformers", **with_adapters) as slow:
        assert [c.token_ids for c in slow.generate(prompts(), "eft", weights=weights, **GREEDY)] == found["adapters"][1]
    parts = {part: merged["models"][part] for part in ("base", "tuned", "untuned")} | {"more": merged["values"]["more"]["tuned"]}
    networks = {part: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for part, path in parts.items()}
    from ivg.models.loading import LoadOptions, load_tokenizer

    tokenizer = load_tokenizer(parts["untuned"], LoadOptions(), "base")
    expected = []
    for text in prompts(4):
        with torch.no_grad():
            z = {part: network(torch.tensor([tokenizer(text).input_ids])).logits[0, -1] for part, network in networks.items()}
        for beta in (0.0, 1.0):
            mixed = z["base"] + beta * (z["tuned"] - z["untuned"]) + 0.3 * (z["more"] - z["untuned"])
            expected.append(mixed.log_softmax(-1))
    for one, two in zip(found["adapters"][0], expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_a_base_with_an_adapter_needs_no_guides(folder, tmp_path):
    """Also as a path of its own: an adapter names its network."""
    base, adapter = make(folder, "llama", 1), shutil.copytree(make_adapter(folder, "llama", 5), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with (
        models("transformers", models={"base": str(adapter)}) as slow,
        models("vllm", models={"base": str(adapter)}, search={"method": "base"}) as fast,
    ):
        expected = [c.token_ids for c in slow.generate(prompts(), "base", **GREEDY)]
        assert [c.token_ids for c in fast.generate(prompts(), "base", **GREEDY)] == expected
    with models("transformers", models={"base": base}) as plain:
        assert [c.token_ids for c in plain.generate(prompts(), "base", **GREEDY)] != expected


def test_what_cannot_be_added_exactly_is_refused(folder):
    base, adapter = make(folder, "llama", 1), make_adapter(folder, "llama", 5)
    own = {"models": {"base": base, "tuned": {"path": base, "adapter": adapter}, "untuned": base}, "search": {"method": "eft"}}
    with pytest.raises(ConfigError, match="tuned has an adapter; inside vLLM that works on one GPU, got tensor_parallel_size=2"):
        load_models(Recipe.parse(own | {"run": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 2}}))
    place = make(folder, "bloom", 1)
    own["models"] = {"base": place, "tuned": {"path": place, "adapter": make_adapter(folder, "bloom", 5)}, "untuned": place}
    with pytest.raises(ModelError, match=r"changes .*\.query_key_value, whose weights vLLM keeps in another order"), models("vllm", **own):
        pass


def test_an_adapter_that_changed_since_the_export_is_refused(folder, tmp_path):
    from ivg.engines.vllm.client import EngineClient, EngineClientOptions
    from ivg.engines.vllm.export import export_composite, pair
    from ivg.settings.models import ModelRef

    base, adapter = make(folder, "llama", 1), Path(shutil.copytree(make_adapter(folder, "llama", 5), tmp_path / "adapter"))
    made = export_composite(base, [pair(ModelRef(path=base, adapter=str(adapter)), base)], tmp_path / "composite")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    with pytest.raises(ModelError, match=r"the adapter of tuned in .* has changed since this composite was exported"):
        EngineClient(made, EngineClientOptions("float32", 128, 8, enforce_eager=True), guided=True)
