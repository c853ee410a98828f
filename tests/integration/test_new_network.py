"""New networks of a model's architecture: what is changed, what follows, what is refused, what a run records."""

import json

import pytest
import torch
from transformers import AutoConfig

from ivg import testing
from ivg.errors import ConfigError
from ivg.models.loading import LoadOptions, load_causal
from ivg.settings.train import SFTSettings
from ivg.training.data import SFTExample

pytest.importorskip("trl")
from trl import SFTConfig

from ivg.models.training_rows import read_training_rows, row_hashes
from ivg.training import trainer, tune
from ivg.training.new_network import changed_config, new_network, parse_overrides
from ivg.training.run_dir import open_run

SMALL = "hidden_size=48,num_hidden_layers=1,num_attention_heads=3,num_key_value_heads=1,intermediate_size=40"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with tied embeddings, and two ends of sequence in its generation config only."""
    folder = tmp_path_factory.mktemp("model")
    network = testing.tiny_model()
    network.config.tie_word_embeddings = True
    network.tie_weights()
    network.generation_config.eos_token_id = [0, 5]
    network.save_pretrained(folder)
    testing.byte_tokenizer().save_pretrained(folder)
    return folder


def test_the_configuration_is_changed_and_weights_are_new(model):
    torch.manual_seed(3)
    network, tokenizer = new_network(model, SMALL)
    config = network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (48, 1, 3, 1)
    assert config.head_dim == 16  # follows: hidden size / heads, as in the model
    assert (config.intermediate_size, config.vocab_size) == (40, len(tokenizer))
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert network.dtype == torch.float32
    assert network.generation_config.eos_token_id == [0, 5]
    assert network.num_parameters() == 257 * 48 + 48 * (48 + 16 + 16 + 48) + 3 * 48 * 40 + 3 * 48
    torch.manual_seed(3)
    again, _ = new_network(model, SMALL)
    other, _ = new_network(model, SMALL)
    assert torch.equal(again.lm_head.weight, network.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, network.lm_head.weight)


@pytest.mark.parametrize("architecture", testing.ARCHITECTURES)
def test_every_architecture(tmp_path, architecture):
    testing.tiny_model(architecture).save_pretrained(tmp_path)
    testing.byte_tokenizer().save_pretrained(tmp_path)
    network, _ = new_network(tmp_path, "num_hidden_layers=1,num_attention_heads=2,hidden_size=16")
    assert (network.config.hidden_size, network.config.num_hidden_layers) == (16, 1)
    network.save_pretrained(tmp_path / "new")
    assert AutoConfig.from_pretrained(tmp_path / "new").num_attention_heads == 2


def test_heads_of_a_size_of_their_own_keep_it():
    config = testing.tiny_model("qwen3").config
    config.head_dim = 12  # not 32 / 4
    assert changed_config(config, {"num_attention_heads": 2, "num_key_value_heads": 1}).head_dim == 12
    config.num_key_value_heads = 4
    assert changed_config(config, {"num_attention_heads": 2}).num_key_value_heads == 2
    assert config.num_attention_heads == 4  # the configuration itself stays


def test_settings_of_single_layers_are_those_of_the_first():
    config = testing.tiny_model("gemma3_text").config
    assert changed_config(config, {"num_hidden_layers": 1}).layer_types == ["sliding_attention"]
    with pytest.raises(ConfigError, match="layer_types is for 2 layers\n  give layer_types, too"):
        changed_config(config, {"num_hidden_layers": 3})
    three = parse_overrides('num_hidden_layers=3,layer_types=["full_attention","full_attention","sliding_attention"]')
    assert changed_config(config, three).layer_types[2] == "sliding_attention"


def test_overrides_are_parsed():
    assert parse_overrides("a=1, b=0.5,c=true,d=gelu,e=[1,2]") == {"a": 1, "b": 0.5, "c": True, "d": "gelu", "e": [1, 2]}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("hidden_sise=96", r"llama has no setting hidden_sise\n  expected some of .*hidden_size.*tie_word_embeddings"),
        ("hidden_size", r"got 'hidden_size'\n  expected NAME=VALUE"),
        ("hidden_size=8,hidden_size=16", "each name once"),
        ("hidden_size=big", r"hidden_size='big'\n  expected a value like 32"),
        ("hidden_size=true", "hidden_size=True"),
        ("hidden_size=-8", "expected 0 or more"),
        ("hidden_size=30", "hidden_size=30 is no multiple of num_attention_heads=4"),
        ("num_attention_heads=3,hidden_size=48", "num_attention_heads=3 is no multiple of num_key_value_heads=2"),
        ("vocab_size=100", "vocab_size=100, and the tokenizer has 257 tokens"),
        ("hidden_act=gloo", "no network can be made with hidden_act=gloo"),
    ],
)
def test_what_is_refused(model, overrides, says):
    with pytest.raises(ConfigError, match=says):
        new_network(model, overrides)


def test_a_new_network_has_no_adapter():
    with pytest.raises(ConfigError, match="config_overrides makes a new network, got mode=lora"):
        SFTSettings(config_overrides=SMALL, mode="lora")
    assert SFTSettings(config_overrides=SMALL).learning_rate == 1e-3
    assert SFTSettings(config_overrides=SMALL, learning_rate=2e-3).learning_rate == 2e-3


def test_it_learns_plain_texts_and_says_what_it_is(model, tmp_path):
    """Every token of a text without a prompt is in the loss; nothing of the model's own training rows remains."""
    import numpy as np

    np.save(model / "training_rows.npy", np.array([7], np.uint64))
    rows = [SFTExample(None, "abcd" * (2 + i % 8)) for i in range(64)]  # texts that are held out are not trained on
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "eval_share": 0.25, "trainer_args": {"bf16": False}}
    settings = SFTSettings(config_overrides=SMALL, num_train_epochs=12, learning_rate=1e-2, evaluations=1, **options)
    metrics = tune.sft(model, rows, tmp_path / "new", settings, sources=["letters"])
    assert metrics["held_out"]["eval_loss"] < 0.5  # from log(257) = 5.5; the first token is read, not predicted
    assert metrics["parameters"] == 257 * 48 + 48 * (48 + 16 + 16 + 48) + 3 * 48 * 40 + 3 * 48
    assert json.loads((tmp_path / "new" / "run.json").read_text())["config_overrides"] == SMALL
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"a new network: configuration of `{model}` with `{SMALL}`, random weights" in card
    trained = set(read_training_rows(tmp_path / "new").tolist())
    assert len(trained) == 6 and trained < set(row_hashes([(None, "abcd" * (2 + i)) for i in range(8)]).tolist()), (
        "two of eight are held out"
    )
    made = load_causal(tmp_path / "new", "base", LoadOptions(device="cpu", dtype="float32"))
    h = testing.hypothesis("ab", "cd", testing.tiny_lm())
    assert made.outputs([h])[0].argmax() == made.tokenizer("a").input_ids[0]
    assert made.vocabulary.eos_ids == {0, 5}


