"""Training explicit values: a vocabulary or scalar head on any causal model, fitted to one of the targets of ``training.targets``.

transformers' Trainer underneath (devices, precision, checkpoints, trackers); the network in training is ``training.value_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ivg.errors import ConfigError, ModelError
from ivg.models.loading import LoadOptions, load_config
from ivg.models.value_head import ValueModel
from ivg.models.vocabulary import Vocabulary
from ivg.settings.train import TrainSettings, ValueSettings
from ivg.training import encoding
from ivg.training.common import (
    PARTS,
    RunDir,
    arguments,
    build_request,
    drop_timing_metrics,
    first_process,
    load_for_training,
    lora,
    no_rows_error,
    write_card,
)
from ivg.training.data import RatedResponse, held_out
from ivg.training.encoding import Encoded
from ivg.training.value_loss import ValueCollator, ValueModelWithLoss


def train_value(
    model: str | Path,
    rows: Sequence[RatedResponse],
    out: str | Path,
    options: TrainSettings,
    value: ValueSettings | None = None,
    *,
    sources: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Train a value; ``ExplicitValue.from_pretrained(out)`` loads it.

    Args:
        model: body: a causal model (directory or hub id), or a value of ours to go on from.
        rows: responses with their rewards; several for each prompt are welcome.
        out: folder of the run; resumed when interrupted, left alone when done.
        options: how to train.
        value: what to train.
        sources: named in the card.

    Returns:
        Metrics: root mean squared error and pair accuracy after 25, 50, 75 and 100 % of the held-out responses.

    Raises:
        ConfigError: settings that do not go together, no usable row.
        ModelError: a model that cannot be loaded.
    """
    value = value or ValueSettings()
    run = RunDir(out, build_request("value", model, sources, rows, options, value=asdict(value)))
    if run.metrics is not None:
        return run.metrics
    _check_scores(rows, value)
    torch.manual_seed(options.seed)
    network, tokenizer = _body(model, value, options)
    base, theirs = _policy(value, tokenizer, options)
    policy = (theirs, value.base_template) if base is not None else None
    first, last = held_out(rows, options.eval_share)
    train, test = (encoding.encode_rated(part, tokenizer, options.template, options.max_length, policy) for part in (first, last))
    if not train:
        raise no_rows_error(len(rows), options)
    training_model = ValueModelWithLoss(network, value, base)
    collator = ValueCollator(tokenizer.pad_token_id, value.scale)
    metrics = _fit(training_model, train, test, collator, options, run)
    if first_process():
        finished = training_model.finished()
        finished.notes = {"target": value.target, "scale": value.scale, "template": options.template}
        finished.save_pretrained(run.out)
        tokenizer.save_pretrained(run.out)
    found = {"rows": len(train), "rows_left_out": len(rows) - len(train) - len(test), **metrics}
    use = 'Load it with `ivg.ExplicitValue.from_pretrained(THIS)`, or `--value THIS`.\nIts unit is that of the rewards, times "scale".'
    return run.finish(found, write_card(f"Explicit value ({value.head} head, {value.target} targets)", run, found, use), first)


def _fit(
    training_model: ValueModelWithLoss,
    train: Sequence[Encoded],
    test: Sequence[Encoded],
    collator: ValueCollator,
    options: TrainSettings,
    run: RunDir,
) -> dict[str, float]:
    from transformers import Trainer, TrainingArguments

    args = arguments(
        TrainingArguments,
        options,
        run,
        evaluate=bool(test),
        remove_unused_columns=False,
        label_names=["rewards", "groups"],
        adam_beta2=0.98,
    )
    trainer = Trainer(
        model=training_model,
        args=args,
        train_dataset=cast("Any", list(train)),
        eval_dataset=cast("Any", list(test)) if test else None,
        data_collator=collator,
        compute_metrics=lambda p: part_metrics(torch.as_tensor(p.predictions), *map(torch.as_tensor, p.label_ids)),
    )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("a value's head is read outside its module, which ZeRO and FSDP do not allow\n  train it with plain DDP, or LoRA")
    run.train(trainer)
    measured = drop_timing_metrics(trainer.evaluate()) if test else {}
    return {k.removeprefix("eval_"): round(v, 5) for k, v in measured.items()}


