"""Supervised fine-tuning, DPO and reward modelling, by TRL.

TRL's trainers get tokenised rows (:mod:`ivg.training.encoding`), so that prompts are rendered, and responses end, as at inference. LoRA
adapters (PEFT) are merged at the end and kept in ``adapter/``, or kept alone. Each function returns the metrics of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from ivg.diagnostics.pairs import is_tie
from ivg.errors import ConfigError
from ivg.settings.train import DPOSettings, SFTSettings, TrainSettings
from ivg.training.cpu_head import ScoredOnCpu
from ivg.training.data import SFTExample
from ivg.training.encoding import encode_for_reward, encode_preferences, encode_sft, read_template
from ivg.training.kept_adapter import check_start, keep_tokenizer, round_to_half, save_adapter
from ivg.training.new_network import new_network
from ivg.training.pairing import Comparisons
from ivg.training.ranking import measure_ranking
from ivg.training.run_dir import RunDir, first_process, open_run, process_count, run_provenance
from ivg.training.split import held_out
from ivg.training.trainer import GroupedByLength, drop_timing_metrics, encode_split, load_for_training, lora_config, trainer_arguments
from ivg.training.weighted_metrics import WeightedMetrics
from ivg.types import Preference
from ivg.values.reward import RewardModel

Encoder = Callable[[Sequence[Any]], list[Any]]
Sources = Sequence[str | Path]
"""Where the rows come from; named in the model card."""


def sft(model: str | Path, rows: Sequence[SFTExample], out: str | Path, settings: SFTSettings, *, sources: Sources = ()) -> dict[str, Any]:
    """Supervised fine-tuning (TRL's ``SFTTrainer``).

    Args:
        model: causal language model, directory or hub id; with ``settings.config_overrides`` its architecture and tokenizer only.
        rows: prompts and responses.
        out: folder of the run.
        settings: of the trainer.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: no usable row, ``out`` holds another run, or no network can be made with the overrides.
    """
    task = _Task(
        "sft",
        _SFTTrainer,
        SFTConfig,
        ("Supervised fine-tuning", "Load it with transformers; as a base (`--base`), or as the untuned guide (`--untuned`) of a pair."),
        lambda _, tokenizer, template: partial(encode_sft, tokenizer=tokenizer, template=template, max_length=settings.max_length),
        {"packing": False, "completion_only_loss": settings.loss == "response"},
        settings.config_overrides,
    )
    return _run(task, model, rows, out, settings, sources)


def dpo(
    model: str | Path, rows: Sequence[Preference] | Comparisons, out: str | Path, settings: DPOSettings, *, sources: Sources = ()
) -> dict[str, Any]:
    """Direct preference optimisation (Rafailov et al. 2023; TRL's ``DPOTrainer``): from the untuned guide ``model`` to the tuned one.

    Args:
        model: the initial policy and the reference: directory or hub id.
        rows: preferences (those whose two responses are the same are left out), or pairs of :func:`ivg.training.pairing.compare`.
        out: folder of the run.
        settings: of the trainer. Liu et al. 2024 (arXiv 2409.17819) use for IMDb 3 epochs, learning rate 5e-4, batch size 32, weight
            decay 0.05, warm-up 0.25.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: no usable row, or ``out`` holds another run.
    """
    arguments = {
        "beta": settings.beta,
        "precompute_ref_log_probs": process_count() == 1,  # TRL's cache of them lives in one process
        "precompute_ref_batch_size": 2 * settings.per_device_train_batch_size,
    }
    task = _Task(
        "dpo",
        _TokenisedDPOTrainer,
        DPOConfig,
        ("DPO-tuned guide", f"The tuned guide of a pair: `--tuned THIS --untuned {model}`."),
        lambda _, tokenizer, template: partial(encode_preferences, tokenizer=tokenizer, template=template, max_length=settings.max_length),
        arguments,
    )
    return _run(task, model, rows, out, settings, sources)


def reward(
    model: str | Path, rows: Sequence[Preference] | Comparisons, out: str | Path, settings: TrainSettings, *, sources: Sources = ()
) -> dict[str, Any]:
    """A reward model with the Bradley-Terry loss (TRL's ``RewardTrainer``): its one logit is the reward of prompt and response.

    The metrics have ``ranking``: how it orders the held-out responses, beside what their length alone does
    (:func:`ivg.training.ranking.measure_ranking`). The model is saved before that is measured, so it can be used meanwhile;
    weights that FSDP or DeepSpeed shard are measured first.

    Args:
        model: any model on which transformers can put a sequence classifier.
        rows: preferences (those whose two responses are the same are left out), or pairs of :func:`ivg.training.pairing.compare`.
        out: folder of the run.
        settings: of the trainer.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: settings out of range, no usable row, or ``out`` holds another run.
    """

    def encoder(network: Any, tokenizer: Any, template: str | None) -> Encoder:
        network.config.pad_token_id = tokenizer.pad_token_id
        network.config.ivg_template = template
        return partial(encode_for_reward, reader=RewardModel(network, tokenizer, template), max_length=settings.max_length)

    task = _Task(
        "reward", _RewardTrainer, RewardConfig, ("Reward model", "As a reward: `--reward THIS`, or `gold` of `ivg eval`."), encoder
    )
    return _run(task, model, rows, out, settings, sources)


@dataclass(frozen=True)
class _Task:
    """A trainer of TRL, and what it needs.

    Attributes:
        command: of ``ivg train``.
        trainer: its class.
        config: the class of its arguments.
        card: title and usage of the model card.
        encoder: from network, tokenizer and template to a function from rows to the columns that the trainer reads.
        arguments: further fields of ``config``.
        overrides: train a new network with this change of the configuration.
    """

    command: str
    trainer: Any
    config: Any
    card: tuple[str, str]
    encoder: Callable[[Any, Any, str | None], Encoder]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    overrides: str | None = None


class _SFTTrainer(WeightedMetrics, ScoredOnCpu, GroupedByLength, SFTTrainer):
    """TRL's. On a CPU without its head: that reads all positions in large tiles, and takes most of the time."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        read_here = self.score_on_cpu() or self.accelerator.device.type != "cpu"
        return super().compute_loss(*args, **kwargs) if read_here else Trainer.compute_loss(self, *args, **kwargs)


class _RewardTrainer(WeightedMetrics, GroupedByLength, RewardTrainer):
    """TRL's, with batches of like length."""


class _TokenisedDPOTrainer(WeightedMetrics, ScoredOnCpu, GroupedByLength, DPOTrainer):
    """For tokenised rows: TRL would add an end of sequence to responses that were cut at their length limit. On a CPU with our own head."""

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        self.score_on_cpu()
        return super().compute_ref_log_probs(model, inputs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.score_on_cpu()
        return super().compute_loss(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def _run(
    task: _Task, model: str | Path, data: Sequence[Any] | Comparisons, out: str | Path, settings: TrainSettings, sources: Sources
) -> dict[str, Any]:
    """Load, train, evaluate, save."""
    made = data if isinstance(data, Comparisons) else None
    rows: Sequence[Any] = data.pairs if isinstance(data, Comparisons) else data
    with open_run(out, run_provenance(task.command, model, sources, rows, settings, **(made.provenance if made else {}))) as run:
        if run.metrics is not None:
            return run.metrics
        counts = {}
        if task.command != "sft":
            rows, counts["ties_left_out"] = _without_ties(rows)
        if settings.keep_adapter:
            check_start(model)
        if settings.mode == "head":
            raise ConfigError("mode head trains the head of a value\n  expected full or lora")
        set_seed(settings.seed)
        is_reward = task.command == "reward"
        kind, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if is_reward else (AutoModelForCausalLM, {})
        if task.overrides is None:
            network, tokenizer = load_for_training(kind, model, "model", settings.trust_remote_code, settings.mode, **labels)
        else:
            network, tokenizer = new_network(model, task.overrides, settings.trust_remote_code)
            counts["parameters"] = network.num_parameters()
        template = read_template(settings.template, tokenizer, judges=is_reward)
        parts = made.split() if made is not None else held_out(rows, settings.eval_share)
        split = encode_split(parts, settings, task.encoder(network, tokenizer, template))
        trainer = task.trainer(
            model=network.train(),
            args=trainer_arguments(
                task.config, settings, run, network, evaluate=bool(split.test), **{**task.arguments, "max_length": None}
            ),
            train_dataset=Dataset.from_list(split.train),
            eval_dataset=Dataset.from_list(split.test) if split.test else None,
            processing_class=tokenizer,
            peft_config=lora_config(settings, "SEQ_CLS" if is_reward else "CAUSAL_LM"),
        )
        run.train(trainer)
        if settings.keep_adapter:
            round_to_half(p for p in trainer.model.parameters() if p.requires_grad)
        metrics: dict[str, Any] = {**split.counts, **counts, **(made.metrics if made is not None else {})}
        if split.test:
            metrics["held_out"] = drop_timing_metrics(trainer.evaluate())
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # then all processes must read, before anything is merged
        judged = made or parts[1]
        if is_reward and sharded:
            metrics |= _ranking(trainer, tokenizer, judged, replace(settings, template=template))
        if settings.keep_adapter:
            _keep(trainer, run, model)
            if first_process():
                keep_tokenizer(tokenizer, settings.template, run.path)
        else:
            _save(trainer, tokenizer, run)
        if is_reward and not sharded and first_process():
            metrics |= _ranking(trainer, tokenizer, judged, replace(settings, template=template))
        return run.finish(metrics, *task.card, split.rows)


def _ranking(trainer: Any, tokenizer: Any, rows: Comparisons | Sequence[Preference], settings: TrainSettings) -> dict[str, Any]:
    network, batch = trainer.accelerator.unwrap_model(trainer.model), 2 * settings.per_device_train_batch_size
    return measure_ranking(RewardModel(network, tokenizer, settings.template, batch_size=batch), rows, settings.max_length)


def _without_ties(rows: Sequence[Preference]) -> tuple[list[Preference], int]:
    """(pairs of different responses, number of the others, from which no loss could learn).

    Raises:
        ConfigError: no pair of different responses.
    """
    kept = [row for row in rows if not is_tie(row)]
    if rows and not kept:
        raise ConfigError(f"in all {len(rows)} pairs chosen and rejected are the same text\n  expected two different responses to a prompt")
    return kept, len(rows) - len(kept)


def _keep(trainer: Any, run: RunDir, base: str | Path) -> None:
    if first_process():
        network = trainer.accelerator.unwrap_model(trainer.model)
        config = network.config
        reward = {"ivg_template": getattr(config, "ivg_template", None), "pad_token_id": config.get_text_config().pad_token_id}
        save_adapter(network, run.path, base, reward if isinstance(trainer, RewardTrainer) else {}, {})


def _save(trainer: Any, tokenizer: Any, run: RunDir) -> None:
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(trained, "merge_and_unload"):
        if first_process():
            trained.save_pretrained(run.path / "adapter")
            trained.merge_and_unload().save_pretrained(run.path)
    else:
        trainer.save_model(str(run.path))  # by all processes: it gathers what ZeRO or FSDP spread over them
    if first_process():
        (run.path / "training_args.bin").unlink(missing_ok=True)
        tokenizer.save_pretrained(run.path)
