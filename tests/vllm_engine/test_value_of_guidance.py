"""What IVG is for: through vLLM the embedded models are steered as well as through the transformers engine."""

from __future__ import annotations

import math
import statistics

import pytest
from making import models

from ivg.embedded import path

PROMPTS = 200


def test_mean_gold_reward_is_that_of_the_transformers_engine(imdb_test):
    from ivg.evaluation.judges import load_gold

    texts = [" ".join(review.text.split()[:8]) for review in imdb_test[:PROMPTS]]
    settings = {"width": 4, "successors": 4, "chunk_length": 5, "max_new_tokens": 50, "seed": 11}
    found = {}
    for engine in ("transformers", "vllm"):
        with models(engine) as model:
            answers = model.generate(texts, "ivg", **settings)
        found[engine] = [a.text for a in answers]
    gold = load_gold(path("gold"))
    means, errors = {}, {}
    for engine, answers in found.items():
        scores = gold(texts, answers)
        means[engine], errors[engine] = statistics.fmean(scores), statistics.stdev(scores) / math.sqrt(len(scores))
    print(means, errors)
    assert means["vllm"] == pytest.approx(means["transformers"], abs=3 * math.hypot(*errors.values()))
