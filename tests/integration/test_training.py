"""Training on tiny models: values learn their targets, models trained by TRL load, killed runs give the same files."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from architectures import tiny
from ivg import testing
from ivg.errors import ConfigError, ModelError
from ivg.models.loading import LoadOptions
from ivg.models.training_rows import read_training_rows, row_hashes, seen
from ivg.settings.train import DPOSettings, SFTSettings, TrainSettings, ValueSettings, ValueTrainSettings
from ivg.training.data import RatedResponse, SFTExample
from ivg.types import Preference, Prompt
from ivg.utils.jsonl import as_lines
from ivg.utils.rng import uniform
from ivg.values.base import FunctionValue
from ivg.values.explicit import ExplicitValue
from killed import IVG, run_killed

pytest.importorskip("trl")
FLOAT32 = LoadOptions(device="cpu", dtype="float32")
COMMON = {
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "eval_share": 0.2,
    "evaluations": 1,
    "trainer_args": {"bf16": False},
}
FAST = ValueTrainSettings(**COMMON)


def save_model(folder, seed=0, permute=False):
    testing.tiny_model(seed=seed).save_pretrained(folder)
    testing.byte_tokenizer(permute=permute).save_pretrained(folder)
    return folder


def letters(count, seed=0):
    """Responses of letters a to d; the reward is the number of a's: readable from any prefix, in part."""
    rows = []
    for i in range(count):
        text = "".join("abcd"[int(4 * uniform(seed, i, k))] for k in range(8))
        rows.append(RatedResponse(Prompt(f"p{i // 4}"), text, float(text.count("a")), None, False))
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize(
    ("value", "mode", "least"),
    [
        ({"target": "fudge"}, "full", 0.75),
        ({"target": "fudge", "factored": False}, "full", 0.7),
        ({"target": "fudge", "head": "scalar"}, "full", 0.75),
        ({"target": "td", "head": "scalar"}, "full", 0.75),
        ({"target": "td"}, "lora", 0.7),
        ({"target": "cd-q"}, "full", 0.6),
        ({"target": "binary", "scale": 1 / 8}, "full", 0.7),
        ({"target": "fudge"}, "head", 0.55),
    ],
)
def test_a_value_learns_its_rewards_and_loads(model, tmp_path, value, mode, least):
    from ivg.training.value import train_value

    torch.manual_seed(0)
    options = FAST if mode == "full" else replace(FAST, mode=mode, num_train_epochs=8, learning_rate=1e-2)
    base = str(model) if value["target"] == "cd-q" else None
    metrics = train_value(model, letters(800), tmp_path / "v", options, ValueSettings(**value, base=base), sources=["letters"])
    assert metrics["pair_accuracy_100"] >= least
    assert metrics["rows"] == 640
    loaded = ExplicitValue.from_pretrained(tmp_path / "v", options=FLOAT32)
    assert loaded.head == value.get("head", "vocabulary")
    reader = testing.tiny_lm()
    scores = loaded.score([testing.hypothesis("p1", text, reader) for text in ("aaaaaaaa", "bcdbcdbc")])
    assert scores[0] > scores[1]
    assert "letters" in (tmp_path / "v" / "README.md").read_text()
    loaded.save_pretrained(tmp_path / "copy")  # what push_to_hub uploads
    assert (tmp_path / "copy" / "README.md").read_text() == (tmp_path / "v" / "README.md").read_text()
    assert not (tmp_path / "v" / "checkpoints").exists()
    for folder in ("v", "copy"):
        assert np.array_equal(read_training_rows(tmp_path / folder), row_hashes((r.prompt, r.response) for r in letters(800)[:640]))


