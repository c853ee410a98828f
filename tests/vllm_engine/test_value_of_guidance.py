"""What IVG is for: through vLLM the embedded models are guided as well as through the transformers engine."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

import pytest
from making import models

from ivg.embedded import path
from ivg.types import Prompt
from ivg.values.reward import load_reward

PROMPTS = int(os.environ.get("IVG_TEST_PROMPTS", "64"))
"""The figures in docs/how-to/vllm.md are of 200."""
REVIEWS = Path(__file__).parents[3] / "shared" / "data" / "imdb" / "test.parquet"


def beginnings() -> list[str]:
    """The first eight words of reviews."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed here")
    if not REVIEWS.exists():
        pytest.skip(f"{REVIEWS} is not here")
    return [" ".join(text.split()[:8]) for text in pq.read_table(REVIEWS, columns=["text"])["text"].to_pylist()[::50]][:PROMPTS]


def test_mean_gold_reward_is_that_of_the_transformers_engine():
    texts = beginnings()
    assert len(texts) == PROMPTS
    answers, plain = {}, []
    for engine in ("transformers", "vllm"):
        with models(engine) as model:
            answers[engine] = [c.text for c in model.generate(texts, "ivg", max_new_tokens=50, seed=11)]
            plain = model.generate(texts, "base", max_new_tokens=50, seed=11) if engine == "transformers" else plain
    gold = load_reward(path("gold"))
    scores = {name: gold.judge([(Prompt(p), a) for p, a in zip(texts, found, strict=True)]) for name, found in answers.items()}
    unguided = gold.judge([(Prompt(p), c.text) for p, c in zip(texts, plain, strict=True)])
    means = {name: statistics.fmean(found) for name, found in scores.items()}
    errors = {name: statistics.stdev(found) / math.sqrt(PROMPTS) for name, found in scores.items()}
    print(f"gold reward of {PROMPTS} answers: {means}, standard errors {errors}, unguided {statistics.fmean(unguided):.3f}")
    noise = math.hypot(*errors.values())
    assert means["vllm"] == pytest.approx(means["transformers"], abs=3 * noise)
    assert min(means.values()) > statistics.fmean(unguided) + 5 * noise
