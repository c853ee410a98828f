"""The task alpaca, AlpacaEval 2.0: answers to 805 instructions, compared with GPT-4's by a judge (IVG, arXiv 2409.17819, section 4).

Benchmark: Li et al. 2023, github.com/tatsu-lab/alpaca_eval; version 2.0 with length control: arXiv 2404.04475.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ivg.errors import ConfigError, reason
from ivg.evaluation.judges import AlpacaEvalJudge, ChatJudge, Judge, RewardJudge, judge_all
from ivg.evaluation.length_control import difficulty_file, length_controlled
from ivg.evaluation.task import Answer, Comparison, Example, Tables, Task, check_count, check_no_chat_columns
from ivg.evaluation.winrate import average_over_seeds, win_rate
from ivg.jobs.fingerprints import fingerprint
from ivg.jobs.formats import read_rows
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines, write_json, write_text
from ivg.utils.locks import lock_file

HUB = "tatsu-lab/alpaca_eval"
FILE = "alpaca_eval_gpt4_baseline.json"
"""Instructions and the answers of gpt4_1106_preview. The file is downloaded itself, since ``datasets`` runs no loading scripts."""
INSTRUCTIONS = "bfe8c45991f635de"
"""Fingerprint of the 805 instructions in AlpacaEval's order, which length control needs."""


_CONNECTION = {"key_variable", "timeout", "retries", "concurrency"}
"""Options that change no verdict."""