def test_the_finished_head_gives_the_values_of_training(model):
    from ivg.training import encoding
    from ivg.training.value import load_value_network
    from ivg.training.value_loss import ValueCollator, ValueModelWithLoss

    options = ValueSettings()
    network, tokenizer = load_value_network(model, options, ValueTrainSettings())
    training_model = ValueModelWithLoss(network, options)
    with torch.no_grad():
        for parameter in training_model.factors.parameters():
            parameter.copy_(torch.randn_like(parameter))
    batch = ValueCollator(tokenizer.pad_token_id)(encoding.encode_rated(letters(6), tokenizer, None, 99))
    hidden = network.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    in_training = training_model.values(hidden, batch["input_ids"])
    whole = training_model.finished()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # [rows, positions, vocabulary]
    plain = whole[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    assert torch.allclose(in_training[:, 1:], plain, atol=1e-4)


def test_cd_q_in_blocks_is_the_expectation_over_the_whole_vocabulary(model, monkeypatch):
    from transformers import AutoModelForCausalLM

    from ivg.training import encoding, value_loss
    from ivg.training.value import load_value_network

    monkeypatch.setattr(value_loss, "BLOCK", 7)
    options = value_loss.ValueSettings(target="cd-q", base=str(model))
    network, tokenizer = load_value_network(model, options, ValueTrainSettings())
    torch.nn.init.normal_(network.head.weight)
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    made = encoding.encode_rated(letters(5), tokenizer, None, 99, (tokenizer, "Say: {prompt}"))
    batch = value_loss.ValueCollator(tokenizer.pad_token_id)(made)
    hidden = network.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    found = value_loss.ValueModelWithLoss(network, options, policy).expected_next(
        hidden, batch["mask"], (batch["base_ids"], batch["base_attention"], batch["base_mask"])
    )
    for i, row in enumerate(made):  # one row at a time, everything spelled out
        ids = [*row.policy_prompt, *row.ids[row.prompt_length :]]
        chances = policy(torch.tensor([ids])).logits[0].softmax(-1)
        for k in range(row.prompt_length, len(row.ids)):
            ahead = network.head(network.backbone(torch.tensor([row.ids[: k + 1]])).last_hidden_state[0, -1])
            wanted = (chances[len(row.policy_prompt) + k - row.prompt_length] * ahead).sum()
            assert found[i, k].item() == pytest.approx(wanted.item(), abs=1e-4)


def test_training_can_start_from_a_value(model, tmp_path):
    from ivg.training.value import train_value

    rows = letters(200)
    train_value(model, rows, tmp_path / "a", FAST)
    first = ExplicitValue.from_pretrained(tmp_path / "a", options=FLOAT32)
    tiny = replace(FAST, learning_rate=1e-9, num_train_epochs=1)
    train_value(tmp_path / "a", rows, tmp_path / "b", tiny)
    second = ExplicitValue.from_pretrained(tmp_path / "b", options=FLOAT32)
    h = testing.hypothesis("p1", "abab", testing.tiny_lm())
    assert second.score([h])[0] == pytest.approx(first.score([h])[0], abs=1e-3)


def test_refinement_samples_from_the_guided_policy(model, tmp_path):
    from ivg.settings.train import RefineSettings
    from ivg.training.data import read_rated
    from ivg.training.refine import refine

    found = refine(
        model, letters(120), tmp_path / "r", FAST, ValueSettings(base=str(model)),
        RefineSettings(rounds=1, samples=3, request={"max_new_tokens": 6, "temperature": 1.0}),
        FunctionValue(lambda _, r: float(r.count("a"))), load=FLOAT32,
    )  # fmt: skip
    assert len(found["rounds"]) == 2
    assert found["rounds"][1]["rows"] + found["rounds"][1]["rows_left_out"] > found["rounds"][0]["rows"]
    new = read_rated(tmp_path / "r" / "rollouts-1.jsonl")
    assert len(new) == 30 * 3
    assert all(r.score == r.response.count("a") for r in new)
    ExplicitValue.from_pretrained(tmp_path / "r", options=FLOAT32)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_pair_comes_from_sft_and_dpo(tmp_path, model, mode):
    from ivg.training import tune
    from ivg.values.implicit import ImplicitValue

    given = {**COMMON, "mode": mode, "learning_rate": 3e-3 if mode == "full" else 2e-2}
    options = SFTSettings(**given)
    rows = [SFTExample(Prompt(f"p{i}"), "abab") for i in range(40)]
    said = tune.sft(model, rows, tmp_path / "untuned", options, sources=["demos"])
    assert said["held_out"]["eval_loss"] < 4.0  # from log(257) = 5.5
    pairs = [Preference(Prompt(f"p{i}"), "aaaa", "bbbb") for i in range(40)]
    tune.dpo(tmp_path / "untuned", pairs, tmp_path / "tuned", DPOSettings(**given))
    value = ImplicitValue.from_pretrained(tmp_path / "tuned", tmp_path / "untuned", options=FLOAT32)
    good, bad = value.score([testing.hypothesis("p3", text, value.tuned) for text in ("aaaa", "bbbb")])
    assert good > 0 > bad
    assert (tmp_path / "tuned" / "adapter").exists() == (mode == "lora")
    trained = [(p.prompt, text) for p in pairs[:32] for text in (p.chosen, p.rejected)]  # a fifth was held out
    trained += [(r.prompt, r.response) for r in rows[:32]]  # and what the model where it began had seen
    assert np.array_equal(read_training_rows(tmp_path / "tuned"), row_hashes(trained))
    assert tune.sft(model, rows, tmp_path / "untuned", options, sources=["demos"]) == said  # done already
    with pytest.raises(ConfigError, match=r"settings differ from those of its run: num_train_epochs is 5, was 4\n"):
        tune.sft(model, rows, tmp_path / "untuned", SFTSettings(**given | {"num_train_epochs": 5}), sources=["demos"])


def test_dpo_appends_no_end_to_incomplete_responses(tmp_path, model, monkeypatch):
    import trl

    from ivg.training import tune

    seen = []
    monkeypatch.setattr(trl.DPOTrainer, "train", lambda self, **_: seen.append(self.train_dataset[0]) or 1 / 0)
    cut = [Preference(Prompt("p"), "aa", "bb", None, False, False)]
    with pytest.raises(ZeroDivisionError):
        tune.dpo(model, cut, tmp_path / "t", DPOSettings(eval_share=0))
    assert len(seen[0]["chosen_ids"]) == 2


@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "value"])
def test_rows_of_like_length_share_a_batch_in_every_training(tmp_path, model, command, monkeypatch):
    from transformers import Trainer

    from ivg.training import tune, value

    seen = []

    def look(self, **_):
        order = list(self._get_train_sampler())
        lengths = [len(texts[i]) for i in order]
        seen.append([lengths[i : i + 4] for i in range(0, len(lengths), 4)])
        raise ZeroDivisionError

    monkeypatch.setattr(Trainer, "train", look)
    given = {"eval_share": 0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    given["trainer_args"] = {"train_sampling_strategy": "group_by_length"}
    texts = ["ab" * (1 + i % 10) for i in range(400)]
    rows = {
        "sft": [SFTExample(Prompt("p"), text) for text in texts],
        "value": [RatedResponse(Prompt("p"), text, float(i)) for i, text in enumerate(texts)],
    }
    pairs = [Preference(Prompt("p"), text, "x") for text in texts]
    with pytest.raises(ZeroDivisionError):
        if command == "value":
            value.train_value(model, rows[command], tmp_path / "run", ValueTrainSettings(**given))
        else:
            settings = {"sft": SFTSettings, "dpo": DPOSettings, "reward": TrainSettings}[command](**given)
            getattr(tune, command)(model, rows.get(command, pairs), tmp_path / "run", settings)
    assert len(seen[0]) == 100
    assert sum(len(set(batch)) > 2 for batch in seen[0]) <= 1  # of ten lengths; the longest row comes first


@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "value"])
def test_a_training_by_length_also_evaluates(tmp_path, model, command):
    from ivg.training import tune, value

    given = {"eval_share": 0.25, "per_device_train_batch_size": 4}
    given["trainer_args"] = {"train_sampling_strategy": "group_by_length", "max_steps": 1}
    texts = ["ab" * (1 + i % 5) for i in range(24)]
    rated = [RatedResponse(Prompt(f"p{i // 2}"), text, float(i)) for i, text in enumerate(texts)]
    if command == "value":
        found = value.train_value(model, rated, tmp_path / "run", ValueTrainSettings(**given))
        assert found["loss"] > 0
        return
    pairs = [Preference(Prompt(f"p{i}"), text, "x") for i, text in enumerate(texts)]
    rows = [SFTExample(Prompt(f"p{i}"), text) for i, text in enumerate(texts)] if command == "sft" else pairs
    settings = {"sft": SFTSettings, "dpo": DPOSettings, "reward": TrainSettings}[command](**given)
    assert getattr(tune, command)(model, rows, tmp_path / "run", settings)


