"""Train explicit values: a vocabulary or scalar head on any causal model, fitted to one of the targets of :mod:`ivg.training.targets`.

Built on transformers' ``Trainer`` (devices, precision, checkpoints, trackers); the network in training is :mod:`ivg.training.value_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from ivg.errors import ConfigError, ModelError
from ivg.models.loading import LoadOptions, load_config
from ivg.models.shared_prompts import sharing_fault
from ivg.models.value_head import ValueModel
from ivg.models.vocabulary import Vocabulary
from ivg.settings.train import Target, TrainSettings, ValueSettings, ValueTrainSettings
from ivg.training.data import RatedResponse
from ivg.training.encoding import Encoded, encode_rated, prompt_rows, read_template
from ivg.training.kept_adapter import check_start, keep_tokenizer, save_adapter, save_head
from ivg.training.length import length_controlled
from ivg.training.run_dir import RunDir, first_process, open_run, process_count, recorded, run_provenance
from ivg.training.split import last_share
from ivg.training.trainer import GroupedByLength, drop_timing_metrics, load_for_training, lora_config, split_rows, trainer_arguments
from ivg.training.value_loss import PARTS, ValueCollator, ValueModelWithLoss
from ivg.utils.rounding import keep_digits


def train_value(
    model: str | Path,
    rows: Sequence[RatedResponse],
    out: str | Path,
    settings: ValueTrainSettings,
    value: ValueSettings | None = None,
    *,
    sources: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Train a value; ``ExplicitValue.from_pretrained(out)`` loads it.

    Args:
        model: a causal model (directory or hub id), or a value trained by this function.
        rows: responses with their rewards, preferably several for each prompt.
        out: folder of the run. An interrupted run resumes; a finished one returns its metrics.
        settings: of the trainer.
        value: head and targets; None: the defaults.
        sources: where the rows come from; named in the model card.

    Returns:
        Metrics: root mean squared error and pair accuracy after 25, 50, 75 and 100 % of the held-out responses.

    Raises:
        ConfigError: settings that do not go together, no usable row, or ``out`` holds another run.
        ModelError: a model that cannot be loaded.
    """
    value = value or ValueSettings()
    with open_run(out, run_provenance("value", model, sources, rows, settings, value=recorded(value))) as run:
        if run.metrics is not None:
            return run.metrics
        _check_scores(rows, value)
        if settings.keep_adapter:
            check_start(model)
        slope = {}
        if value.control_length:
            rows, slope["length_slope"] = length_controlled(rows, last_share([row.prompt for row in rows], settings.eval_share))
        torch.manual_seed(settings.seed)
        network, tokenizer = load_value_network(model, value, settings)
        if settings.keep_adapter and value.compact_head and network.head.weight.any():
            raise ConfigError(f"{model} has a head already, to which a compact one cannot be added\n  leave --compact-head out")
        template, (base, base_tokenizer) = read_template(settings.template, tokenizer), _load_base(value, tokenizer, settings)
        policy = (base_tokenizer, read_template(value.base_template, base_tokenizer)) if base is not None else None
        split = split_rows(rows, settings, lambda part: encode_rated(part, tokenizer, template, settings.max_length, policy))
        trained, rows_of = ValueModelWithLoss(network, value, base), (split.train, split.test)
        train, test = _by_prompt(rows_of, network, settings) if settings.share_prompts else rows_of
        metrics = split.counts | slope | _fit(trained, train, test, ValueCollator(tokenizer.pad_token_id, value.scale), settings, run)
        if first_process():
            notes = {"target": value.target, "scale": value.scale, "template": template}
            _save(trained, tokenizer, notes, settings, model, run.path)
        title = f"Explicit value ({value.head} head, {value.target} targets)"
        usage = 'Load it with `ivg.ExplicitValue.from_pretrained(THIS)`, or `--value THIS`.\nIts unit is that of the rewards times "scale".'
        return run.finish(metrics, title, usage, split.rows)


def _by_prompt(parts: Sequence[list[Encoded]], network: ValueModel, settings: ValueTrainSettings) -> list[list[Any]]:
    """Rows for training and for evaluation, those of one prompt together.

    Raises:
        ConfigError: the network cannot read several responses behind one prompt.
    """
    if fault := sharing_fault(network, settings.max_length):
        raise ConfigError(f"responses cannot share a prompt: the network {fault}\n  leave --share-prompts out")
    train, test = parts
    # where there are several processes, evaluation counts one output for each row of a batch
    return [prompt_rows(train, settings.max_length), prompt_rows(test, settings.max_length) if process_count() == 1 else test]


def _save(
    trained: ValueModelWithLoss, tokenizer: Any, notes: Mapping[str, Any], settings: TrainSettings, model: str | Path, folder: Path
) -> None:
    """The whole value; or what was trained of it alone, beside the name of ``model``."""
    if not settings.keep_adapter:
        finished = trained.finished()
        finished.notes = dict(notes)
        finished.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    about, network = {"ivg_value": {"head": trained.model.kind, **notes}}, trained.model
    if settings.mode == "head":
        save_head(folder, model, about, trained.stored_head())
    else:
        save_adapter(network.backbone, folder, model, about, trained.stored_head())
    keep_tokenizer(tokenizer, settings.template, folder)


