"""Seconds of guidance by two networks of one shape: each read in passes of its own, and both in one.

``python -m benchmarks.shared_passes [--prompts 1 8 --tokens 50 --rounds 7]`` runs the methods ``eft`` and ``ivg`` (W = K = 4, L = 5) on the
embedded models, in turn with tuned and untuned apart and together. The tokens are compared: they are equal.
"""

from __future__ import annotations

import argparse
import statistics
import time

from ivg.embedded import path
from ivg.model import GuidedModel
from ivg.models.loading import LoadOptions
from ivg.models.shared import SharedNetworks
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue

METHODS = ("eft", "ivg")
OPTIONS = LoadOptions(device="cpu", dtype="float32")
PROMPTS = [
    f"{begin} the movie was" for begin in ("To me", "Last night", "In the end", "I think", "My friends say", "So", "Of course", "For once")
]


def load(*, together: bool) -> GuidedModel:
    """The embedded models; not ``together``: each loaded by itself, so that none knows of another."""
    if together:
        return GuidedModel.embedded(OPTIONS)
    base, tuned, untuned = (SharedNetworks().load(path(role), role, OPTIONS) for role in ("base", "tuned", "untuned"))
    explicit = ExplicitValue.from_pretrained(path("value"), options=OPTIONS)
    return GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned), "explicit": explicit})


def measure(model: GuidedModel, method: str, prompts: int, tokens: int, seed: int) -> tuple[float, list[tuple[int, ...]]]:
    """(seconds of the processor, the tokens of the answers)."""
    model.reset_caches()
    started = time.process_time()
    done = model.generate(PROMPTS[:prompts], method, seed=seed, max_new_tokens=tokens, ignore_eos=True)
    return time.process_time() - started, [c.token_ids for c in done]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    models = [load(together=together) for together in (False, True)]
    for method in METHODS:
        for prompts in given.prompts:
            rounds = [[measure(model, method, prompts, given.tokens, seed) for model in models] for seed in range(given.rounds + 1)][1:]
            apart, together = (statistics.median(run[i][0] for run in rounds) for i in (0, 1))
            ratio = statistics.median(b[0] / a[0] for a, b in rounds)
            equal = sum(a[1] == b[1] for a, b in rounds)
            seconds = f"apart {apart:.2f} s, together {together:.2f} s, {ratio:.2f}"
            print(f"{method:4} {prompts} prompts: {seconds}; tokens equal in {equal} of {len(rounds)}")


if __name__ == "__main__":
    main()
