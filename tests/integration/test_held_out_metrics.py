"""Metrics of held-out rows count each row once, whatever rows share a batch."""

import numpy as np
import pytest
from test_training import FLOAT32, model  # noqa: F401  (model is a fixture)

from ivg.settings.train import DPOSettings, SFTSettings, TrainSettings
from ivg.training.data import SFTExample
from ivg.types import Preference, Prompt
from ivg.values.reward import RewardModel

PAIRS = [Preference(Prompt(f"p{i}"), "ab" * (1 + i % 4), "b" * (1 + i % 3) + "a") for i in range(18)]
ROWS = [SFTExample(pair.prompt, pair.chosen) for pair in PAIRS]


def held_out(model, out, command, batch):  # noqa: F811
    """The metrics, with 9 held-out rows in batches of ``batch``, behind one step: before it the margins of DPO are rounding."""
    from ivg.training import tune

    given = {"eval_share": 0.5, "learning_rate": 1e-2, "warmup_steps": 0, "evaluations": 1, "per_device_train_batch_size": 3}
    given["trainer_args"] = {"per_device_eval_batch_size": batch, "max_steps": 1, "bf16": False}  # sums that depend on the batch
    rows, settings = {"sft": (ROWS, SFTSettings), "dpo": (PAIRS, DPOSettings), "reward": (PAIRS, TrainSettings)}[command]
    return getattr(tune, command)(model, rows, out, settings(**given))["held_out"]


@pytest.mark.parametrize("command", ["sft", "dpo", "reward"])
def test_held_out_metrics_do_not_depend_on_the_batches(tmp_path, model, command):  # noqa: F811
    parts = held_out(model, tmp_path / "parts", command, 4)  # 4, 4 and 1 rows
    whole = held_out(model, tmp_path / "whole", command, 9)
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert len(parts) >= {"sft": 3, "dpo": 9, "reward": 6}[command]


def test_held_out_metrics_of_a_reward_by_hand(tmp_path, model):  # noqa: F811
    metrics = held_out(model, tmp_path / "rm", "reward", 4)
    reward = RewardModel.from_pretrained(tmp_path / "rm", options=FLOAT32)
    texts = [reward.text(p.prompt, r) for p in PAIRS[9:] for r in (p.chosen, p.rejected)]
    scores = np.array(reward.rewards(texts)[0]).reshape(9, 2)
    margins = scores[:, 0] - scores[:, 1]
    assert metrics["eval_accuracy"] == pytest.approx((margins > 0).mean())
    assert metrics["eval_margin"] == pytest.approx(margins.mean(), rel=1e-3, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-3)
    means = [metrics[f"eval_{name}_reward"] for name in ("min", "mean", "max")]
    assert means == pytest.approx([scores.min(), scores.mean(), scores.max()], rel=1e-3, abs=1e-5)
