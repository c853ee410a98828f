"""What every trained model has in common: settings, checkpoints that survive a kill, a folder that says how it was made.

A run's folder: the finished model (config.json, weights, tokenizer, README.md, metrics.json), ``training_rows.npy`` (fingerprints of
the rows that it was trained on, by which ``ivg check`` knows them again), ``run.json`` (what it was asked for,
written first; another request is refused), ``log.json`` (the trainer's log, with its clocks), ``checkpoints/`` while it trains. With
``metrics.json`` the run is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError, ModelError
from ivg.jobs.fingerprints import fingerprint
from ivg.models.training_rows import write_training_rows
from ivg.settings.train import Mode, TrainSettings
from ivg.training.data import Preference, RatedResponse, SFTExample, answers
from ivg.utils.jsonl import jsonable, write_json, write_text

PARTS = (25, 50, 75, 100)
"""Percentages of the response at which values are measured."""


def first_process() -> bool:
    """True but in the other processes of ``accelerate launch`` or ``torchrun``, which leave the folder alone."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Until every process of this run is here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def require_single_process(what: str) -> None:
    """Raise in a run of several processes.

    Raises:
        ConfigError: ``what`` is done by one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} runs in one process\n  start it without accelerate launch or torchrun")


class RunDir:
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
            if different and {p.name for p in self.out.iterdir()} == {note.name}:
                write_json(note, self.request)  # that run ended before it began to train: nothing of it could be lost or mixed
            elif different:
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

    def train(self, trainer: Any) -> None:
        """Train from the last whole checkpoint, if there is one; a run that has made all its steps makes no more."""
        last = self.last_checkpoint()
        state = json.loads((Path(last) / "trainer_state.json").read_text()) if last is not None else {}
        if last is not None and state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(last)  # transformers would make one step more
            return
        trainer.train(resume_from_checkpoint=last)
        if first_process():
            write_json(self.out / "log.json", trainer.state.log_history)

    def finish(self, metrics: Mapping[str, Any], card: str, rows: Sequence[Preference | RatedResponse | SFTExample]) -> dict[str, Any]:
        """The model lies in the folder: write its card, say that the run is done, drop the checkpoints.

        ``rows``: those that it was trained on, for their fingerprints; those of the model where it began are added.
        """
        if first_process():
            write_training_rows(self.out, (answer for row in rows for answer in answers(row)), self.request["model"])
            write_text(self.out / "README.md", card)
            write_json(self.out / "metrics.json", dict(metrics))
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # last: without them nothing could be resumed
        wait_for_all()
        return dict(metrics)


def arguments(kind: Any, options: TrainSettings, run: RunDir, *, evaluate: bool, **fixed: Any) -> Any:
    """``kind`` (TrainingArguments or a child) from our settings; ``options.extra`` has the last word.

    Raises:
        ConfigError: ``extra`` names a field that ``kind`` lacks.
    """
    import torch

    from ivg.models.loading import pick_dtype

    # the field's new name is unknown to transformers 5.16, which the package allows
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(options.extra) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}\n  expected any field of transformers' and TRL's arguments")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    during = evaluate and options.evaluations > 1  # the last one comes after training in any case
    settings: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "num_train_epochs": options.epochs,
        "learning_rate": options.lr,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "warmup_steps": options.warmup,  # below 1: a share of the steps
        "weight_decay": options.weight_decay,
        "lr_scheduler_type": "cosine",
        "seed": options.seed,
        "bf16": pick_dtype("auto", device) == torch.bfloat16,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "dataloader_pin_memory": cuda,
        "logging_steps": 0.02,
        "save_steps": options.save_steps,
        "save_total_limit": 1,
        "eval_strategy": "steps" if during else "no",
        "eval_steps": 1 / options.evaluations if during else None,
        "report_to": options.report_to,
        "disable_tqdm": True,
        **fixed,
    }
    return kind(**settings | dict(options.extra))


def build_request(
    what: str, model: str | Path, data: Sequence[str | Path], rows: Sequence[Any], options: TrainSettings, **more: Any
) -> dict[str, Any]:
    """What a run depends on, for :class:`RunDir`: settings and the very rows; trackers and checkpoint distances do not count."""
    settings = {k: v for k, v in asdict(options).items() if k not in ("report_to", "save_steps")}
    about = {
        "what": what,
        "model": str(model),
        "weights": fingerprint(str(model)),
        "data": [str(d) for d in data],
        "rows": len(rows),
        "rows_sha256": digest(rows),
    }
    return {**about, **settings, **more}


def digest(rows: Sequence[Any]) -> str:
    """A fingerprint of training rows (dataclasses), so that a run never goes on with other data."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()[:16]


def load_for_training(
    auto_class: Any, name: str | Path, what: str, trust_remote_code: bool = False, mode: Mode = "full", **kwargs: Any
) -> tuple[Any, Any]:
    """(network, tokenizer with a padding token): float32, or on a GPU bfloat16 where the body stays as it is (``lora``, ``head``).

    Raises:
        ModelError: nothing usable at ``name``.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from ivg.models.loading import LoadOptions, load_network, load_tokenizer

    frozen = mode != "full" and torch.cuda.is_available()
    options = LoadOptions(device="cpu", dtype="bfloat16" if frozen else "float32", trust_remote_code=trust_remote_code, extra=kwargs)
    new_head = auto_class is AutoModelForSequenceClassification
    network = load_network(name, auto_class, options, what, new_head=new_head)
    tokenizer = load_tokenizer(name, LoadOptions(trust_remote_code=trust_remote_code), what)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token\n  give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    if network.config.get_text_config().pad_token_id is None:
        network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def no_rows_error(count: int, options: TrainSettings) -> ConfigError:
    """There is nothing to train on: why."""
    return ConfigError(
        f"none of the {count} rows is left to train on (at most {options.max_length} tokens; {options.eval_share:.0%} of the prompts"
        " held out)\n  raise --max-length, give more prompts, or lower --eval-share"
    )


def lora(options: TrainSettings, task: str) -> Any:
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


def drop_timing_metrics(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation measured, without clocks, which no two runs share."""
    clocks = ("runtime", "per_second", "preparation_time", "total_flos", "num_tokens")
    return {k: v for k, v in sorted(measured.items()) if k != "epoch" and not any(c in k for c in clocks)}


def write_card(kind: str, run: RunDir, metrics: Mapping[str, Any], use: str) -> str:
    """A model card: what it is, from what, how, what was measured, how to use it."""
    request = run.request
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", request["model"]) and not Path(request["model"]).exists()
    parent = f"base_model: {request['model']}\n" if hub else ""
    return f"""---
library_name: transformers
{parent}tags: [ivg, inference-time-alignment]
---
# {kind}

Trained by [ivg](https://arxiv.org/abs/2409.17819) (`ivg train {request["what"]}`) from `{request["model"]}`
on {", ".join(f"`{d}`" for d in request["data"])}.

{use}

Settings:

```json
{json.dumps(jsonable(request), indent=2, allow_nan=False)}
```

Measured on the held-out part of the data:

```json
{json.dumps(jsonable(metrics), indent=2, allow_nan=False)}
```
"""
