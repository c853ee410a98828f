"""Adapters that were trained after tokens had been added: their embeddings have more rows than the network."""

import pytest
import torch
from test_one_weight_set import EXACT, write_adapter

from ivg import GuidedModel
from ivg.errors import ModelError
from ivg.models.loading import LoadOptions, load_causal
from ivg.models.shared import SharedNetworks
from ivg.settings.models import ModelRef
from ivg.testing import byte_tokenizer, tiny_model

peft = pytest.importorskip("peft", reason="no peft: pip install -c constraints.txt -e '.[train]'")

OPTIONS = LoadOptions(**EXACT)


def grown(folder, *, tied=False, **settings):
    """A network, and an adapter of it with two tokens more, with its tokenizer, as TRL's ``setup_chat_format`` makes them."""
    network, tokenizer = tiny_model("llama", 1, context=64), byte_tokenizer()
    network.config.tie_word_embeddings = tied
    network.tie_weights()
    network.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    network.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(0)
    made = peft.get_peft_model(network, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    made.peft_config["default"].base_model_name_or_path = str(folder / "base")
    made.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder


CASES = {
    "whole modules": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "(lm_head|model.embed_tokens)"),
    "one of them": ({"modules_to_save": ["lm_head"]}, "(lm_head|model.embed_tokens)"),
    "adapted ones": ({"target_modules": ["q_proj", "embed_tokens"]}, "(lm_head|model.embed_tokens)"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_that_tokens_were_added(tmp_path, case):
    settings, layer = CASES[case]
    folder = grown(tmp_path, **settings)
    message = rf"has 259 rows of {layer}, and its network has 257: tokens were added .*\n.*resize_token_embeddings\(259\)"
    with pytest.raises(ModelError, match=message):
        load_causal(str(folder / "adapter"), "base", OPTIONS)
    shared = SharedNetworks()
    before = shared.load(str(folder / "base"), "base", OPTIONS)
    with pytest.raises(ModelError, match=message):
        shared.load(ModelRef(path=str(folder / "base"), adapter=str(folder / "adapter")), "tuned", OPTIONS)
    assert len(before.network.get_input_embeddings().weight) == 257


def test_whole_modules_of_the_same_size_are_read_beside_each_other(tmp_path):
    """Also a second one, when the first has replaced the network's."""
    tiny_model("llama", 1, context=64).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for seed in (5, 6):
        write_adapter(tmp_path / str(seed), tmp_path / "base", seed, modules_to_save=["embed_tokens", "lm_head"])
    base = str(tmp_path / "base")
    refs = [ModelRef(path=base, adapter=str(tmp_path / name)) for name in ("5", "6")]
    model = GuidedModel.from_pretrained(base, tuned=refs[0], untuned=refs[1], options=OPTIONS)
    assert len(model.generate("I", "eft", max_new_tokens=3, ignore_eos=True).token_ids) == 3
