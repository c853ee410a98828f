"""The folder of a training run: what was asked for, checkpoints to resume from, the finished model.

It holds the model (config.json, weights, tokenizer, README.md, metrics.json), ``training_rows.npy`` (fingerprints of the training rows, by
which ``ivg check`` recognises them), ``run.json`` (what the run depends on, written first; another run is refused), ``log.json`` (the
trainer's log) and, during training, ``checkpoints/``. A run is finished once ``metrics.json`` is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.fingerprints import fingerprint
from ivg.jobs.provenance import differences
from ivg.models.hub import partial_config
from ivg.models.prompt_template import PromptTemplate
from ivg.models.training_rows import write_training_rows
from ivg.settings.train import TrainSettings, ValueSettings
from ivg.training.data import RatedResponse, SFTExample, answers
from ivg.types import Preference
from ivg.utils.jsonl import jsonable, write_json, write_text
from ivg.utils.locks import lock_file

Row = Preference | RatedResponse | SFTExample
_IRRELEVANT = ("report_to", "save_steps")
"""Settings that change no result."""
_OFF = ("keep_adapter", "compact_head", "share_prompts")
"""Settings that are recorded where they are on: older runs, which lack them, are resumed."""


def first_process() -> bool:
    """False in the other processes of ``accelerate launch`` or ``torchrun``, which write no files."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Processes of ``accelerate launch`` or ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_single_process(what: str) -> None:
    """Raise in a run of several processes.

    Raises:
        ConfigError: names ``what``, which needs a single process.
    """
    if process_count() > 1:
        raise ConfigError(f"{what} needs a single process, got {process_count()}\n  start it without accelerate launch or torchrun")


def run_provenance(
    command: str, model: str | Path, sources: Sequence[str | Path], rows: Sequence[Any], settings: TrainSettings, **more: Any
) -> dict[str, Any]:
    """All that a training run depends on, for :func:`open_run`: model, rows, settings.

    Args:
        command: of ``ivg train``.
        model: where training starts.
        sources: where the rows come from.
        rows: training rows (dataclasses).
        settings: of the trainer.
        more: further settings.
    """
    return {
        "what": command,
        "model": str(model),
        "weights": fingerprint(str(model)),
        "data": [str(source) for source in sources],
        "rows": len(rows),
        "rows_sha256": hash_rows(rows),
        **{name: value for name, value in recorded(settings).items() if name not in _IRRELEVANT},
        **more,
    }


def recorded(settings: TrainSettings | ValueSettings) -> dict[str, Any]:
    """Settings as a run records them; of a template file its text.

    Raises:
        ConfigError: a template file that cannot be read.
    """
    found = {name: value for name, value in asdict(settings).items() if value or name not in _OFF}
    for name in {"template", "base_template"} & found.keys():
        text, more = PromptTemplate(found[name]).resolved
        found[name] = more.get("chat_template", text)
    return found


def hash_rows(rows: Sequence[Any]) -> str:
    """A fingerprint of dataclass instances, in order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()[:16]


@contextmanager
def open_run(out: str | Path, provenance: Mapping[str, Any]) -> Iterator[RunDir]:
    """The folder of a run, which no other run can open meanwhile.

    Raises:
        ConfigError: the folder holds another run, or a model.
        OutputError: another process is training in it.
    """
    with lock_file(Path(out)) if first_process() else nullcontext():
        yield RunDir(Path(out), provenance)


class RunDir:
    """The folder of one training run; made by :func:`open_run`.

    Args:
        path: the folder.
        provenance: all that the result depends on (:func:`run_provenance`).
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        self.path = path
        self.provenance: dict[str, Any] = json.loads(json.dumps(provenance, default=str))
        self.checkpoints = path / "checkpoints"
        note = path / "run.json"
        if note.exists():
            different = differences(json.loads(note.read_text(encoding="utf-8")), self.provenance)
            if different and {p.name for p in path.iterdir()} == {note.name}:
                write_json(note, self.provenance)  # that run ended before it made anything
            elif different:
                raise ConfigError(
                    f"{path}: settings differ from those of its run: {'; '.join(different)}\n  use another --out, or remove the folder"
                )
        elif (path / "config.json").exists() or partial_config(path) is not None:
            raise ConfigError(f"{path} holds a model already\n  use another --out")
        elif first_process():
            write_json(note, self.provenance)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run; None: it is not finished."""
        path = self.path / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; incomplete ones are removed (the trainer writes its state last)."""
        for folder in sorted(self.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
            try:
                json.loads((folder / "trainer_state.json").read_text())
            except (OSError, ValueError):
                if first_process():
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            return folder
        return None

    def train(self, trainer: Any) -> None:
        """Train from the last complete checkpoint, if there is one; a run that has made all its steps makes no more."""
        last = self.last_checkpoint()
        state = json.loads((last / "trainer_state.json").read_text()) if last is not None else {}
        if last is not None and state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(str(last))  # transformers would make one step more
            return
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if first_process():
            write_json(self.path / "log.json", trainer.state.log_history)

    def finish(self, metrics: Mapping[str, Any], title: str, usage: str, rows: Sequence[Row]) -> dict[str, Any]:
        """Write model card, training rows and metrics beside the saved model; remove the checkpoints.

        Args:
            metrics: of the run.
            title: of the model card.
            usage: of the model card: how to load the model.
            rows: the training rows. Their fingerprints are written, with those of the model that training started from.
        """
        if first_process():
            start = None if self.provenance.get("config_overrides") else self.provenance["model"]  # a new network has seen nothing
            write_training_rows(self.path, (answer for row in rows for answer in answers(row)), start)
            write_text(self.path / "README.md", model_card(title, self.provenance, metrics, usage))
            write_json(self.path / "metrics.json", dict(metrics))
            shutil.rmtree(self.checkpoints, ignore_errors=True)  # last: without them nothing could be resumed
        if process_count() > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
        return dict(metrics)


def model_card(title: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any], usage: str) -> str:
    """A model card: origin, usage, settings, metrics."""
    model = provenance["model"]
    new = provenance.get("config_overrides")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() and not new
    origin = f"a new network: configuration of `{model}` with `{new}`, random weights, its tokenizer" if new else f"`{model}`"
    parent = f"base_model: {model}\n" if on_hub else ""
    return f"""---
library_name: {"peft" if provenance.get("keep_adapter") and provenance.get("mode") == "lora" else "transformers"}
{parent}tags: [ivg, inference-time-alignment]
---
# {title}

Trained by [ivg](https://arxiv.org/abs/2409.17819) (`ivg train {provenance["what"]}`) from {origin}
on {", ".join(f"`{source}`" for source in provenance["data"])}.

{usage}

Settings:

```json
{json.dumps(jsonable(provenance), indent=2, allow_nan=False)}
```

Metrics on the held-out part of the data:

```json
{json.dumps(jsonable(metrics), indent=2, allow_nan=False)}
```
"""
