"""Values: checkpoints of every layout, hand-computed numbers, laws, other vocabularies."""

import json

import pytest
import torch
from safetensors.torch import save_file

import naive
from ivg.errors import ConfigError, ModelError, VocabularyError
from ivg.models.cached_lm import CachedLM
from ivg.models.loading import LoadOptions
from ivg.models.runner import ModelRunner
from ivg.testing import (
    byte_tokenizer,
    check_batch_invariance,
    check_cache,
    check_linearity,
    check_token_sum,
    hypothesis,
    tiny_lm,
    tiny_model,
    tiny_value,
)
from ivg.types import Prompt
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue
from ivg.values.reward import RewardModel

FLOAT32 = LoadOptions(dtype="float32")
TEXTS = [("The movie", " was fine"), ("I", " x"), ("What", " a very long answer, really long")]


@pytest.fixture
def base():
    return tiny_lm("base", seed=1)


@pytest.fixture
def beams(base):
    return [hypothesis(p, t, base, end=i == 1) for i, (p, t) in enumerate(TEXTS)]


def implicit(architecture="llama", **settings):
    return ImplicitValue(tiny_lm("tuned", architecture, 2, **settings), tiny_lm("untuned", architecture, 3, **settings))


def test_laws(beams):
    pair, q, v = implicit(), tiny_value("vocabulary", seed=4), tiny_value("scalar", seed=5)
    for value in (pair, q, v, FunctionValue(lambda p, r: len(p) - len(r))):
        check_batch_invariance(value, beams)
    check_token_sum(pair, beams)
    check_linearity(CompositeValue([(2.0, pair), (-0.5, q), (1.0, v)]), beams)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gemma3_text"])
def test_cached_scores_equal_reading_anew(architecture):
    base = tiny_lm("base", architecture)
    chains = []
    for prompt, text in TEXTS:
        chain, parent = [], None
        for cut in (3, 6, len(text)):
            parent = hypothesis(prompt, text[:cut], base, parent)
            chain.append(parent)
        chains.append(chain)
    check_cache(lambda: implicit(architecture), chains)
    check_cache(lambda: tiny_value("vocabulary", architecture, 4), chains)
    check_cache(lambda: tiny_value("scalar", architecture, 5), chains)
    other = byte_tokenizer([("t", "h"), ("a", "n"), ("Ġ", "w"), ("e", "r")])
    check_cache(lambda: tiny_value("scalar", architecture, 5, tokenizer=other), chains)
    check_cache(lambda: implicit(architecture, tokenizer=other), chains)


