"""The settings of ``ivg train``: data, trainers, values. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ivg.errors import ConfigError
from ivg.settings import rules as r
from ivg.settings.rows import RowSettings
from ivg.settings.schema import Setting, validate

Mode = Literal["full", "lora", "head"]
Loss = Literal["response", "all"]
HeadKind = Literal["vocabulary", "scalar"]
Target = Literal["fudge", "td", "cd-q", "binary"]
PairLabel = Literal["sampled", "higher"]

_COUNT = r.count(1)
_ControlLength = Annotated[
    bool,
    Setting(
        "Subtract from each score what length explains of it: a line fitted to scores over log(1 + words) within prompts.",
        r.FLAG,
        flags=("--control-length",),
    ),
]


@dataclass(frozen=True, kw_only=True)
class DataSettings(RowSettings):
    """Which rows are read, and how (docs/reference/data.md)."""

    split: Annotated[str, Setting("Split of a folder or data set.", flags=("--split",))] = "train"
    limit: Annotated[int | None, Setting("Number of rows, from the first.", r.count(1, optional=True), flags=("--limit",), unset="all")] = (
        None
    )
    failed: Annotated[
        Path | None, Setting("JSONL file for the rows that cannot be used, each with the reason.", flags=("--failed",), unset="none")
    ] = None
    prompt_format: Annotated[
        str | None,
        Setting('Format of prompts, e.g. "{prompt}\\n\\nTL;DR:".', flags=("--prompt-format",), unset="as they are", escapes=True),
    ] = None
    response_format: Annotated[
        str | None,
        Setting('Format of responses, e.g. " {response}".', flags=("--response-format",), unset="as they are", escapes=True),
    ] = None

    def __post_init__(self) -> None:
        validate(self)
        for name in ("prompt", "response"):
            text = getattr(self, f"{name}_format")
            if text is not None and f"{{{name}}}" not in text:
                raise ConfigError(f"--{name}-format {text!r}\n  expected a text with {{{name}}} where the {name} goes")


_Epochs = Annotated[float, Setting("Passes over the data.", r.POSITIVE, flags=("--num-train-epochs", "--epochs"))]
_BatchSize = Annotated[
    int,
    Setting("Rows of each step and device.", _COUNT, flags=("--per-device-train-batch-size", "--batch-size")),
]
_WeightDecay = Annotated[float, Setting("Weight decay of AdamW.", r.number("0 or more", 0), flags=("--weight-decay",))]
_EvalShare = Annotated[
    float,
    Setting("Share of the prompts that is held out for evaluation.", r.number("in [0, 1)", 0, 1, open_high=True), flags=("--eval-share",)),
]


def _learning_rate(default: float) -> Setting:
    return Setting(
        "Peak learning rate; warm-up, then cosine to zero.",
        r.number("positive", 0, open_low=True, optional=True),
        flags=("--learning-rate", "--lr"),
        unset=f"{default:g}; ten times that for lora and head",
    )


@dataclass(frozen=True)
class TrainSettings:
    """Settings that all trainers share, named as in transformers' ``TrainingArguments`` and TRL's ``ModelConfig``.

    Attributes:
        DEFAULT_LEARNING_RATE: of this trainer, with all weights trained; ``learning_rate`` None becomes this, or ten times this.

    Raises:
        ConfigError: a setting of the wrong type or out of range.
    """

    DEFAULT_LEARNING_RATE: ClassVar[float] = 2e-5

    num_train_epochs: _Epochs = 1.0
    learning_rate: Annotated[float | None, _learning_rate(DEFAULT_LEARNING_RATE)] = None
    per_device_train_batch_size: _BatchSize = 8
    gradient_accumulation_steps: Annotated[
        int,
        Setting("Steps whose gradients are summed.", _COUNT, flags=("--gradient-accumulation-steps", "--accumulate")),
    ] = 4
    max_length: Annotated[
        int,
        Setting("Largest number of tokens of a row; longer rows are left out, and counted.", r.count(2), flags=("--max-length",)),
    ] = 1024
    warmup_steps: Annotated[
        float,
        Setting(
            "Warm-up steps; below 1: their share of all steps.",
            r.number("0 or more", 0),
            flags=("--warmup-steps", "--warmup"),
        ),
    ] = 0.1
    weight_decay: _WeightDecay = 0.0
    mode: Annotated[
        Mode,
        Setting(
            "full; lora (PEFT, merged at the end); head (values only: the body is frozen).",
            r.choice("full", "lora", "head"),
            flags=("--mode",),
        ),
    ] = "full"
    lora_r: Annotated[int, Setting("Rank of LoRA; alpha is twice that.", _COUNT, flags=("--lora-r", "--lora-rank"))] = 16
    keep_adapter: Annotated[
        bool,
        Setting(
            "Of modes lora and head: write the adapter and the head (float16, a few megabytes) in place of the whole model.",
            r.FLAG,
            flags=("--keep-adapter/--merge",),
        ),
    ] = False
    eval_share: _EvalShare = 0.05
    evaluations: Annotated[int, Setting("Evaluations, the one at the end included.", _COUNT, flags=("--evaluations",))] = 4
    save_steps: Annotated[int, Setting("Steps between checkpoints.", _COUNT, flags=("--save-steps",))] = 200
    seed: Annotated[
        int,
        Setting(
            "Random seed of data order and new weights.",
            r.Rule("a whole number", r.whole, "in [0, 2**32 - 1]", lambda v: 0 <= v < 2**32),
            flags=("--seed",),
        ),
    ] = 0
    template: Annotated[
        str | None,
        Setting(
            'Prompt template of the model: chat (its tokenizer\'s), a text such as "Q: {prompt}\\nA:", or a file (.jinja: a chat template, '
            ".txt: a text).",
            r.TEMPLATE,
            flags=("--template",),
            unset="the prompt as it is",
            escapes=True,
        ),
    ] = None
    report_to: Annotated[str, Setting("Experiment tracker: wandb, tensorboard, … or none.", flags=("--report-to",))] = "none"
    trust_remote_code: Annotated[bool, Setting("Run Python code from the model's repository.", flags=("--trust-remote-code",))] = False
    trainer_args: Annotated[
        Mapping[str, Any],
        Setting("Any field of the trainer's arguments: NAME=VALUE (JSON); may be repeated.", flags=("--set",)),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self)
        if self.keep_adapter and self.mode == "full":
            raise ConfigError("keep_adapter, and mode full trains no adapter\n  give --mode lora with it; for a value also --mode head")
        if self.learning_rate is None:
            factor = 1 if self.mode == "full" else 10  # few weights need larger steps
            object.__setattr__(self, "learning_rate", factor * self.DEFAULT_LEARNING_RATE)


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs are made of rated responses (``prompt, response, score``).

    Raises:
        ConfigError: a setting out of range, or settings that do not go together.
    """

    pairs_per_prompt: Annotated[
        int | None,
        Setting(
            "Different pairs drawn for each prompt, each response about equally often.",
            r.count(1, optional=True),
            flags=("--pairs-per-prompt",),
            unset="consecutive responses to a prompt, each in one pair",
        ),
    ] = None
    min_margin: Annotated[
        float, Setting("Smallest difference of scores; other pairs are left out.", r.number("0 or more", 0), flags=("--min-margin",))
    ] = 0.0
    label: Annotated[
        PairLabel,
        Setting(
            "Chosen response: sampled (by the Bradley-Terry model of the scores) or higher (the one with the higher score).",
            r.choice("sampled", "higher"),
            flags=("--label",),
        ),
    ] = "sampled"
    like_length: Annotated[
        float,
        Setting(
            "Share of the drawn pairs, at least, whose word counts are within 20 % of each other, where a prompt has such pairs.",
            r.SHARE,
            flags=("--like-length",),
        ),
    ] = 0.0
    control_length: _ControlLength = False

    def __post_init__(self) -> None:
        validate(self)
        if self.like_length and self.pairs_per_prompt is None:
            raise ConfigError("--like-length is a share of drawn pairs\n  give --pairs-per-prompt too")

    @property
    def by_score(self) -> bool:
        """Do these settings need the scores of single responses, where the data have finished pairs too?"""
        return self.pairs_per_prompt is not None or self.label == "higher" or self.control_length