class Options(BaseModel):
    """The task's own settings (``[eval.options]``, ``--option NAME=VALUE``).

    Attributes:
        judge: ``none``: only write files for alpaca_eval; ``openai``: an OpenAI-compatible endpoint; ``alpaca_eval``: its own
            annotators; ``reward``: a reward model.
        model: name at the endpoint; None: the environment variable ``IVG_JUDGE_MODEL``.
        base_url: of the endpoint; None: ``OPENAI_BASE_URL``, else OpenAI's.
        key_variable: environment variable with the API key. The key itself is never a setting.
        timeout: seconds for each attempt.
        retries: of a failed request, with exponential backoff.
        concurrency: requests at the same time.
        max_tokens: of the judge's reply.
        order_seed: of the order of the two answers.
        annotators: name of alpaca_eval's annotators, or the path of their configuration.
        reward: the reward model: hub id, directory or ``embedded:NAME``.
        template: of the reward model: ``chat`` or a text with ``{prompt}`` and ``{response}``.
        label: index of the reward's logit, for models with more than two.
        difficulty: df_gamed.csv or its folder, for length control; None: ``IVG_ALPACA_DIFFICULTY``, else the hub.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: Literal["none", "openai", "alpaca_eval", "reward"] = "none"
    model: str | None = None
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)
    concurrency: int = Field(4, ge=1)
    max_tokens: int = Field(8, ge=1)
    order_seed: int = 0
    annotators: str = "weighted_alpaca_eval_gpt4_turbo"
    reward: str | None = None
    template: str | None = None
    label: int | None = None
    difficulty: str | None = None

    @classmethod
    def of(cls, config: EvalConfig) -> Options:
        """The ``eval`` table's options.

        Raises:
            ConfigError: unknown names, invalid values, a judge without its model.
        """
        try:
            made = cls.model_validate(config.options)
        except ValidationError as e:
            wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg'].lower()}, got {x['input']!r}" for x in e.errors())
            raise ConfigError(f"options of the task alpaca: {wrong}\n  known: {', '.join(cls.model_fields)}") from None
        if made.judge == "reward" and not made.reward:
            raise ConfigError("judge = reward needs a reward model\n  set eval.options.reward (--option reward=ID-or-path)")
        if made.judge == "openai" and not made.judge_model:
            raise ConfigError("judge = openai needs a model\n  set eval.options.model (--option model=NAME) or IVG_JUDGE_MODEL")
        return made

    @property
    def judge_model(self) -> str | None:
        """Name of the judge at the endpoint."""
        return self.model or os.environ.get("IVG_JUDGE_MODEL")


class Alpaca(Task):
    """Answer an instruction; the metrics are win rates against the reference answers."""

    primary = ("judged_win_rate", "judged_standard_error")

    def __init__(self) -> None:
        self._judges: dict[Options, Judge] = {}

    def examples(self, config: EvalConfig) -> list[Example]:
        """Instructions in file order, or shuffled by ``config.shuffle``; default: all.

        Raises:
            ConfigError: no data, a row without ``instruction``, no reference answers for the judge, invalid options.
        """
        options, rows = Options.of(config), list(_rows(config))
        for number, row in enumerate(rows, 1):
            check_no_chat_columns(row, f"{config.data or HUB}, row {number}")
            missing = [
                k for k in ("instruction", "output") if not isinstance(row.get(k), str) and (k != "output" or options.judge != "none")
            ]
            if missing:
                raise ConfigError(
                    f"{config.data or HUB}, row {number}: no {' and no '.join(missing)}; got {', '.join(row)}\n"
                    "  expected instruction, output (the reference answer, for a judge), and optionally generator and dataset"
                )
        complete = _fingerprint(row["instruction"] for row in rows) == INSTRUCTIONS
        found = [
            Example(
                str(i),
                Prompt(row["instruction"]),
                row.get("output"),
                {
                    "index": place,
                    "dataset": row.get("dataset", ""),
                    "generator": row.get("generator", "reference"),
                    "alpaca_eval": complete,
                },
            )
            for i, (row, place) in enumerate(zip(rows, _places(rows, config), strict=True))
        ]
        check_count(len(found), config, str(config.data or HUB))
        if config.shuffle is not None:
            random.Random(config.shuffle).shuffle(found)
        return found[: config.prompts]

    def defaults(self) -> Tables:
        """Temperature 0.7, top-k 50, 2048 tokens (the paper: prompt and answer together); W = K = 2, L = 30."""
        return {
            "sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 50, "max_new_tokens": 2048},
            "search": {"width": 2, "successors": 2, "chunk_length": 30, "beta": 1.0},
        }

    def export(self, out: Path, label: str, answers: Sequence[Answer]) -> None:
        """``model_outputs/<label>.json`` of the first seed (``<label>-seed<n>.json`` of others) and ``reference_outputs.json``.

        As ``alpaca_eval --model_outputs … --reference_outputs …`` reads them. A failed answer is an empty text.
        """
        seeds = sorted({a.seed for a in answers})
        for seed in seeds:
            name = label if seed == seeds[0] else f"{label}-seed{seed}"
            rows = [_output(a.example, _text(a), label) for a in answers if a.seed == seed]
            write_json(out / "model_outputs" / f"{name}.json", rows)
        references = [_output(a.example, a.example.reference, a.example.extra["generator"]) for a in answers if a.seed == seeds[0]]
        if all(r["output"] is not None for r in references):
            with lock_file(out / "reference_outputs.json", wait=True):  # several processes of one run may write it
                write_json(out / "reference_outputs.json", references)

    def measure(self, config: EvalConfig, out: Path, label: str, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """Win rates by the judge in percent; resumes ``judgements/<label>.jsonl``.

        Raises:
            JudgeError: the judge is not available; existing judgements are kept.
            ConfigError: the file has judgements of other answers or another judge.
        """
        options = Options.of(config)
        if options.judge == "none" or not answers:
            return {}
        rows = judge_all(self.judge(options), [_row(a, label) for a in answers], out / "judgements" / f"{label}.jsonl")
        judged = win_rate(average_over_seeds(rows)).to_dict()
        metrics: dict[str, Any] = {
            **{f"judged_{name}": judged[name] for name in ("win_rate", "standard_error", "discrete_win_rate")},
            "characters": judged["avg_length"],
            "judge": f"Judge: {rows[0]['annotator']}, against {rows[0]['generator_1']}.",
        }
        missing = sum(row["preference"] is None for row in rows)
        if missing:
            metrics["unreadable"] = missing
        return metrics | _length_controlled(options, answers, rows)

    def against_base(self, config: EvalConfig, out: Path, label: str, comparisons: Sequence[Comparison]) -> Mapping[str, Any]:
        """Writes ``against_base/<label>.jsonl``: judgements by the gold reward with the base as reference, in alpaca_eval's form.

        Gives alpaca_eval's own length-controlled rate of them where its file of difficulties is named (the option ``difficulty``, or
        ``IVG_ALPACA_DIFFICULTY``).
        """
        options = Options.of(config)
        rows = [
            {**_row(c.answer, label), "output_1": _text(c.base), "generator_1": "base", "preference": 1 + c.win, "annotator": "gold reward"}
            for c in comparisons
        ]
        write_text(out / "against_base" / f"{label}.jsonl", as_lines(rows))
        if difficulty_file(options.difficulty) is None:
            return {}
        found = length_controlled(rows, options.difficulty)
        if found.win_rate is None:
            return {"against_base": f"No length-controlled wins against base by alpaca_eval's function: {' '.join(found.reason.split())}."}
        return {
            "length_controlled_wins_against_base": found.win_rate,
            "length_controlled_wins_against_base_standard_error": found.standard_error,
            "against_base": "Length-controlled wins against base: by alpaca_eval's own function, from the gold reward's judgements.",
        }

    def settings(self, config: EvalConfig) -> Mapping[str, Any]:
        """The judge's settings, without those of its connection."""
        options = Options.of(config)
        weights = fingerprint(options.reward) if options.reward else None
        return {**options.model_dump(exclude=_CONNECTION), "model": options.judge_model, "weights": weights}

    def judge(self, options: Options) -> Judge:
        """The judge; created once for all methods."""
        if options not in self._judges:
            self._judges[options] = _make_judge(options)
        return self._judges[options]