def write_checkpoint(folder, architecture, head, prefix="", dtype=torch.float32, shards=1, name="score_head.weight", bias=None):
    """A value checkpoint by hand: backbone tensors under their usual names and the head's tensor."""
    network = tiny_model(architecture, seed=7)
    network.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = {prefix + k: v.to(dtype).contiguous() for k, v in network.state_dict().items() if "lm_head" not in k}
    tensors[name] = head.to(dtype)
    if bias is not None:
        tensors[name.replace("weight", "bias")] = bias
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        index = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
        for file in set(index.values()):
            save_file({n: tensors[n] for n in names if index[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return network


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("shards,dtype", [(1, torch.float32), (3, torch.float16)], ids=["float32", "float16 in shards"])
def test_authors_checkpoint_gives_hand_computed_values(tmp_path, architecture, shards, dtype):
    head = torch.randn(257, 32)
    network = write_checkpoint(tmp_path, architecture, head, dtype=dtype, shards=shards)
    value = ExplicitValue.from_pretrained(tmp_path, options=FLOAT32)
    assert value.head == "vocabulary"
    assert value.full_vocabulary()
    ids = byte_tokenizer()("The movie was fine").input_ids
    hidden = network.to(dtype).float().base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].detach()
    expected = float(hidden[-2] @ head.to(dtype).float()[ids[-1]])  # head(h_{t-1})[y_t]
    base = tiny_lm("base")
    got = value.score([hypothesis("The movie", " was fine", base)])[0]
    assert got == pytest.approx(expected, rel=2e-2 if dtype == torch.float16 else 1e-4, abs=1e-3)


@pytest.mark.parametrize("name,prefix", [("score.weight", ""), ("v_head.summary.weight", "pretrained_model.")])
def test_scalar_layouts(tmp_path, name, prefix):
    head = torch.randn(1, 32)
    bias = torch.tensor([0.7]) if name.startswith("v_head") else None
    network = write_checkpoint(tmp_path, "llama", head, prefix, name=name, bias=bias)
    value = ExplicitValue.from_pretrained(tmp_path, options=FLOAT32)
    ids = byte_tokenizer()("The movie was").input_ids
    hidden = network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    expected = (hidden @ head[0]).item() + (0.7 if bias is not None else 0.0)
    assert value.head == "scalar"
    assert value.score([hypothesis("The movie", " was", tiny_lm("base"))])[0] == pytest.approx(expected, abs=1e-4)


def test_sequence_classifier_of_one_label_is_a_value(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 1, 0
    network = LlamaForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = byte_tokenizer()("The movie was").input_ids
    expected = float(network(input_ids=torch.tensor([ids])).logits)
    base = tiny_lm("base")
    assert ExplicitValue.from_pretrained(tmp_path, options=FLOAT32).score([hypothesis("The movie", " was", base)])[0] == pytest.approx(
        expected, abs=1e-4
    )
    assert RewardModel.from_pretrained(tmp_path, options=FLOAT32).score([hypothesis("The movie", " was", base)])[0] == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_save_and_load(tmp_path, head, architecture, beams):
    value = tiny_value(head, architecture, seed=4)
    expected = value.score(beams)
    value.save_pretrained(tmp_path)
    again = ExplicitValue.from_pretrained(tmp_path, options=FLOAT32)
    assert again.head == head
    assert again.score(beams) == pytest.approx(expected, abs=1e-5)


def test_a_missing_head_is_an_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)no value head.*score_head\.weight"):
        ExplicitValue.from_pretrained(tmp_path, options=FLOAT32)


def test_a_missing_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        ExplicitValue.from_pretrained(tmp_path / "nothing")


def reward_model(labels, **settings):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=257, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=labels, max_position_embeddings=64)
    return RewardModel(DistilBertForSequenceClassification(config), byte_tokenizer(), **settings)


@pytest.mark.parametrize("labels,label", [(1, None), (2, None), (3, 2)])
def test_reward_models(labels, label, beams):
    reward = reward_model(labels, label=label)
    for h, got in zip(beams, reward.score(beams), strict=True):
        ids = byte_tokenizer()(h.prompt.content + h.text).input_ids[:64]
        logits = reward.network(input_ids=torch.tensor([ids])).logits[0]
        expected = logits[label] if label is not None else logits[0] if labels == 1 else logits[1] - logits[0]
        assert got == pytest.approx(float(expected), abs=1e-5)
    check_batch_invariance(reward, beams)


def test_reward_model_with_several_labels_needs_one():
    with pytest.raises(ConfigError, match="3 labels"):
        reward_model(3)


def test_reward_templates():
    reward = reward_model(1, template="Q: {prompt} A: {response}!")
    assert reward.text(Prompt("hello"), "yes") == "Q: hello A: yes!"
    chat = RewardModel(reward.network, byte_tokenizer(chat=True), "chat")
    assert chat.text(Prompt("hello"), "yes") == "<user>hello\n<assistant>yes\n"


def test_implicit_value_by_hand(beams):
    value = implicit()
    reference = naive.Implicit(value.tuned.network, value.untuned.network)
    for h, got in zip(beams, value.score(beams), strict=True):
        prompt = byte_tokenizer()(h.prompt.content).input_ids
        assert got == pytest.approx(reference.score(prompt, list(h.token_ids)), abs=1e-4)


# Vocabularies


def test_permuted_vocabulary_is_an_error_that_names_ids(base):
    other = tiny_lm("guide", tokenizer=byte_tokenizer(permute=True))
    assert not other.vocabulary.same_as(base.vocabulary)
    with pytest.raises(VocabularyError, match=r"(?s)256 ids differ.*id 1: '!' in base, .* in guide.*and 251 more"):
        base.vocabulary.require_same(other.vocabulary, "")


def test_missing_ids_are_an_error(base):
    other = tiny_lm("guide", tokenizer=byte_tokenizer([("a", "b")]))
    with pytest.raises(VocabularyError, match=r"(?s)1 ids differ.*id 257: absent in base, 'ab' in guide"):
        base.vocabulary.require_same(other.vocabulary, "")


def test_added_tokens_and_padded_rows_are_fine(base):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|chat|>"]})
    network = tiny_model("llama", 2, vocab_size=320)
    padded = CachedLM(ModelRunner(network, "tuned"), tokenizer)
    value = ImplicitValue(padded, CachedLM(ModelRunner(tiny_model("llama", 3, vocab_size=288), "untuned"), byte_tokenizer()))
    assert padded.vocabulary.same_as(base.vocabulary)
    assert value.deltas([hypothesis("I", " am", base)]).shape == (1, 288)


def test_pair_must_share_a_vocabulary():
    with pytest.raises(VocabularyError, match="untuned start"):
        ImplicitValue(tiny_lm("tuned"), tiny_lm("untuned", tokenizer=byte_tokenizer(permute=True)))


def test_other_tokenizer_reads_only_the_changed_end(base):
    value = tiny_value("scalar", tokenizer=byte_tokenizer([("a", "n"), ("Ġ", "b")]))
    first = hypothesis("A text of thirty characters or so", " ba", base)
    value.score([first])
    before = first.token_counter.forward_tokens["explicit"]
    second = hypothesis("A text of thirty characters or so", " ban", base, first)
    value.score([second])
    assert before > 30
    assert second.token_counter.forward_tokens["explicit"] <= 2


def test_a_model_with_other_tokens_counts_no_prompt_as_response():
    from ivg.engines.endpoint.text_vocabulary import TextVocabulary
    from ivg.testing import tiny_lm
    from ivg.types import Beam, Prompt, new_key

    reader, words = tiny_lm("other"), TextVocabulary()
    prompt, response = Prompt("A prompt of some length."), " And what was said."
    beam = Beam(new_key(), None, prompt, (words.intern(response),), response, vocabulary=words, inherits=False)
    ids, border = reader.ids(beam)
    assert border == len(reader.prompt_ids(prompt))
    assert len(reader.token_logps([beam])[0]) == len(ids) - border == len(response)
