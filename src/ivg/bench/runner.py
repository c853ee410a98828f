"""Rounds of all contestants in turn, in one process; every measurement is on the disk when it is made, and is not made again.

Knows: order, warm-up, clocks, memory, files. Must not know how a contestant works, nor what is made of the figures (``bench.report``).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ivg.bench.settings import Settings
from ivg.jobs.blocks import open_blocks
from ivg.utils import environment
from ivg.utils.jsonl import read_jsonl

Row = Mapping[str, Any]
"""One measurement; see :func:`measure`."""


@dataclass(frozen=True)
class Entry:
    """One thing that each round measures: a contestant on so many prompts and tokens; ``label`` tells entries apart."""

    label: str
    contestant: str
    prompts: int
    new_tokens: int


def entries(settings: Settings) -> list[Entry]:
    """One for each contestant."""
    s = settings
    return [Entry(name, name, s.for_naive if name == "naive" else s.prompts, s.new_tokens) for name in s.contestants]


def run(
    settings: Settings,
    out: Path | None = None,
    wanted: Sequence[Entry] | None = None,
    done: Callable[[Row], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """All measurements, those that ``out`` holds already included; ``done`` hears of each new one.

    Args:
        settings: what is measured.
        out: JSONL file to keep and to resume from; None: nowhere.
        wanted: default: :func:`entries` of ``settings``.
        done: called with each new row.

    Raises:
        ConfigError: ``out`` was made with other settings, or on another machine.
    """
    wanted = entries(settings) if wanted is None else list(wanted)
    made_by = {**settings.provenance, "entries": [asdict(e) for e in wanted], "machine": environment.facts()}
    with _place(out) as path, open_blocks(path, 1, settings.rounds * len(wanted), made_by) as file:
        if not file.complete:
            bench = Bench(settings)
            bench.warm_up(wanted)
            for positions in file.missing():
                number, place = divmod(positions.start, len(wanted))
                row = bench.measure(wanted[place], number)
                file.append([row])
                done(row)
        return list(read_jsonl(path))[: file.total]


@contextmanager
def _place(out: Path | None) -> Iterator[Path]:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / "measurements.jsonl"


class Bench:
    """Models, prompts and contestants of one process, made when they are first needed."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers.utils import logging

        from ivg.bench.shapes import build
        from ivg.diagnostics.cost import parameters
        from ivg.models.packed_linear import can_pack

        logging.set_verbosity_error()  # transformers warns of padding wherever token 0 is drawn
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings, self.threads = settings, torch.get_num_threads()
        shape: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "seed": settings.seed}
        rivals = set(settings.contestants) - {"ours"}
        self.model = build(settings.shape, settings.guide, **shape, packed=not rivals)
        network = self.model.reader.model.network
        # rivals get the networks as transformers loads them, ours as ivg does: the same weights, made twice where that differs
        self.plain = self.model
        if rivals and can_pack(network):
            self.model = build(settings.shape, settings.guide, **shape)
        self.device, self.dtype = str(self.model.reader.model.device), str(next(network.parameters()).dtype).removeprefix("torch.")
        self.sizes, self.commit = parameters(self.model), environment.commit()
        self._contestants: dict[str, Any] = {}
        self._prompts: list[Any] = []

    def warm_up(self, wanted: Sequence[Entry]) -> None:
        """Every contestant once, on its prompts and the tokens of one chunk and a little."""
        few = (self.settings.resolved_method.chunk_length or 5) + 1
        for contestant in dict.fromkeys(e.contestant for e in wanted):
            prompts = max(e.prompts for e in wanted if e.contestant == contestant)
            tokens = min(few, max(e.new_tokens for e in wanted if e.contestant == contestant))
            self.measure(Entry(contestant, contestant, 1 if contestant == "naive" else prompts, tokens), 0)

    def measure(self, entry: Entry, number: int) -> dict[str, Any]:
        """One row: what was asked and delivered, seconds, memory in bytes, tokens read by each model, FLOPs.

        ``before`` is memory in use before the run (all models are loaded), ``peak`` the most during it; ``caches`` what the caches of
        ``ours`` needed at the busiest moment, each row by itself, ``held`` the same with what rows share counted once;
        ``others`` the share of the processors that other processes took; None where it is not known.
        """
        from ivg.diagnostics.cost import flops, readers

        contestant, prompts = self._contestant(entry.contestant), self._texts(entry.prompts)
        self.model.reset_caches()
        environment.trim()
        environment.reset_peak()
        before, clock, begin = environment.resident_bytes(self.device), environment.clock(), time.perf_counter()
        gc.disable()
        try:
            outcome = contestant.run(prompts, entry.new_tokens, self.settings.seed + number)
        finally:
            gc.enable()
        seconds = time.perf_counter() - begin
        peak, others = environment.peak_bytes(self.device), environment.others(clock)
        models = [reader.model for reader in readers(self.model).values()]
        caches, held = sum(m.unshared_peak_bytes for m in models), sum(m.peak_bytes for m in models)
        self.model.reset_caches()
        return {
            **asdict(entry),
            "round": number,
            "seconds": seconds,
            "first": outcome.first,
            "answers": outcome.answers,
            "tokens": outcome.tokens,
            "peak": peak,
            "before": before,
            "caches": caches,
            "held": held,
            "others": others,
            "forward_tokens": dict(outcome.forward_tokens),
            "flops": flops(outcome.forward_tokens, self.sizes),
            "sizes": self.sizes,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "commit": self.commit,
        }

    def _contestant(self, name: str) -> Any:
        from ivg.bench.baselines import contestant

        if name not in self._contestants:
            self._contestants[name] = contestant(name, self.settings, self.model if name == "ours" else self.plain)
        return self._contestants[name]

    def _texts(self, count: int) -> list[Any]:
        """The first ``count`` prompts; more are made when they are asked for, the first stay the same."""
        from ivg.bench.shapes import prompts

        if len(self._prompts) < count:
            self._prompts = prompts(self.model.base.tokenizer, count, self.settings.prompt_tokens, self.settings.seed)
        return self._prompts[:count]
