"""The recipe of the embedded models on tiny sizes: growth preserves the function, interrupted stages resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ivg.evaluation.sentiment import clean, opening_words
from recipes.embedded_models.corpus import EOS, Review, pack, train_tokenizer
from recipes.embedded_models.pretrain import Phase, PretrainConfig, batch, build_model, grow, learning_rate, orthogonalise, pretrain

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG = PretrainConfig(
    model=SHAPE, phases=(Phase(1, 64 * 6, 16), Phase(3, 64 * 6, 32)), batch_tokens=64, warmup=2, compile=False, adam_lr=1e-3
)


def test_growth_preserves_outputs():
    small, large = build_model(CONFIG, 2), build_model(replace(CONFIG, seed=9), 5)
    grow(small, large)
    ids = torch.randint(0, 50, (2, 12))
    assert torch.allclose(small(ids).logits, large(ids).logits, atol=1e-5)


def test_orthogonalise_gives_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8), (3, 12, 12)):
        s = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert s.min() > 0.3
        assert s.max() < 1.3


def test_batches_visit_every_window_once_per_epoch():
    stream = np.arange(64 * 4 + 1, dtype=np.uint16)
    phase = Phase(1, 0, 16)
    starts = [int(row[0]) for step in range(4) for row in batch(stream, CONFIG, phase, step)]
    assert sorted(starts) == list(range(0, 256, 16))


def test_learning_rate_warms_up_in_every_phase_and_decays_to_zero():
    rates = [learning_rate(s, 6 if s >= 6 else 0, 12, CONFIG) for s in range(12)]
    assert rates[0] == rates[6] == 0.5
    assert rates[1] == 1.0
    assert rates[-1] == pytest.approx(1 / (0.35 * 12))


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    from recipes.embedded_models import pretrain as module

    stream = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint16)
    whole = pretrain(stream, stream, CONFIG, tmp_path / "whole", log_every=2)
    real, calls = module.batch, []

    def stop_in_phase_two(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "batch", stop_in_phase_two)
    with pytest.raises(KeyboardInterrupt):
        pretrain(stream, stream, CONFIG, tmp_path / "parts")
    monkeypatch.setattr(module, "batch", real)
    again = pretrain(stream, stream, CONFIG, tmp_path / "parts")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])["step"] == 12


def test_corpus():
    assert clean("A  film.\n\n\n<b> Good </b> \n") == "A film.\n<b> Good </b>"
    tokenizer = train_tokenizer(["the film was good", "the film was bad"] * 5, 280)
    stream = pack(tokenizer, ["the film", "good"])
    assert stream.dtype == np.uint16
    assert stream.tolist() == tokenizer.encode("the film").ids + tokenizer.encode("good").ids
    assert tokenizer.id_to_token(int(stream[0])) == EOS


def test_prompts_are_the_first_four_to_eight_words():
    reviews = [" ".join(f"w{i}-{j}" for j in range(20)) for i in range(50)]
    prompts = opening_words(reviews, 30, seed=1)
    assert len(set(prompts)) == 30
    assert {len(p.split()) for p in prompts} == {4, 5, 6, 7, 8}
    assert prompts == opening_words(reviews, 30, seed=1)
    with pytest.raises(ValueError, match="only 50 of 60"):
        opening_words(reviews, 60, seed=1)


@pytest.mark.long
def test_stages_from_rollouts_to_values_run_once(tmp_path, monkeypatch):
    """The stages after pre-training run, skip what is done, and give models that load."""
    pytest.importorskip("trl")
    from ivg.model import GuidedModel
    from recipes.embedded_models import build as recipe
    from recipes.embedded_models import config
    from recipes.embedded_models.gold import GoldConfig
    from recipes.embedded_models.gold import build as build_classifier

    for name, value in {"PAIR_PROMPTS": 40, "VALUE_PROMPTS": 20}.items():
        monkeypatch.setattr(config, name, value)
    texts = [f"The film number {i} was {w} and the actors were {w} too, all of them" for i in range(60) for w in ("good", "bad")]
    b = recipe.Build(tmp_path, tmp_path / "work", tmp_path / "out")
    b.training_reviews = [Review(t, 1) for t in texts]
    (tmp_path / "work").mkdir()
    recipe.tokenizers(b)
    shape = {**SHAPE, "vocab_size": 1024, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
    monkeypatch.setattr(config, "OTHER_BODY", {**shape, "num_hidden_layers": 1})
    for name in ("base", "untuned"):
        recipe.save(build_model(replace(CONFIG, model=shape), 2), b.work / "tokenizer.json", b.model(name))
    recipe.save(build_classifier(GoldConfig(hidden=16), 1024), b.work / "tokenizer.json", b.model("gold"))
    stages = ["pair-rollouts", "tuned", "value-rollouts", "value", "value-other"]
    recipe.run(b, stages)
    model = GuidedModel.from_pretrained(b.model("base"), tuned=b.model("tuned"), untuned=b.model("untuned"), value=b.model("value"))
    assert model.generate("The film", "ivg", max_new_tokens=5).text
    before = (b.model("value") / "model.safetensors").stat().st_mtime_ns
    recipe.run(b, stages)
    assert (b.model("value") / "model.safetensors").stat().st_mtime_ns == before