def _fit(
    model: ValueModelWithLoss, train: list[Any], test: list[Any], collator: ValueCollator, settings: TrainSettings, run: RunDir
) -> dict[str, Any]:
    """Train, and return the metrics of the held-out rows."""
    own: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["rewards", "groups"], "adam_beta2": 0.98}
    trainer = _ValueTrainer(
        model=model,
        args=trainer_arguments(TrainingArguments, settings, run, model.model.backbone, evaluate=bool(test), **own),
        train_dataset=cast("Any", train),
        eval_dataset=cast("Any", test or None),
        data_collator=collator,
        compute_metrics=lambda p: part_metrics(torch.as_tensor(p.predictions), *map(torch.as_tensor, p.label_ids)),
    )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("a value's head is read outside its module, which ZeRO and FSDP do not allow\n  train it with plain DDP, or LoRA")
    run.train(trainer)
    if settings.keep_adapter:
        model.settle()
    measured = drop_timing_metrics(trainer.evaluate()) if test else {}
    return {k.removeprefix("eval_"): keep_digits(v, 5) for k, v in measured.items()}


class _ValueTrainer(GroupedByLength, Trainer):
    """That of transformers, with batches of like length."""


def part_metrics(parts: Tensor, rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """Root mean squared error and pair accuracy after 25, 50, 75 and 100 % of the response.

    A pair is two responses to one prompt with different rewards; equal values count one half.

    Args:
        parts: values [rows, 4].
        rewards: [rows].
        groups: index of each row's prompt, [rows].
    """
    first, second = _pairs(groups, rewards)
    better = (rewards[first] > rewards[second])[:, None]
    a, b = parts[first], parts[second]
    right = torch.where(a == b, 0.5, ((a > b) == better).double())
    out = {f"rmse_{part}": float(((parts[:, i] - rewards) ** 2).mean().sqrt()) for i, part in enumerate(PARTS)}
    if len(first):
        out |= {f"pair_accuracy_{part}": float(right[:, i].mean()) for i, part in enumerate(PARTS)}
    return out


def _pairs(groups: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all pairs of rows with the same prompt and different rewards."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(i)
    found = [
        (a, b) for rows in members.values() for k, a in enumerate(rows) for b in rows[k + 1 :] if float(rewards[a]) != float(rewards[b])
    ]
    pairs = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _check_scores(rows: Sequence[RatedResponse], value: ValueSettings) -> None:
    """Raise if the scores do not fit the target.

    Raises:
        ConfigError: target binary, and an outcome outside [0, 1].
    """
    if value.target == "binary" and (bad := next((r.score for r in rows if not 0 <= r.score * value.scale <= 1), None)) is not None:
        raise ConfigError(f"target binary needs outcomes in [0, 1], got a score of {bad}\n  0 is failure, 1 success; or use target fudge")


def load_value_network(model: str | Path, value: ValueSettings, settings: TrainSettings) -> tuple[ValueModel, Any]:
    """(network to train, tokenizer): a new head on a causal model, or a trained value.

    Raises:
        ModelError: a trained value with another head.
    """
    trust, mode = settings.trust_remote_code, settings.mode
    config = load_config(model, LoadOptions(trust_remote_code=trust), "model")
    if getattr(config, "ivg_value", None) is not None:
        network, tokenizer = load_for_training(ValueModel, model, "value", trust, mode)
        if network.kind != value.head:
            raise ModelError(f"{model} has a {network.kind} head, got head={value.head}")
    else:
        body, tokenizer = load_for_training(AutoModel, model, "model", trust, mode)
        network = ValueModel(body, value.head, bias=False)
    network.head.float()
    if mode == "head":
        network.backbone.requires_grad_(False)
    elif (adapter := lora_config(settings, "FEATURE_EXTRACTION")) is not None:
        from peft import get_peft_model

        network.backbone = get_peft_model(cast("Any", network.backbone), adapter)
    return network.train(), tokenizer


def _load_base(value: ValueSettings, tokenizer: Any, settings: TrainSettings) -> tuple[Any, Any]:
    """(network, tokenizer) of CD-Q's policy; (None, None) for other targets.

    Raises:
        VocabularyError: its vocabulary is not that of the value.
    """
    if value.target != "cd-q" or value.base is None:
        return None, None
    network, own = load_for_training(AutoModelForCausalLM, value.base, "base", settings.trust_remote_code, "head")
    Vocabulary(tokenizer, None, owner="value").require_same(Vocabulary(own, None, owner="base"), "cd-q compares their next tokens")
    return network.eval().requires_grad_(False), own


def measure(
    model: str | Path, rows: Sequence[RatedResponse], template: str | None = None, max_length: int = 1024, batch: int = 128
) -> dict[str, float]:
    """The metrics of :func:`train_value` for a trained value on other rated responses, to compare values on the same ones.

    Args:
        model: directory or hub id of a value.
        rows: responses with their rewards, in the unit of those that the value was trained on.
        template: how it reads a prompt; None: as in training.
        max_length: longer rows are left out.
        batch: rows for each pass.
    """
    network, tokenizer = load_for_training(ValueModel, model, "value")
    found = encode_rated(rows, tokenizer, read_template(template or network.notes.get("template"), tokenizer), max_length)
    target: Target = "binary" if network.notes.get("target") == "binary" else "fudge"
    trained = ValueModelWithLoss(network.eval(), ValueSettings(head=network.kind, target=target, factored=False))
    collator = ValueCollator(tokenizer.pad_token_id, network.notes.get("scale", 1.0))
    parts, rewards, groups = [], [], []
    with torch.no_grad():
        for start in range(0, len(found), batch):
            inputs = collator(found[start : start + batch])
            parts.append(trained(**inputs)["parts"])
            rewards.append(inputs["rewards"])
            groups.append(inputs["groups"])
    return part_metrics(torch.cat(parts), torch.cat(rewards), torch.cat(groups))
