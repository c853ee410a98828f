"""The settings of ``ivg eval``: a task, its prompts, the methods, the judges."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from ivg.settings import rules as r
from ivg.settings.models import RewardRef
from ivg.settings.requests import MethodConfig
from ivg.settings.rows import RowFormat
from ivg.settings.schema import Setting
from ivg.settings.tables import Table

RESERVED_NAMES = frozenset({
    "gold", "label", "family", "method", "answers", "errors", "win_rate", "kl",
    "kl_note", "surprisal", "perplexity", "length", "distinct_1", "distinct_2", "repetition", "forward_tokens",
    "flops", "best_of_n", "task", "primary", "seed", "id", "fingerprint", "base_logp",
    "tokens", "error", "sweep", "point", "words", "kl_at_least", "surprisal_above_base",
    "win_rate_at_equal_length",
})  # fmt: skip
"""Columns of scores and results; no judge may have these names."""

STAGES = ("generate", "score", "report")
"""What an evaluation does, in this order."""
EMBEDDED_GOLD = "embedded:gold"
"""The gold reward of the embedded models."""


class EvalConfig(Table):
    """One evaluation."""

    task: Annotated[str, Setting("sentiment, summarization, alpaca, or a plugin's task.")] = "sentiment"
    data: Annotated[
        str | None,
        Setting("Rows (docs/reference/data.md): a file, -, a folder, or the id of a data set.", flags=("--data",), unset="the task's own"),
    ] = None
    split: Annotated[str | None, Setting("Split of a folder or data set.", flags=("--split",), unset="the task's")] = None
    format: RowFormat = None
    prompts: Annotated[
        int | None,
        Setting("Number of prompts, from the first; fewer are an error.", r.count(1), flags=("--prompts",), unset="as in the task's paper"),
    ] = None
    seeds: Annotated[int, Setting("Answers to each prompt by each method.", r.count(1), flags=("--seeds",))] = 1
    shuffle: Annotated[int | None, Setting("Seed of the order of prompts.", flags=("--shuffle",), unset="the task's own")] = None
    methods: Annotated[
        list[MethodConfig],
        Setting(
            "Methods, with commas between them; combinations: the nine of token guidance and selection. In recipes also tables of a "
            'method and its settings; a list where a setting takes a number is a sweep: { method = "eft", beta = [0.5, 1, 2] }.',
            flags=("--methods",),
            unset="combinations",
        ),
    ] = Field(default_factory=lambda: [MethodConfig(method="combinations", label="combinations")])
    gold: Annotated[
        RewardRef | None,
        Setting(
            "Reward model that is reported; no method may use it.",
            flags=("--gold",),
            unset=f"{EMBEDDED_GOLD} for the embedded models, else none",
        ),
    ] = None
    judges: Annotated[dict[str, RewardRef], Setting("A further reward, NAME=PATH; may be repeated.", flags=("--judge",))] = Field(
        default_factory=dict
    )
    base_samples: Annotated[
        int,
        Setting(
            "Base samples for each prompt and seed, for best-of-N at equal compute; 0: none.",
            r.count(0),
            flags=("--base-samples",),
            deprecated=("bank",),
        ),
    ] = 0
    compare_to: Annotated[
        str | None,
        Setting(
            "Label of a method: the report has the differences from it, on the same prompts, also at its KL and its FLOPs.",
            flags=("--compare-to",),
            unset="none",
        ),
    ] = None
    threads: Annotated[
        int | None, Setting("PyTorch's threads in each process.", r.count(1), flags=("--threads",), unset="PyTorch's default")
    ] = None
    jobs: Annotated[int, Setting("Processes; each takes one method at a time.", r.count(1), flags=("--jobs", "-j"))] = 1
    options: Annotated[dict[str, Any], Setting("Setting of the task, NAME=VALUE; may be repeated.", flags=("--option",))] = Field(
        default_factory=dict
    )

    @field_validator("gold", mode="before")
    @classmethod
    def _bare_gold(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("judges", mode="before")
    @classmethod
    def _bare_judges(cls, value: Any) -> Any:
        return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("judges")
    @classmethod
    def _are_columns(cls, value: dict[str, RewardRef]) -> dict[str, RewardRef]:
        for name in value:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a judge cannot be called {name!r}: expected letters, digits, _ and -")
            if name in RESERVED_NAMES:
                raise ValueError(f"the name {name} is taken; give the judge another (what is reported is eval.gold)")
        return value
