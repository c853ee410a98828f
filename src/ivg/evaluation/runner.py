"""The stages of an evaluation: generate -> score -> report, for one process or several.

Every method's answers are one :class:`~ivg.utils.jsonl.BlockFile`; a block is computed with empty caches from its own seeds, so that
a run that was killed ends with the same bytes as one that was not. Clocks and memory go to ``timings.jsonl`` only. With several
jobs every method is one process's; which one, and in which order, changes nothing. Knows plans and models; not how to show them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.errors import PromptError
from ivg.evaluation.methods import BANK, MethodRow
from ivg.evaluation.plan import Plan
from ivg.evaluation.task import Answer
from ivg.settings.recipe import Recipe
from ivg.types import Completion, Prompt
from ivg.utils import environment
from ivg.utils.jsonl import BlockFile, append_lines, read_jsonl, to_json, write_json

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.search.searcher import Request

Report = Callable[[str, int], None]
"""Called with a label and a number of rows whenever so many more are done."""
STAGES = ("generate", "score", "report")


def run(
    plan: Plan,
    stages: Sequence[str] = STAGES,
    jobs: int = 1,
    done: Report = lambda label, rows: None,
    worker: Worker | None = None,
) -> None:
    """The named stages, in their order; what is there already is not made again.

    Args:
        plan: what to do.
        stages: some of :data:`STAGES`.
        jobs: processes; with one, everything happens in this one.
        done: told of every block that is finished.
        worker: one that may have loaded its models already.

    Raises:
        ConfigError: files of another run in the folder; a stage whose input is missing; and whatever models and data raise.
    """
    from ivg.evaluation.report import report

    worker = worker or Worker(plan)
    for stage in (s for s in STAGES if s in stages):
        if stage == "report":
            report(plan)
        elif jobs == 1:
            for label in plan.labels:
                worker.work(stage, label, done)
        else:
            _spread(plan, stage, jobs, done)


class Worker:
    """One process's hands: models are loaded once, when they are first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._model: GuidedModel | None = None
        self._judges: dict[str, Any] = {}
        self._signed: set[str] = set()
        if plan.config.threads is not None:
            import torch

            torch.set_num_threads(plan.config.threads)

    @property
    def model(self) -> GuidedModel:
        """Base and values."""
        if self._model is None:
            from ivg.diagnostics.cost import parameters
            from ivg.factory import recipe

            self._model = recipe.load_models(self.plan.recipe)
            write_json(self.plan.out / "models.json", {"parameters": parameters(self._model)})
        return self._model

    @property
    def judges(self) -> dict[str, Any]:
        """Gold and the other judges by name."""
        if not self._judges:
            from ivg.evaluation.score import load_judges

            self._judges = load_judges(self.plan)
        return self._judges

    def sign(self, stage: str) -> None:
        """Note in ``timings.jsonl`` who computes, once for each stage: rows are made by this commit, command and machine."""
        if stage not in self._signed:
            self._signed.add(stage)
            note(self.plan.out / "timings.jsonl", {"stage": stage, "made": environment.made()})

    def work(self, stage: str, label: str, done: Report) -> None:
        """One stage for one label."""
        if stage == "generate":
            if label == BANK:
                from ivg.evaluation.base_samples import fill

                fill(self, done)
            else:
                generate(self, label, done)
        else:
            from ivg.evaluation.score import score

            score(self, label, done)


def generate(worker: Worker, label: str, done: Report) -> None:
    """All answers of one method that are not there yet."""
    p, path = worker.plan, worker.plan.transcripts(label)
    with environment.alone(path):
        file = BlockFile(path, p.block, p.total, p.provenance(label))
        done(label, min(file.rows, p.total))
        for positions in file.missing():
            model = worker.model
            model.reset_caches()
            environment.reset_peak()
            began = time.perf_counter()
            rows = list(_answers(model, p, p.method(label), positions))
            seconds = time.perf_counter() - began
            worker.sign("generate")
            file.append(rows)
            timing = {"label": label, "start": positions.start, "rows": len(rows), "seconds": round(seconds, 4)}
            note(p.out / "timings.jsonl", {**timing, "peak_bytes": environment.peak_bytes()})
            done(label, len(rows))
    _export(p, label)


