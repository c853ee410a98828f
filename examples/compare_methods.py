"""Compare methods at what they cost: mean reward against tokens read, drawn into compare.svg.

    pip install matplotlib
    python examples/compare_methods.py

The judge guides nothing, so no method can overfit it by search. For papers use `ivg eval`, which adds confidence intervals, the KL
divergence to the base, best-of-N at equal compute and resumable files: docs/how-to/evaluation.md.
"""

import sys
from statistics import mean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from ivg import GuidedModel
from ivg.values.reward import load_reward

METHODS = {
    "base": {},
    "bon": {"successors": 8},
    "eft": {},
    "cbs-explicit": {"width": 2, "successors": 4},
    "ivg": {"width": 2, "successors": 4},
}
PROMPTS = ["The movie was", "I have to say", "The acting", "This film", "After ten minutes", "My friends and I"]


def main(out: str = "compare.svg", prompts: list[str] = PROMPTS) -> None:
    """Answer `prompts` by every method and draw one point for each."""
    model = GuidedModel.embedded()
    model.add_value("judge", load_reward("embedded:gold"))  # a reward model: a sequence classifier that reads whole texts

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, settings in METHODS.items():
        answers = model.generate(prompts, method, seed=1, max_new_tokens=30, ignore_eos=True, **settings)
        reward = mean(model.score(p, [a.text], "judge")[0] for p, a in zip(prompts, answers, strict=True))
        # `forward_tokens` counts what each model reads for a request with an empty cache: the fair price of a method.
        tokens = mean(a.usage.total_forward_tokens for a in answers)
        print(f"{method:<14} reward {reward:+.2f}   tokens read {tokens:.0f}")
        axes.scatter(tokens, reward, zorder=2)
        axes.annotate(method, (tokens, reward), xytext=(5, 5), textcoords="offset points")
    axes.set(xscale="log", xlabel="tokens read by all models, for an answer", ylabel="mean reward by the judge")
    axes.grid(alpha=0.3)
    figure.savefig(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