def part_metrics(parts: Tensor, rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """Root mean squared error and pair accuracy after 25, 50, 75 and 100 % of the response.

    Pairs: two responses to one prompt with different rewards; equal values count half.

    Args:
        parts: values [rows, 4].
        rewards: [rows].
        groups: number of the prompt of each row, [rows].
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
    """Positions of all pairs of rows with one prompt and different rewards."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(i)
    found = [
        (a, b) for rows in members.values() for k, a in enumerate(rows) for b in rows[k + 1 :] if float(rewards[a]) != float(rewards[b])
    ]
    pairs = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _check_scores(rows: Sequence[RatedResponse], value: ValueSettings) -> None:
    """Raise where the scores do not fit the target.

    Raises:
        ConfigError: outcomes outside [0, 1].
    """
    if value.target == "binary" and (bad := next((r.score for r in rows if not 0 <= r.score * value.scale <= 1), None)) is not None:
        raise ConfigError(f"target binary needs outcomes in [0, 1], got a score of {bad}\n  0 is failure, 1 success; or take target fudge")


def _body(model: str | Path, value: ValueSettings, options: TrainSettings) -> tuple[ValueModel, Any]:
    """(network to train in float32, tokenizer): a fresh head on a causal model, or a value of ours to go on with.

    Raises:
        ModelError: a value with another head.
    """
    from transformers import AutoModel

    config = load_config(model, LoadOptions(trust_remote_code=options.trust_remote_code), "model")
    if getattr(config, "ivg_value", None) is not None:
        network, tokenizer = load_for_training(ValueModel, model, "value", options.trust_remote_code, options.mode)
        if network.kind != value.head:
            raise ModelError(f"{model} has a {network.kind} head, got head={value.head}")
    else:
        body, tokenizer = load_for_training(AutoModel, model, "model", options.trust_remote_code, options.mode)
        network = ValueModel(body, value.head, bias=False)
    if options.mode == "head":
        network.backbone.requires_grad_(False)
    elif (adapter := lora(options, "FEATURE_EXTRACTION")) is not None:
        from peft import get_peft_model

        network.backbone = get_peft_model(cast("Any", network.backbone), adapter)
    return network.train(), tokenizer


def _policy(value: ValueSettings, tokenizer: Any, options: TrainSettings) -> tuple[Any, Any]:
    """(network, tokenizer) of CD-Q's policy; (None, None) for other targets.

    Raises:
        VocabularyError: it has other tokens than the value.
    """
    from transformers import AutoModelForCausalLM

    if value.target != "cd-q" or value.base is None:
        return None, None
    network, theirs = load_for_training(AutoModelForCausalLM, value.base, "base", options.trust_remote_code, "head")
    Vocabulary(tokenizer, None, owner="value").require_same(Vocabulary(theirs, None, owner="base"), "cd-q compares their next tokens")
    return network.eval().requires_grad_(False), theirs


def measure(
    model: str | Path, rows: Sequence[RatedResponse], template: str | None = None, max_length: int = 1024, batch: int = 128
) -> dict[str, float]:
    """The metrics of :func:`train_value` for a finished value on any rated responses: several values on the same ones.

    Args:
        model: directory or hub id of a value.
        rows: responses with their rewards, in the unit of the rewards that the value was trained on.
        template: how it reads a prompt; None: as it was trained.
        max_length: longer rows are left out.
        batch: rows for each pass.
    """
    network, tokenizer = load_for_training(ValueModel, model, "value")
    found = encoding.encode_rated(rows, tokenizer, template or network.notes.get("template"), max_length)
    scale, target = network.notes.get("scale", 1.0), network.notes.get("target", "fudge")
    training_model = ValueModelWithLoss(
        network.eval(), ValueSettings(network.kind, "binary" if target == "binary" else "fudge", factored=False)
    )
    collator = ValueCollator(tokenizer.pad_token_id, scale)
    parts, rewards, groups = [], [], []
    with torch.no_grad():
        for start in range(0, len(found), batch):
            inputs = collator(found[start : start + batch])
            parts.append(training_model(**inputs)["parts"])
            rewards.append(inputs["rewards"])
            groups.append(inputs["groups"])
    return part_metrics(torch.cat(parts), torch.cat(rewards), torch.cat(groups))