def _length_controlled(options: Options, answers: Sequence[Answer], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Length-controlled rate and error, or a note with the reason why there is none."""
    if not (answers[0].example.extra["alpaca_eval"] or options.difficulty):
        reason = "these are not AlpacaEval's 805 instructions"
    else:
        found = length_controlled(rows, options.difficulty)
        if found.win_rate is not None:
            return {"length_controlled_win_rate": found.win_rate, "length_controlled_standard_error": found.standard_error}
        reason = found.reason
    return {"length_control": f"No length-controlled win rate: {' '.join(reason.split())}."}


def _make_judge(options: Options) -> Judge:
    if options.judge == "reward":
        from ivg.models.loading import LoadOptions
        from ivg.values.reward import RewardModel

        assert options.reward is not None
        reward = RewardModel.from_pretrained(
            options.reward, template=options.template, label=options.label, options=LoadOptions(dtype="float32"), name="judge"
        )
        return RewardJudge(reward, f"reward:{options.reward}", fingerprint(options.reward))
    if options.judge == "alpaca_eval":
        return AlpacaEvalJudge(options.annotators, options.order_seed)
    assert options.judge_model is not None
    settings = options.model_dump(include=_CONNECTION | {"base_url", "max_tokens"})
    return ChatJudge(options.judge_model, seed=options.order_seed, **settings)


def _rows(config: EvalConfig) -> Iterable[dict[str, Any]]:
    if config.data not in (None, HUB):
        assert config.data is not None
        return read_rows(config.data, config.split or "eval", config.format)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(HUB, FILE, repo_type="dataset")
    except Exception as e:  # offline, no network, hub down: its client raises dozens of kinds
        raise ConfigError(
            f"cannot get {FILE} of {HUB} from the hub: {reason(e)}\n"
            "  give a copy of it, or any JSON list with instruction and output, as --data FILE"
        ) from e
    return read_rows(path)


def _places(rows: Sequence[Mapping[str, Any]], config: EvalConfig) -> list[int]:
    """Positions of the instructions in AlpacaEval: the column ``index``, else those in the file.

    Raises:
        ConfigError: a column ``index`` with other things than different whole numbers.
    """
    if not any("index" in row for row in rows):
        return list(range(len(rows)))
    found = [row.get("index") for row in rows]
    places = [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    if len(set(places)) < len(rows):
        raise ConfigError(
            f"{config.data or HUB}: the column index must have a different whole number in every row\n"
            "  it is the instruction's position in AlpacaEval, from 0 on; rename the column if it is something else"
        )
    return places


def _fingerprint(instructions: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(instructions).encode()).hexdigest()[:16]


def _text(answer: Answer) -> str:
    """The answer stripped, as alpaca_eval does; empty for a failed one."""
    return "" if answer.error else answer.text.strip()


def _output(example: Example, output: str | None, generator: str) -> dict[str, Any]:
    return {"dataset": example.extra["dataset"], "instruction": example.prompt.content, "output": output, "generator": generator}


def _row(answer: Answer, label: str) -> dict[str, Any]:
    """The row to judge, with alpaca_eval's columns."""
    example = answer.example
    return {
        "id": example.id,
        "seed": answer.seed,
        "index": example.extra["index"],
        "dataset": example.extra["dataset"],
        "instruction": example.prompt.content,
        "output_1": example.reference,
        "generator_1": example.extra["generator"],
        "output_2": _text(answer),
        "generator_2": label,
    }