def test_a_strategy_that_cannot_read_the_rows_is_refused(tmp_path, model):
    from ivg.training import tune

    pairs = [Preference(Prompt(f"p{i}"), f"{i}aa", f"{i}bb") for i in range(20)]
    settings = TrainSettings(eval_share=0, trainer_args={"train_sampling_strategy": "batch_rebalance"})
    with pytest.raises(ConfigError, match="batch_rebalance is for ivg train sft"):
        tune.reward(model, pairs, tmp_path / "run", settings)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="TRL's head is for GPUs")
def test_dpo_reads_labels_only_on_a_cpu_in_all_passes(tmp_path, model, mode, monkeypatch):
    from trl.kernels import ChunkedLogProbFunction

    from ivg.training import tune

    def refuse(*_):
        raise AssertionError("TRL's head was used")

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", refuse)
    pairs = [Preference(Prompt(f"p{i}"), f"{i}aa", f"{i}bb") for i in range(20)]
    metrics = tune.dpo(model, pairs, tmp_path / "t", DPOSettings(num_train_epochs=1, eval_share=0.2, mode=mode))
    assert metrics["held_out"]["eval_loss"] > 0


def test_a_reward_model_learns_its_preferences(tmp_path, model):
    from ivg.training import tune
    from ivg.values.reward import RewardModel

    pairs = [Preference(Prompt(f"p{i}"), f"{i}aa", f"{i}bb") for i in range(60)]
    ties = [Preference(Prompt(f"p{i}"), "same", "same") for i in range(7)]
    metrics = tune.reward(model, [*ties, *pairs], tmp_path / "rm", FAST, sources=["pairs"])
    assert (metrics["rows"], metrics["ties_left_out"]) == (48, 7)
    trained = read_training_rows(tmp_path / "rm")
    assert np.array_equal(trained, row_hashes((p.prompt, text) for p in pairs[:48] for text in (p.chosen, p.rejected)))
    assert seen(trained, Prompt(" p3\n"), "3aa") and not seen(trained, Prompt("p3"), "3a a") and not seen(trained, Prompt("p1"), "same")
    assert metrics["held_out"]["eval_accuracy"] == 1.0
    reward = RewardModel.from_pretrained(tmp_path / "rm", options=FLOAT32)
    good, bad = reward.rewards([reward.text(Prompt("p99"), r) for r in ("9aa", "9bb")])[0]
    assert good > bad


