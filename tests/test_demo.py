"""The recipe of the embedded models in miniature: growth changes nothing, interrupted stages go on where they stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ivg.demo import fudge, preference, rollouts
from ivg.demo.corpus import EOS, Review, clean, pack, train_tokenizer
from ivg.demo.pretrain import Phase, PretrainConfig, batch, build_model, grow, learning_rate, orthogonalise, pretrain

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG = PretrainConfig(
    model=SHAPE, phases=(Phase(1, 64 * 6, 16), Phase(3, 64 * 6, 32)), batch_tokens=64, warmup=2, compile=False, adam_lr=1e-3
)


def test_growth_changes_no_output():
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


def test_every_window_comes_once_before_any_comes_again():
    stream = np.arange(64 * 4 + 1, dtype=np.uint16)
    phase = Phase(1, 0, 16)
    starts = [int(row[0]) for step in range(4) for row in batch(stream, CONFIG, phase, step)]
    assert sorted(starts) == list(range(0, 256, 16))


def test_learning_rate_warms_up_in_every_phase_and_ends_at_nothing():
    rates = [learning_rate(s, 6 if s >= 6 else 0, 12, CONFIG) for s in range(12)]
    assert rates[0] == rates[6] == 0.5
    assert rates[1] == 1.0
    assert rates[-1] == pytest.approx(1 / (0.35 * 12))


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    from ivg.demo import pretrain as module

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
    reviews = [Review(" ".join(f"w{i}-{j}" for j in range(20)), 1) for i in range(50)]
    prompts = rollouts.opening_words(reviews, 30, seed=1)
    assert len(set(prompts)) == 30
    assert {len(p.split()) for p in prompts} == {4, 5, 6, 7, 8}
    assert prompts == rollouts.opening_words(reviews, 30, seed=1)
    with pytest.raises(ValueError, match="only 50 of 60"):
        rollouts.opening_words(reviews, 60, seed=1)


def test_labels_follow_bradley_and_terry():
    rows = [{"prompt": f"p{i}", "response": str(score), "score": score} for i in range(4000) for score in (0.0, 1.0)]
    made = preference.pairs(rows, seed=0)
    assert len(made) == 4000
    share = np.mean([m["chosen_score"] > m["rejected_score"] for m in made])
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.02)


def test_pair_accuracy():
    assert preference.pair_accuracy([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (3.0, 1.0)]) == 0.625


def test_value_targets_cover_response_tokens_only():
    ids, mask, rewards = fudge.table([([5, 6, 7, 8], 2, 0.5), ([1, 2, 3, 4, 5, 6, 7], 3, -1.0)], width=6)
    assert ids.tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert rewards.tolist() == [0.5, -1.0]


def test_factored_head_is_its_matrix():
    torch.manual_seed(0)
    head = fudge.FactoredHead(torch.nn.Embedding(20, 8))
    for p in (head.shared, head.map, head.own.weight):
        torch.nn.init.normal_(p)
    hidden, tokens = torch.randn(3, 4, 8), torch.randint(0, 20, (3, 4))
    expected = (hidden @ head.matrix().T).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(head(hidden, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
def test_value_learns_what_it_can(head, tmp_path):
    """Reward = how many of a response's tokens are 1; a trained value ranks finished responses by it."""
    from ivg.testing import tiny_model

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(600):
        tokens = rng.integers(1, 4, size=8).tolist()
        rows.append(([0, *tokens], 1, float(tokens.count(1)) / 4))
    config = fudge.FudgeConfig(epochs=12, batch=50, width=9, lr=3e-3)
    torch.manual_seed(0)
    model = fudge.train(tiny_model("llama", vocab_size=8).base_model, head, rows, config, tmp_path, compile=False)
    ids = torch.tensor([r[0] for r in rows[:200]])
    with torch.no_grad():
        out = model(input_ids=ids).logits
    got = out[:, -2].gather(1, ids[:, -1:])[:, 0] if head == "vocabulary" else out[:, -1, 0]
    wanted = torch.tensor([r[2] for r in rows[:200]])
    assert float(torch.corrcoef(torch.stack([got, wanted]))[0, 1]) > 0.8


def test_rollouts_are_resumed_and_judged(tmp_path):
    from ivg.steered import SteeredModel
    from ivg.testing import tiny_reader

    class Judge:
        def rewards(self, texts):
            return [float(len(t)) for t in texts], [0] * len(texts)

    model, prompts = SteeredModel(tiny_reader("base")), [f"Prompt {i}" for i in range(6)]
    settings = {"samples": 2, "seed": 3, "slab": 2, "max_new_tokens": 4}
    rollouts.rollout(model, Judge(), prompts, tmp_path / "a.jsonl", **settings)
    whole = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text("".join(whole.splitlines(keepends=True)[:5]) + '{"prom')
    rollouts.rollout(model, Judge(), prompts, tmp_path / "b.jsonl", **settings)
    assert (tmp_path / "b.jsonl").read_text() == whole
    rows = list(rollouts.read(tmp_path / "a.jsonl"))
    assert len(rows) == 12
    assert all(r["score"] == len(r["prompt"] + r["response"]) for r in rows)
