"""What a network's configuration says of its context, and the precision that its cache is judged by."""

import pytest
import torch

from architectures import tiny
from ivg import GuidedModel
from ivg.errors import ContextLengthError
from ivg.models.cache import PassLimits
from ivg.models.cached_lm import CachedLM
from ivg.models.choose_cache import choose_cache
from ivg.models.runner import ModelRunner
from ivg.models.state_cache import StateCache
from ivg.models.support import check_support, context_of
from ivg.testing import byte_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CONTEXTS = {
    "MPT": ("mpt", {"max_seq_len": 32}, 32),
    "Whisper": ("whisper", {"max_target_positions": 32}, 32),
    "GPT-2": ("gpt2", {"n_positions": 32}, 32),
    "as in Qwen's instructions": ("llama", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),
    "as DeepSeek has it": ("llama", {"max_position_embeddings": 128, "rope_parameters": YARN}, 128),
    "longer than that": ("llama", {"max_position_embeddings": 200, "rope_parameters": YARN}, 200),
    "linear": ("llama", {"max_position_embeddings": 32, "rope_parameters": LINEAR}, 32),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_that_a_configuration_names(case):
    name, settings, expected = CONTEXTS[case]
    assert context_of(tiny(name, **settings)) == expected


@pytest.mark.parametrize("name,setting", [("mpt", "max_seq_len"), ("whisper", "max_target_positions")])
def test_a_prompt_beyond_it_is_refused(name, setting):
    lm = CachedLM(ModelRunner(tiny(name, **{setting: 32}), "base"), byte_tokenizer())
    model = GuidedModel(lm)
    with pytest.raises(ContextLengthError, match=r"context of base \(32\)"):
        model.generate("a" * 30, "base", max_new_tokens=8)
    assert len(model.generate("a" * 24, "base", max_new_tokens=8, ignore_eos=True).token_ids) == 8


def test_yarn_reads_beyond_the_original_context_as_transformers_does():
    network = tiny("llama", max_position_embeddings=32, rope_parameters=YARN)
    model = GuidedModel(CachedLM(ModelRunner(network, "base"), byte_tokenizer()))
    ids = model.reader.tokenizer("a" * 50, return_tensors="pt").input_ids
    got = model.generate("a" * 50, "base", temperature=0, max_new_tokens=12, ignore_eos=True)
    network.generation_config.eos_token_id = None
    expected = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert list(got.token_ids) == expected[0, 50:].tolist()
    with pytest.raises(ContextLengthError, match="128"):
        model.generate("a" * 120, "base", max_new_tokens=12)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_rounding_is_judged_by_the_dtype_of_the_network(name):
    """These give logits in float32, whatever they compute in."""
    network = tiny(name).to(torch.bfloat16)
    assert network(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert isinstance(choose_cache(network, check_support(network, name), PassLimits(), name), StateCache)
