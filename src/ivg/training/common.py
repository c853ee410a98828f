"""What every trained model has in common: settings, checkpoints that survive a kill, a folder that says how it was made.

A run's folder: the finished model (config.json, weights, tokenizer, README.md, metrics.json), ``run.json`` (what it was asked for,
written first; another request is refused), ``checkpoints/`` while it trains. ``metrics.json`` is written last: with it, the run is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ivg.errors import ConfigError, ModelError
from ivg.records import write_json, write_text

Mode = Literal["full", "lora", "head"]
PARTS = (25, 50, 75, 100)
"""Percentages of the response at which values are measured."""


@dataclass(frozen=True)
class TrainingOptions:
    """Settings that all trainers share; transformers' ``TrainingArguments`` under the names of this project.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate; warm-up, then cosine to zero.
        batch_size: rows for each step and device.
        accumulate: steps whose gradients are added up.
        max_length: tokens of a row (prompt and response) at most; longer rows are left out, and counted.
        warmup: share of the steps.
        weight_decay: of AdamW.
        mode: ``full``; ``lora`` (PEFT, merged at the end); ``head`` (values only: the body stays as it is).
        lora_rank: rank of LoRA; alpha is twice that, on all linear layers.
        eval_share: the last part of the data, held out and measured.
        evaluations: how often during training, at equal distances.
        save_steps: steps between checkpoints.
        seed: of data order and new weights.
        template: how the model reads a prompt: ``chat``, a text with ``{prompt}``, or None.
        report_to: tracker (``wandb``, ``tensorboard`` …) or ``none``.
        trust_remote_code: run code from the model's repository.
        extra: any other field of the trainer's arguments, as it stands.
    """

    epochs: float = 1.0
    lr: float = 1e-4
    batch_size: int = 32
    accumulate: int = 1
    max_length: int = 1024
    warmup: float = 0.1
    weight_decay: float = 0.0
    mode: Mode = "full"
    lora_rank: int = 16
    eval_share: float = 0.05
    evaluations: int = 4
    save_steps: int = 200
    seed: int = 0
    template: str | None = None
    report_to: str = "none"
    trust_remote_code: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> TrainingOptions:
        """Itself, or an error.

        Raises:
            ConfigError: a setting out of range; names it.
        """
        rules = (
            ("epochs", self.epochs > 0, "positive"),
            ("lr", self.lr > 0, "positive"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("max_length", self.max_length >= 2, "at least 2"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("eval_share", 0 <= self.eval_share < 1, "in [0, 1)"),
            ("evaluations", self.evaluations >= 1, "at least 1"),
            ("mode", self.mode in ("full", "lora", "head"), "full, lora or head"),
        )
        for name, fine, expected in rules:
            if not fine:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)}")
        return self


def first_process() -> bool:
    """True but in the other processes of ``accelerate launch`` or ``torchrun``, which leave the folder alone."""
    return int(os.environ.get("RANK", "0")) == 0


class Run:
    """The folder of one training run.

    Args:
        out: the folder.
        request: everything that the result depends on.

    Raises:
        ConfigError: the folder holds another run, or something else.
    """

    def __init__(self, out: str | Path, request: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.request = json.loads(json.dumps(request, default=str))
        self.checkpoints = self.out / "checkpoints"
        note = self.out / "run.json"
        if note.exists():
            found = json.loads(note.read_text(encoding="utf-8"))
            different = [k for k in sorted({*found, *self.request}) if found.get(k) != self.request.get(k)]
            if different:
                lines = "; ".join(f"{k}: {found.get(k)!r} there, {self.request.get(k)!r} now" for k in different)
                raise ConfigError(f"{self.out} holds a run with other settings: {lines}\n  give another --out, or remove the folder")
        elif (self.out / "config.json").exists():
            raise ConfigError(f"{self.out} holds a model already\n  give another --out")
        elif first_process():
            write_json(note, self.request)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What was measured, when the run is done."""
        path = self.out / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint; halves that a kill left behind are removed (the trainer's state is written last)."""
        steps = sorted(self.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
        for folder in steps:
            try:
                json.loads((folder / "trainer_state.json").read_text())
            except (OSError, ValueError):
                if first_process():
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            return str(folder)
        return None

    def finish(self, metrics: Mapping[str, Any], card: str) -> dict[str, Any]:
        """The model lies in the folder: write its card, drop the checkpoints, and say that the run is done."""
        if not first_process():
            return dict(metrics)
        write_text(self.out / "README.md", card)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        write_json(self.out / "metrics.json", dict(metrics))
        return dict(metrics)


def arguments(kind: Any, options: TrainingOptions, run: Run, rows: int, *, evaluate: bool, **fixed: Any) -> Any:
    """``kind`` (TrainingArguments or a child) from our settings; ``options.extra`` has the last word.

    Raises:
        ConfigError: ``extra`` names a field that ``kind`` lacks.
    """
    import torch

    from ivg.models.loading import pick_dtype

    known = {f.name for f in fields(kind)}
    unknown = sorted(set(options.extra) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}\n  expected any field of transformers' and TRL's arguments")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    steps = max(1, -(-rows // (options.batch_size * options.accumulate)))
    total = max(1, int(steps * options.epochs))
    every = max(1, total // options.evaluations)
    settings: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "num_train_epochs": options.epochs,
        "learning_rate": options.lr,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "warmup_steps": int(total * options.warmup),
        "weight_decay": options.weight_decay,
        "lr_scheduler_type": "cosine",
        "seed": options.seed,
        "bf16": pick_dtype("auto", device) == torch.bfloat16,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "logging_steps": max(1, min(50, total // 20)),
        "save_steps": options.save_steps,
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": every,
        "report_to": options.report_to,
        "disable_tqdm": True,
        **fixed,
    }
    return kind(**settings | dict(options.extra))


def request_of(what: str, model: str | Path, data: Sequence[str | Path], options: TrainingOptions, **more: Any) -> dict[str, Any]:
    """What a run depends on, for :class:`Run`; trackers and checkpoint distances do not count."""
    settings = {k: v for k, v in asdict(options).items() if k not in ("report_to", "save_steps")}
    return {"what": what, "model": str(model), "data": [str(d) for d in data], **settings, **more}


def load_for_training(auto_class: Any, name: str | Path, what: str, trust_remote_code: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """(network in float32, tokenizer with a padding token).

    Raises:
        ModelError: nothing usable at ``name``.
    """
    from ivg.models.loading import LoadOptions, load_network, load_tokenizer

    options = LoadOptions(device="cpu", dtype="float32", trust_remote_code=trust_remote_code, extra=kwargs)
    network = load_network(name, auto_class, options, what)
    tokenizer = load_tokenizer(name, LoadOptions(trust_remote_code=trust_remote_code), what)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token\n  give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    if network.config.get_text_config().pad_token_id is None:
        network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def lora(options: TrainingOptions, task: str) -> Any:
    """PEFT's LoRA configuration for ``options``, None unless the mode is ``lora``.

    Raises:
        ConfigError: PEFT is not installed.
    """
    if options.mode != "lora":
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("LoRA needs PEFT\n  pip install 'ivg[train]'") from None
    rank, whole = options.lora_rank, ["score"] if task == "SEQ_CLS" else None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task, modules_to_save=whole)


def numbers(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trainer's log without clocks, which no two runs share."""
    clocks = ("runtime", "per_second", "total_flos", "num_tokens")
    return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in log]


def write_card(kind: str, run: Run, metrics: Mapping[str, Any], use: str) -> str:
    """A model card: what it is, from what, how, what was measured, how to use it."""
    request = run.request
    shown = {k: v for k, v in metrics.items() if k != "log"}
    return f"""---
library_name: transformers
base_model: {request["model"]}
tags: [ivg, inference-time-alignment]
---
# {kind}

Trained by [ivg](https://arxiv.org/abs/2409.17819) (`ivg train {request["what"]}`) from `{request["model"]}`
on {", ".join(f"`{d}`" for d in request["data"])}.

{use}

Settings:

```json
{json.dumps(request, indent=2)}
```

Measured on the held-out part of the data:

```json
{json.dumps(shown, indent=2)}
```
"""
