"""``ivg bench`` with one more baseline: ``benchmarks/naive.py``, the way released codes of this family of methods work.

    .venv/bin/python -m benchmarks.compare_naive --shape tiny --prompts 2 --rounds 1

The naive baseline answers one prompt at a time, so its rate does not depend on their number: it runs on two prompts at most.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from benchmarks import naive
from ivg.bench import report, runner
from ivg.bench.runner import Case
from ivg.bench.settings import METHOD, BenchSettings
from ivg.bench.shapes import networks
from ivg.bench.systems import SYSTEMS, RunOutput
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.search.methods import Method
from ivg.settings.schema import settings_of
from ivg.types import Prompt
from ivg.utils import environment
from ivg.utils.jsonl import to_json


class NaiveSearch:
    """``benchmarks/naive.py`` as a system of ``ivg.bench``.

    Raises:
        ConfigError: a method that it does not have.
    """

    def __init__(self, settings: BenchSettings, model: GuidedModel) -> None:
        check_method(settings.resolved_method)
        self.settings, nets, method = settings, networks(model), settings.resolved_method
        guides = {name: nets[name] for name in ("tuned", "untuned") if method.token}
        self.models = naive.Models(nets["base"], **guides, value=nets["value"] if method.select else None)
        self.networks = [*nets.values()]

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> RunOutput:
        """See :class:`ivg.bench.systems.System`. No text of an answer is final before its end."""
        torch.manual_seed(seed)
        m, temperature = self.settings.resolved_method, self.settings.temperature
        sizes: dict[str, Any] = {"width": m.width, "successors": m.successors, "chunk": m.chunk_length, "beta": m.beta}
        answers = [naive.answer(self.models, p.token_ids or (), new_tokens=new_tokens, temperature=temperature, **sizes) for p in prompts]
        read: Counter[str] = sum((a.forward_tokens for a in answers), Counter())
        if "value" in read:
            read["explicit"] = read.pop("value")  # the name in Usage.forward_tokens
        tokens = sum(len(a.token_ids) for a in answers)
        return RunOutput(len(prompts), tokens, statistics.median(a.seconds for a in answers), dict(read))


NAIVE = "naive"
ALL_SYSTEMS = {**SYSTEMS, NAIVE: NaiveSearch}


def check_method(method: Method) -> None:
    """Raise if ``benchmarks/naive.py`` does not implement ``method``.

    Raises:
        ConfigError: the method guides or selects by other values, or has stages that naive.py lacks.
    """
    m = method
    sizes: dict[str, Any] = {"width": m.width, "successors": m.successors, "chunk_length": m.chunk_length}
    plain = Method(m.name, m.summary, **sizes, token=m.token, select=m.select, beta=m.beta)
    if m != plain or m.token not in (None, "implicit") or m.select not in (None, "explicit"):
        raise ConfigError(
            f"benchmarks/naive.py does not implement {m.name}\n"
            "  expected token guidance by the implicit value, selection by the explicit value, both or neither"
        )


def cases(settings: BenchSettings) -> list[Case]:
    """The baselines, naive on at most two prompts, and the method."""
    *baselines, method = runner.cases(settings)
    return [*baselines, Case(NAIVE, NAIVE, min(2, settings.prompts), settings.new_tokens), method]


def throughput_over_naive(rows: Sequence[Mapping[str, Any]]) -> float:
    """Answers per second of the method over those of naive.py."""
    return 1 / report.paired_ratio(rows, METHOD, NAIVE, report.seconds_per_answer)


def print_progress(row: Mapping[str, Any], rounds: int, group: str = "") -> None:
    """One line for each measurement."""
    print(f"{group}round {row['round'] + 1}/{rounds}  {row['label']}  {row['seconds']:.2f} s", flush=True)


def add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """The settings of :class:`BenchSettings` called ``names`` as options."""
    hints, declared = get_type_hints(BenchSettings), settings_of(BenchSettings)
    for field in fields(BenchSettings):
        if field.name in names:
            kind = next(k for k in (*get_args(hints[field.name]), hints[field.name]) if isinstance(k, type))
            text = f"{declared[field.name].setting.help} " if field.name in declared else ""
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=f"{text}(default: {field.default})"
            )


def main() -> None:
    """Print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [f.name for f in fields(BenchSettings) if f.name != "baselines"])
    parser.add_argument("--out", type=Path, help="JSONL file for the measurements; a second run resumes")
    options = vars(parser.parse_args())
    out = options.pop("out")
    settings = BenchSettings(**options)
    check_method(settings.resolved_method)
    rows = runner.run(settings, out, cases(settings), systems=ALL_SYSTEMS, on_progress=lambda row: print_progress(row, settings.rounds))
    found = report.summary(settings, rows, environment.run_metadata())
    ratio = throughput_over_naive(rows)
    lines = [f"answers/s over naive: {ratio:.2f}", *report.notes(found)]
    found["ratios"]["throughput_over_naive"] = ratio
    report.print_results(f"{settings.title} ({found['device']}, {found['dtype']})", report.COLUMNS, report.cells(found), lines)
    print(to_json(found))


if __name__ == "__main__":
    main()