def _answers(model: GuidedModel, p: Plan, method: MethodRow, positions: range) -> Iterator[dict[str, Any]]:
    items = list(p.items(positions))
    requests = [request(model, p, method, seed, position) for seed, position, _ in items]
    for (seed, _, example), outcome in zip(items, together(model, requests), strict=True):
        row = {"label": method.label, "seed": seed, "id": example.id, "prompt": example.prompt.plain}
        yield row | (_row(outcome) if isinstance(outcome, Completion) else {"text": "", "token_ids": [], "error": outcome})


def request(model: GuidedModel, p: Plan, method: MethodRow, seed: int, position: int, offset: int = 0) -> Request:
    """What is asked of the model for one example; its draws depend on seed, position of the example and ``offset`` alone."""
    sampling = {f.name: getattr(p.sampling, f.name) for f in fields(p.sampling)}
    return model.request(p.examples[position].prompt, method.strategy, seed=seed, index=position + offset, record=True, **sampling)


def together(model: GuidedModel, requests: Sequence[Request]) -> list[Completion | str]:
    """Every request's completion, or why there is none; all share the batch."""
    searcher = model.searcher()
    out: list[Completion | str] = [""] * len(requests)
    places = {}
    for i, wanted in enumerate(requests):
        try:
            places[searcher.add(wanted)] = i
        except PromptError as e:  # what is wrong with a method is wrong for all, and is raised
            out[i] = " ".join(str(e).split())
    while searcher.busy:
        for step in searcher.step():
            if step.completion is not None:
                out[places[step.request]] = step.completion if step.completion.error is None else step.completion.error
    return out


def _row(c: Completion) -> dict[str, Any]:
    """What is kept of a completion: no clock, sums in an order that does not depend on one."""
    return {
        "text": c.text,
        "token_ids": list(c.token_ids),
        "score": None if c.score is None else round(c.score, 6),
        "finish_reason": c.finish_reason,
        "prompt_tokens": c.usage.prompt_tokens,
        "forward_tokens": dict(sorted(c.usage.forward_tokens.items())),
        "shift": round(sum(c.guide_shift), 6),
    } | ({"notes": list(c.notes)} if c.notes else {})


def prompt_of(row: Any) -> Prompt:
    """The prompt of a row."""
    return Prompt.of(row["prompt"])


def answers(p: Plan, label: str) -> list[Answer]:
    """A method's answers as tasks see them."""
    known = {e.id: e for e in p.examples}
    rows = list(read_jsonl(p.transcripts(label)))[: p.total]
    return [Answer(known[r["id"]], r["seed"], r["text"], r.get("error")) for r in rows]


def note(path: Path, row: dict[str, Any]) -> None:
    """One line more in a log that several processes write."""
    append_lines(path, to_json(row) + "\n")


def _export(p: Plan, label: str) -> None:
    p.task.export(p.out, label, answers(p, label))


# Several processes


def _spread(p: Plan, stage: str, jobs: int, done: Report) -> None:
    """One label at a time for each process; the longest first, so that none is left alone at the end."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    labels = sorted(p.labels, key=lambda label: -_weight(p, label))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(p.recipe.model_dump(exclude_none=True), str(p.out))) as pool:
        waiting = {pool.submit(_work, stage, label): label for label in labels}
        for future in as_completed(waiting):
            try:
                future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            done(waiting[future], p.total)


def _weight(p: Plan, label: str) -> float:
    if label == BANK:
        return float(p.config.bank)
    s = p.method(label).strategy
    return float(s.width * s.successors * (3 if s.guides else 1) + s.candidates)


_here: list[Worker] = []


def _begin(recipe: dict[str, Any], out: str) -> None:
    """A process of :func:`_spread`: it ends at once when the process that started it does."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
    _here.append(Worker(Plan(Recipe.parse(recipe), Path(out))))


def _work(stage: str, label: str) -> None:
    _here[0].work(stage, label, lambda label, rows: None)