@dataclass(frozen=True)
class SFTSettings(TrainSettings):
    """Settings of supervised fine-tuning.

    Attributes:
        NEW_LEARNING_RATE: of a new network, in place of the default.
    """

    NEW_LEARNING_RATE: ClassVar[float] = 1e-3

    loss: Annotated[Loss, Setting("Tokens in the loss: response or all.", r.choice("response", "all"), flags=("--loss",))] = "response"
    config_overrides: Annotated[
        str | None,
        Setting(
            "Train a new network: random weights, the configuration of --model with these changes (hidden_size=96,num_hidden_layers=4), "
            f"and its tokenizer. The learning rate is then {NEW_LEARNING_RATE:g} by default.",
            flags=("--config-overrides",),
            unset="start from the weights of --model",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.config_overrides is not None:
            if self.mode != "full":
                raise ConfigError(f"config_overrides makes a new network, got mode={self.mode}\n  a new network is trained in mode full")
            if self.learning_rate is None:
                object.__setattr__(self, "learning_rate", self.NEW_LEARNING_RATE)
        super().__post_init__()


@dataclass(frozen=True)
class DPOSettings(TrainSettings):
    """Settings of direct preference optimisation."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 5e-6

    learning_rate: Annotated[float | None, _learning_rate(DEFAULT_LEARNING_RATE)] = None
    beta: Annotated[float, Setting("Weight of DPO's KL term.", r.POSITIVE, flags=("--beta",))] = 0.1


@dataclass(frozen=True)
class ValueTrainSettings(TrainSettings):
    """Settings of the trainer of values; :class:`ValueSettings` says what is trained."""

    DEFAULT_LEARNING_RATE: ClassVar[float] = 1e-5

    num_train_epochs: _Epochs = 2.0
    learning_rate: Annotated[float | None, _learning_rate(DEFAULT_LEARNING_RATE)] = None
    per_device_train_batch_size: _BatchSize = 16
    weight_decay: _WeightDecay = 0.02
    eval_share: _EvalShare = 0.1
    share_prompts: Annotated[
        bool,
        Setting(
            "Read a prompt once for all its responses. A row of a batch is then a prompt with its responses (at most max_length tokens).",
            r.FLAG,
            flags=("--share-prompts/--separate-prompts",),
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How many responses are sampled, and how many together."""

    samples: Annotated[int, Setting("Responses for each prompt.", _COUNT, flags=("--samples",))] = 4
    batch_size: Annotated[
        int, Setting("Prompts that are answered, scored and saved together; a GPU wants more.", _COUNT, flags=("--batch-size",))
    ] = 64

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class ValueSettings:
    """What value is trained, and on what targets.

    Raises:
        ConfigError: a setting out of range, or settings that do not go together.
    """

    head: Annotated[
        HeadKind,
        Setting("vocabulary (guides every token too) or scalar.", r.choice("vocabulary", "scalar"), flags=("--head",)),
    ] = "vocabulary"
    target: Annotated[
        Target,
        Setting(
            "Training target: fudge, td, cd-q (needs --base) or binary (scores in [0, 1]).",
            r.choice("fudge", "td", "cd-q", "binary"),
            flags=("--target",),
        ),
    ] = "fudge"
    lam: Annotated[float, Setting("Lambda of TD(lambda).", r.number("in [0, 1]", 0, 1, label="lambda"), flags=("--lambda",))] = 0.95
    scale: Annotated[
        float, Setting("Factor of the rewards: the strength of token guidance at beta 1.", r.number(""), flags=("--scale",))
    ] = 1.0
    factored: Annotated[bool, Setting("Train a vocabulary head in shared parts.", r.FLAG, flags=("--factored/--plain",))] = True
    compact_head: Annotated[
        bool,
        Setting(
            "Train the shared parts of a vocabulary head only: one function of each token's embedding, and small beside --keep-adapter.",
            r.FLAG,
            flags=("--compact-head/--whole-head",),
        ),
    ] = False
    control_length: _ControlLength = False
    base: Annotated[str | None, Setting("The policy of cd-q and of --rounds: hub id or directory.", flags=("--base",), unset="none")] = None
    base_template: Annotated[
        str | None,
        Setting(
            "Prompt template of that policy, as --template.",
            r.TEMPLATE,
            flags=("--base-template",),
            unset="the prompt as it is",
            escapes=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        validate(self)
        if self.compact_head and (self.head != "vocabulary" or not self.factored):
            raise ConfigError("compact_head leaves out a part of a factored vocabulary head\n  it needs head=vocabulary and factored=true")
        if self.target == "cd-q" and (self.head != "vocabulary" or self.base is None):
            raise ConfigError("cd-q averages over the base's next tokens\n  it needs head=vocabulary and a base model (--base)")
        if self.target == "binary" and self.control_length:
            raise ConfigError("binary outcomes are no scores that length explains in part\n  leave out --control-length, or use fudge")


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """Refinement rounds of a value: new rollouts from the policy that it guides.

    Attributes:
        method: of the rollouts.
        request: further settings of the rollouts (search, sampling), as for ``GuidedModel.request``.

    Raises:
        ConfigError: a setting out of range.
    """

    rounds: Annotated[int, Setting("Refinement rounds: new rollouts from the value-guided policy.", r.count(0), flags=("--rounds",))] = 0
    samples: Annotated[int, Setting("New responses for each prompt and round.", _COUNT, flags=("--samples",))] = 2
    method: str = "cbs-explicit"
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self)