def test_all_tokens_of_a_text_are_in_the_loss():
    from ivg.training.encoding import encode_sft

    (row,) = encode_sft([SFTExample(None, "abc")], testing.byte_tokenizer(), None, 99)
    assert row["completion_mask"] == [1] * 4 and row["input_ids"][-1] == 0
    (row,) = encode_sft([SFTExample(None, "abc")], testing.byte_tokenizer(bos=True), None, 99)
    assert row["completion_mask"] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("cuda", "size", "given", "expected"),
    [
        (True, 10, {}, False),
        (True, trainer.CHECKPOINTED + 1, {}, True),
        (True, trainer.CHECKPOINTED + 1, {"gradient_checkpointing": False}, False),
        (False, trainer.CHECKPOINTED + 1, {}, False),
    ],
)
def test_large_networks_recompute_activations_on_a_gpu(monkeypatch, tmp_path, cuda, size, given, expected):
    class Arguments(SFTConfig):
        """Keeps what it is given: a real one would look for the GPU."""

        def __init__(self, **given):
            self.given = given

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(trainer, "pick_dtype", lambda *_: torch.float32)
    network = torch.nn.Linear(size, 1, bias=False, device="meta")
    with open_run(tmp_path / "run", {}) as run:
        made = trainer.trainer_arguments(Arguments, SFTSettings(trainer_args=given), run, network, evaluate=False)
    assert made.given["gradient_checkpointing"] is expected
