"""From a reward to a guide: sample responses, score them, train a value on them, and guide with it.

    pip install 'ivg[train]'
    python examples/train_a_value.py

The reward sees whole responses only. The value learns to predict it from any prefix, so it can choose while the text is being
written. Eight prompts take seconds; real runs take thousands: docs/how-to/training.md.
"""

import tempfile
from pathlib import Path
from statistics import mean

from ivg import ExplicitValue, FunctionValue, GuidedModel, Prompt
from ivg.settings.train import ValueTrainSettings
from ivg.training.data import read_rated
from ivg.training.rollout import rollout
from ivg.training.value import train_value

PROMPTS = [Prompt(f"The {noun} was") for noun in ("movie", "plot", "cast", "ending", "music", "story", "actor", "script")]


def long_words(prompt: str, response: str) -> float:
    """The mean length of a word, in letters: a reward that is easy to check by eye."""
    words = response.split()
    return sum(map(len, words)) / len(words) if words else 0.0


def main(out: Path) -> None:
    """Train a value on `long_words`, save it to `out`, and compare the base with the guided model."""
    model = GuidedModel.embedded()

    # 1. Rollouts: several responses for each prompt, by any method; here plain samples of the base. Interrupted runs resume.
    rows = rollout(model, PROMPTS, out / "rollouts.jsonl", FunctionValue(long_words), samples=24, max_new_tokens=20)

    # 2. A value: a small causal model with a vocabulary head (one number for every next token), fitted to the final reward.
    options = ValueTrainSettings(
        num_train_epochs=10, learning_rate=1e-3, eval_share=0.25, evaluations=1, trainer_args={"logging_strategy": "no"}
    )
    metrics = train_value("embedded:untuned", read_rated(rows), out / "value", options)
    print(f"error {metrics['rmse_100']:.2f} letters; {metrics['pair_accuracy_100']:.0%} of pairs ranked correctly")

    # 3. Guide with it. `out / "value"` is a checkpoint in safetensors: push_to_hub and `ivg generate --value` take it.
    model.values["explicit"] = ExplicitValue.from_pretrained(out / "value")
    for method in ("base", "cbs-explicit"):
        answers = model.generate(["The film was", "I have to say", "My friends"], method, seed=1, max_new_tokens=20)
        print(f"{method}: {mean(long_words('', a.text) for a in answers):.2f} letters a word, as in {answers[0].text!r}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