@pytest.mark.parametrize("more", [[], ["--mode", "lora"], ["--control-length", "--like-length", "0.5"]])
def test_a_reward_of_rated_responses_is_measured_on_all_held_out_ones(tmp_path, model, more):
    from typer.testing import CliRunner

    from ivg.cli.app import app
    from ivg.values.reward import RewardModel

    rows = [
        {"question": f"p{i}", "answer": "ab " * (1 + int(5 * uniform(i, k))) + "abcd"[k % 4] * (k + 1), "score": 4 * uniform(k, i)}
        for i in range(10)
        for k in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    command = ["train", "reward", "--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "rm")]
    command += ["--columns", "prompt=question,response=answer", "--pairs-per-prompt", "4", "--label", "higher", "--min-margin", "0.25"]
    done = CliRunner().invoke(app, [*command, "--eval-share", "0.3", "--lr", "1e-3", "--set", "bf16=false", "--max-length", "64", *more])
    assert done.exit_code == 0, done.stderr
    metrics = json.loads((tmp_path / "rm" / "metrics.json").read_text())
    assert metrics == json.loads(done.stdout[done.stdout.rindex('{\n  "rows"') :])
    assert (metrics["rows"], metrics["rows_held_out"]) == (28, 12)
    found = metrics["ranking_by_given_scores" if "--control-length" in more else "ranking"]
    assert ("length_slope" in metrics) == ("ranking_by_given_scores" in metrics) == ("--control-length" in more)
    reward = RewardModel.from_pretrained(tmp_path / "rm", options=FLOAT32)
    held = [(row, r) for row in rows[42:] for r in reward.judge([(Prompt(row["question"]), row["answer"])])]
    pairs = [(a, b) for a in held for b in held if a[0]["question"] == b[0]["question"] and a[0]["score"] > b[0]["score"]]
    clear = [(a, b) for a, b in pairs if a[0]["score"] > b[0]["score"] + 1]
    for kind, some in (("pairs", pairs), ("clear_pairs", clear)):
        assert found[kind]["count"] == len(some)
        right = sum(0.5 if abs(a[1] - b[1]) <= 1e-4 else a[1] > b[1] for a, b in some)
        assert found[kind]["reward"]["rate"] == pytest.approx(right / len(some), abs=0.02)
    assert (found["responses"], found["responses_left_out"], found["spearman_within_prompts"]["prompts"]) == (18, 0, 3)
    assert "clear_pairs_of_like_length" in (tmp_path / "rm" / "README.md").read_text()
    again = CliRunner().invoke(app, [*command, "--eval-share", "0.3", "--lr", "1e-3", "--set", "bf16=false", "--max-length", "64"])
    assert (again.exit_code, "settings differ" in str(again.exception or "") + again.stderr) == ((0, False) if not more else (1, True))


def test_a_reward_is_saved_before_its_ranking_is_measured(tmp_path, model, monkeypatch):
    from ivg.training import tune
    from ivg.values.reward import RewardModel

    def stopped(*_):
        raise KeyboardInterrupt

    pairs = [Preference(Prompt(f"p{i}"), f"{i}aa", f"{i}bb") for i in range(20)]
    monkeypatch.setattr(tune, "measure_ranking", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.reward(model, pairs, tmp_path / "rm", FAST, sources=["pairs"])
    usable = RewardModel.from_pretrained(tmp_path / "rm", options=FLOAT32).judge([(Prompt("p9"), "9aa")])
    monkeypatch.undo()
    assert tune.reward(model, pairs, tmp_path / "rm", FAST, sources=["pairs"])["ranking"]["responses"] == 8
    assert RewardModel.from_pretrained(tmp_path / "rm", options=FLOAT32).judge([(Prompt("p9"), "9aa")]) == usable
    monkeypatch.setattr(tune, "first_process", lambda: False)  # the other processes of a run do not measure it again
    assert "ranking" not in tune.reward(model, pairs, tmp_path / "other", FAST, sources=["pairs"])


def test_a_command_ends_without_threads_of_its_process_group(tmp_path, model):
    """They may free tensors in an interpreter that is ending: SIGABRT, in one run of some hundred."""
    from torch import distributed

    from ivg.cli.app import app

    (tmp_path / "rows.jsonl").write_text(as_lines([{"prompt": f"p{i}", "chosen": f"{i}aa", "rejected": f"{i}bb"} for i in range(8)]))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    words = ["train", "reward", "--model", model, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "rm", "--set", "max_steps=1"]
    try:
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.long
def test_two_processes_train_a_reward(tmp_path, model):
    """Plain DDP: one file of metrics, in which every held-out response counts once, and no checkpoint is left."""
    rows = [{"prompt": f"p{i}", "chosen": f"{i}aa", "rejected": f"{i}bb"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ivg", "train", "reward"]
    words = ["--model", model, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "rm", "--batch-size", "4"]
    words, threads = [*launch, *map(str, words), "--set", "ddp_backend=gloo"], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "rm" / "metrics.json").read_text())
    assert metrics["ranking"]["responses"] == 2 * metrics["rows_held_out"] > 0
    assert not (tmp_path / "rm" / "checkpoints").exists()


def test_values_are_fitted_to_scores_without_length(model, tmp_path):
    from ivg.training.value import train_value

    rows = [RatedResponse(Prompt(f"p{i}"), "a " * (k + 1), float(k), None, False) for i in range(10) for k in range(4)]
    plain, controlled = (train_value(model, rows, tmp_path / str(c), FAST, ValueSettings(control_length=c)) for c in (False, True))
    assert "length_slope" not in plain
    x = np.log1p(np.arange(1, 5))
    assert controlled["length_slope"] == pytest.approx(((x - x.mean()) @ np.arange(4)) / ((x - x.mean()) ** 2).sum())
    assert controlled["rmse_100"] != plain["rmse_100"]


VALUE = "train value --model {model} --data {data} --out {out} --epochs 2.5 --lr 1e-3 --batch-size 16 --save-steps 7 --set bf16=false"
ROLLOUT = (
    "train rollout --base {model} --prompts {data} --reward {reward}:count --out {out}/r.jsonl --samples 2"
    " --max-new-tokens 12 --dtype float32"
)


@pytest.mark.parametrize("target", ["fudge", "td", "cd-q"])
def test_a_step_with_shared_prompts_is_that_of_separate_rows(tmp_path, model, target):
    """One batch of all rows in both, so that the same step follows."""
    from ivg.training.value import train_value

    rows, got = letters(48), []
    given = {"eval_share": 0, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "trainer_args": {"max_steps": 1}}
    for share, batch in ((False, 48), (True, 12)):
        options = ValueTrainSettings(**given, learning_rate=1e-2, warmup_steps=0, per_device_train_batch_size=batch, share_prompts=share)
        base = str(model) if target == "cd-q" else None
        train_value(model, rows, tmp_path / f"v{share}", options, ValueSettings(target=target, base=base))
        got.append(load_file(tmp_path / f"v{share}" / "model.safetensors"))
    separate, shared = got
    first = load_file(model / "model.safetensors")
    moved = [name for name in first if name in separate and not torch.equal(first[name], separate[name])]
    assert len(moved) > 3
    for name, weight in separate.items():  # Adam's first step has the sign of the gradient: rounding turns a sign where it is near 0
        assert ((weight - shared[name]).abs() < 1e-4).float().mean() > 0.99, name


def test_a_value_learns_with_shared_prompts_by_length(tmp_path, model):
    from ivg.training.value import train_value

    more = {"share_prompts": True, "trainer_args": {**FAST.trainer_args, "train_sampling_strategy": "group_by_length"}}
    metrics = train_value(model, letters(800), tmp_path / "v", replace(FAST, **more), ValueSettings())
    assert metrics["rows"] == 640
    assert metrics["pair_accuracy_100"] > 0.7


def test_metrics_of_shared_prompts_are_those_of_separate_rows(tmp_path, model):
    from ivg.training.value import train_value

    train_value(model, letters(200), tmp_path / "start", FAST)
    still = replace(FAST, learning_rate=1e-12, num_train_epochs=1, per_device_train_batch_size=3)
    separate, shared = (
        train_value(tmp_path / "start", letters(60, seed=1), tmp_path / f"{share}", replace(still, share_prompts=share))
        for share in (False, True)
    )
    assert separate["rows_held_out"] == shared["rows_held_out"] == 12
    for name in separate.keys() - {"loss"}:  # the mean over batches, which differ
        assert separate[name] == pytest.approx(shared[name], abs=1e-3), name


def test_shared_prompts_are_refused_where_attention_is_by_a_window(tmp_path):
    from ivg.training.value import train_value

    tiny("mistral", sliding_window=8, vocab_size=300).save_pretrained(tmp_path / "m")
    testing.byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"window of 8 tokens\n  leave --share-prompts out"):
        train_value(tmp_path / "m", letters(8), tmp_path / "v", replace(FAST, share_prompts=True), ValueSettings())


@pytest.mark.long
@pytest.mark.parametrize(
    ("template", "result", "moments"),
    [
        (VALUE, "model.safetensors", [(r"checkpoint-\d+.trainer_state\.json", 2), (r"killed.README\.md", 1)]),
        (ROLLOUT, "r.jsonl", [(r"r\.jsonl$", 2), (r"r\.jsonl$", 3)]),
    ],
)
def test_killed_runs_resume_to_the_same_files(tmp_path, model, template, result, moments):
    """A value while it writes its second checkpoint, and after training; rollouts before they write a block, twice."""
    data = tmp_path / "data.jsonl"
    data.write_text(as_lines({"prompt": f"p{i}", "response": r.response, "score": r.score} for i, r in enumerate(letters(300))))
    (tmp_path / "reward.py").write_text("def count(prompt, response):\n    return response.count('a')\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def line(out):
        return template.format(model=model, data=data, reward=tmp_path / "reward.py", out=out).split()

    def run(out):
        subprocess.run([sys.executable, "-m", "ivg", *line(out)], check=True, env=environment, capture_output=True)

    run(tmp_path / "whole")
    out = tmp_path / "killed"
    for pattern, count in moments:
        run_killed([*IVG, *line(out)], environment, pattern, count)
    run(out)
    assert (out / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()
    if template is VALUE:
        assert (out / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()
        assert not (out / "checkpoints").exists()


def test_a_run_with_other_data_is_refused(tmp_path, model):
    from ivg.training.value import train_value

    train_value(model, letters(40), tmp_path / "v", FAST)
    train_value(model, letters(40), tmp_path / "v", FAST)  # done already
    with pytest.raises(ConfigError, match="rows_sha256"):
        train_value(model, letters(40, seed=1), tmp_path / "v", FAST)


def test_a_value_reads_prompts_as_it_was_trained(tmp_path, model):
    from ivg.training.value import measure, train_value

    options = replace(FAST, template="<{prompt}>")
    metrics = train_value(model, letters(100), tmp_path / "v", options)
    assert ExplicitValue.from_pretrained(tmp_path / "v", options=FLOAT32).model.template == "<{prompt}>"
    held = [r for r in letters(100) if int(r.prompt.content[1:]) >= 20]  # the last fifth of 25 prompts
    found = measure(tmp_path / "v", held)
    assert found["rmse_50"] == pytest.approx(metrics["rmse_50"], abs=1e-3)
    assert found["pair_accuracy_75"] == pytest.approx(metrics["pair_accuracy_75"], abs=1e-4)


JINJA = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
QUICK = replace(FAST, num_train_epochs=1)


@pytest.mark.parametrize(
    ("name", "text", "kept", "same", "keep"),
    [("t.txt", "<{prompt}>", "<{prompt}>", "<{prompt}>", False), ("t.jinja", JINJA, "chat", "[{prompt}]>", True)],
)
def test_a_template_file_is_trained_with_and_kept_by_its_content(tmp_path, model, name, text, kept, same, keep):
    from ivg.training.value import train_value

    (tmp_path / name).write_text(text)
    lora = {"mode": "lora", "lora_r": 2, "keep_adapter": True} if keep else {}
    runs = {}
    for given in (str(tmp_path / name), same):
        folder = tmp_path / f"v{len(runs)}"
        runs[given] = train_value(model, letters(40), folder, replace(QUICK, template=given, **lora)), folder
    (found, folder), (expected, _) = runs.values()
    assert found == expected  # the same tokens
    with pytest.raises(ConfigError, match="template"):
        train_value(model, letters(40), folder, replace(QUICK, template="chat", **lora))
    (tmp_path / name).write_text(text.replace(">", "+"))
    with pytest.raises(ConfigError, match="template"):  # another text of the file is another run
        train_value(model, letters(40), folder, replace(QUICK, template=str(tmp_path / name), **lora))
    (tmp_path / name).unlink()
    loaded = ExplicitValue.from_pretrained(folder, options=FLOAT32).model
    assert loaded.template == kept
    ids = loaded.prompt_ids(Prompt("hello"))
    assert loaded.tokenizer.decode(ids) == same.replace("{prompt}", "hello")
    with pytest.raises(ConfigError, match=r"cannot read the template .*: No such file"):
        train_value(model, letters(40), tmp_path / "none", replace(QUICK, template=str(tmp_path / name)))


def test_the_template_file_of_a_reward(tmp_path, model, ivg):
    from transformers import AutoTokenizer

    rows = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "bb"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text(as_lines(rows))
    (tmp_path / "t.jinja").write_text(JINJA)
    own = shutil.copytree(model, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = JINJA
    tokenizer.save_pretrained(own)
    losses = []
    for start, template in ((model, tmp_path / "t.jinja"), (own, "chat")):
        folder = tmp_path / f"run{len(losses)}"
        common = ["--data", tmp_path / "rows.jsonl", "--epochs", 1, "--eval-share", 0, "--evaluations", 1]
        code, _, err = ivg("train", "reward", *common, "--model", start, "--template", template, "--out", folder)
        assert code == 0, err
        losses.append([row["loss"] for row in json.loads((folder / "log.json").read_text()) if "loss" in row])
    assert losses[0] and losses[0] == losses[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "run0").chat_template == JINJA
    assert json.loads((tmp_path / "run0" / "config.json").read_text())["ivg_template"] == "chat"


@pytest.mark.parametrize(("rows", "share", "says"), [(2, "0.1", True), (2, "0", False), (8, "0.5", False)])
def test_the_command_says_when_nothing_was_held_out(tmp_path, model, rows, share, says):
    from typer.testing import CliRunner

    from ivg.cli.app import app

    data = [{"prompt": f"p{i}", "response": "abab", "score": float(i)} for i in range(rows)]
    (tmp_path / "rows.jsonl").write_text(as_lines(data))
    command = ["train", "value", "--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "v")]
    done = CliRunner().invoke(app, [*command, "--eval-share", share, "--epochs", "1"])
    assert done.exit_code == 0
    assert ("no row was held out for evaluation" in done.stderr) == says
    assert f'"rows_held_out": {rows // 2 if share == "0.5" else 0}' in done.stdout


def test_errors(tmp_path, model):
    from ivg.training import tune
    from ivg.training.value import train_value

    with pytest.raises(ConfigError, match=r"no row is left to train on: 4 rows, at most 3 tokens"):
        train_value(model, letters(4), tmp_path / "a", ValueTrainSettings(max_length=3, eval_share=0))
    with pytest.raises(ConfigError, match=r"outcomes in \[0, 1\]"):
        train_value(model, [RatedResponse(Prompt("p"), "r", 3.0)], tmp_path / "b", ValueTrainSettings(), ValueSettings(target="binary"))
    with pytest.raises(ConfigError, match="mode head trains the head of a value"):
        tune.sft(model, [SFTExample(Prompt("p"), "r")], tmp_path / "c", SFTSettings(mode="head"))
    with pytest.raises(ConfigError, match="has no field colour"):
        tune.sft(model, [SFTExample(Prompt("p"), "r")], tmp_path / "d", SFTSettings(trainer_args={"colour": 1}))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a model already"):
        tune.sft(model, [SFTExample(Prompt("p"), "r")], tmp_path / "e", SFTSettings())
    testing.tiny_value().network.save_pretrained(tmp_path / "f")
    testing.byte_tokenizer().save_pretrained(tmp_path / "f")
    with pytest.raises(ModelError, match="has a vocabulary head, got head=scalar"):
        train_value(tmp_path / "f", letters(8), tmp_path / "g", FAST, ValueSettings(head="scalar"))
    for train, settings in ((tune.dpo, DPOSettings()), (tune.reward, TrainSettings())):
        with pytest.raises(ConfigError, match="in all 2 pairs chosen and rejected are the same text"):
            train(model, 2 * [Preference(Prompt("p"), "r", "r")], tmp_path / train.__name__, settings)


@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "value"])
def test_a_missing_extra_is_one_line(command, tmp_path):
    """In a process of its own, where none of the extra's packages is installed, as after ``make demo``."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b", "score": 1.0}\n')
    code = """
import sys
from importlib.machinery import PathFinder

class WithoutExtra:
    def __getattr__(self, name):
        return getattr(PathFinder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in ("accelerate", "peft", "trl", "datasets")
        return None if absent else PathFinder.find_spec(name, path, target)

sys.meta_path = [WithoutExtra() if finder is PathFinder else finder for finder in sys.meta_path]
from ivg.cli import main
main()
"""
    arguments = ["train", command, "--model", "embedded:untuned", "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: training needs \w+ - pip install 'ivg\[train\]'", done.stderr.strip())
