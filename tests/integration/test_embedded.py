"""The models in the package: files, guidance, and the metrics in their model cards."""

import json
import re

import pytest
import torch

from ivg.embedded import ASSETS, names, path
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions, load_causal

FLOAT32 = LoadOptions(device="cpu", dtype="float32")
EXPECTED = {"base", "untuned", "tuned", "value", "value-other", "gold"}


@pytest.fixture(scope="module")
def model():
    return GuidedModel.embedded(FLOAT32)


@pytest.fixture(scope="module")
def gold():
    from ivg.values.reward import RewardModel

    return RewardModel.from_pretrained(path("gold"), options=FLOAT32, name="gold")


@pytest.fixture(scope="module")
def metrics():
    return json.loads((ASSETS / "metrics.json").read_text())


def test_files():
    from safetensors import safe_open

    assert set(names()) >= EXPECTED  # the guides of SmolLM2: test_shipped_guides.py
    total = 0
    for name in EXPECTED:
        weights = path(name) / "model.safetensors"
        total += weights.stat().st_size
        with safe_open(weights, "pt") as f:
            assert all(f.get_slice(k).get_dtype() == "F16" for k in f.keys())  # noqa: SIM118
        card = (path(name) / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert "recipes.embedded_models.build" in card
    assert total <= 25e6


def test_sizes():
    def count(name):
        network = load_causal(path(name), name, LoadOptions("cpu", "float32", pack=False)).network
        return sum(p.numel() for p in network.parameters())

    assert count("base") >= 6e6
    for name in ("tuned", "untuned"):
        assert 0.8e6 <= count(name) <= 1.3e6


def test_heads_and_tokenizers(model):
    value, other = model.values["explicit"], model.values["explicit-other"]
    assert (value.head, other.head) == ("vocabulary", "scalar")
    assert value.vocabulary.same_as(model.base.vocabulary)
    assert not other.vocabulary.same_as(model.base.vocabulary)


def test_gold_is_not_a_value(model):
    assert "gold" not in model.values
    assert "reward" not in model.values


def test_samples_are_words_of_reviews(model, imdb_test):
    """Nearly all words of plain samples occur in reviews."""
    known = {w for r in imdb_test for w in re.findall(r"[a-z']+", r.text.lower())}
    done = model.generate(["The movie was", "I have to say", "In the end, this"] * 5, "base", seed=1)
    words = [w for c in done for w in re.findall(r"[a-z']+", c.text.lower())[:-1]]
    assert len(words) > 300
    assert sum(w in known for w in words) / len(words) > 0.97


@pytest.mark.long
def test_guidance_raises_the_reward(model, gold):
    prompts = ["The movie was", "This film", "I thought the story", "The acting of the lead", "My friends and I", "After ten minutes"] * 3
    means = {}
    for method in ("base", "eft", "ivg"):
        done = [
            c
            for _, c in sorted(
                model.run([model.request(p, method, seed=3, index=i, ignore_eos=True) for i, p in enumerate(prompts)], max_beams=512)
            )
        ]
        rewards, _ = gold.rewards([p + c.text for p, c in zip(prompts, done, strict=True)])
        means[method] = sum(rewards) / len(rewards)
    assert means["base"] < means["eft"] < means["ivg"]


@pytest.mark.long
def test_a_value_with_another_tokenizer_raises_the_reward(model, gold):
    """At token level and at chunk level."""
    prompts = ["The movie was", "This film", "I thought the story", "My friends and I"] * 3
    means = {}
    plans = {
        "base": {},
        "token": {"token": "explicit-other", "candidates": 10, "beta": 2.0},
        "chunk": {"select": "explicit-other", "successors": 8, "chunk_length": 5},
    }
    for name, settings in plans.items():
        requests = [
            model.request(p, "custom", seed=5, index=i, ignore_eos=True, max_new_tokens=30, **settings) for i, p in enumerate(prompts)
        ]
        done = dict(model.run(requests, max_beams=512))
        rewards, _ = gold.rewards([p + done[i].text for i, p in enumerate(prompts)])
        means[name] = sum(rewards) / len(rewards)
    assert means["token"] > means["base"]
    assert means["chunk"] > means["base"]


@pytest.mark.long
def test_gold_classifies_reviews(gold, imdb_test, metrics):
    from recipes.embedded_models.gold import accuracy as accuracy_of

    sample = imdb_test[::50]
    accuracy = accuracy_of(gold, sample)
    assert metrics["gold"]["accuracy_full_test_reviews"] >= 0.86
    assert accuracy == pytest.approx(metrics["gold"]["accuracy_full_test_reviews"], abs=4 * (0.12 / len(sample)) ** 0.5)


@pytest.mark.long
def test_perplexity_of_the_base(model, imdb_test, metrics):
    """Perplexity on test reviews is near the card's on held-out training reviews."""
    assert metrics["base"]["tokens_seen"] >= 20e6
    losses = []
    for r in imdb_test[:40]:
        ids = torch.tensor([model.base.tokenizer(r.text).input_ids[:256]])
        with torch.no_grad():
            losses.append(model.base.network(input_ids=ids, labels=ids).loss)
    assert float(torch.stack(losses).mean()) == pytest.approx(metrics["base"]["held_out_nats_per_token"], abs=0.2)
