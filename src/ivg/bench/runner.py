"""Rounds of measurements: each round runs every system once, in turn, in one process. Measurements are saved and resumed.

Each measurement is one row: what was run, seconds, memory in bytes, tokens read by each model, FLOPs (:meth:`Session.measure`).
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging

from ivg.bench import roofline
from ivg.bench.settings import METHOD, BenchSettings
from ivg.bench.shapes import build_model, make_prompts
from ivg.bench.systems import SYSTEMS, System, Systems
from ivg.diagnostics.cost import flops, language_models, parameters
from ivg.jobs.blocks import open_blocks
from ivg.models.packed_linear import can_pack
from ivg.utils import environment
from ivg.utils.jsonl import read_jsonl

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """What each round measures once: a system on some number of prompts and tokens. ``label`` is unique in a benchmark."""

    label: str
    system: str
    prompts: int
    new_tokens: int


def cases(settings: BenchSettings) -> list[Case]:
    """The baselines and the method."""
    return [Case(name, name, settings.prompts, settings.new_tokens) for name in (*settings.baselines, METHOD)]


def run(
    settings: BenchSettings,
    out: Path | None = None,
    wanted: Sequence[Case] | None = None,
    *,
    systems: Systems = SYSTEMS,
    on_progress: Callable[[Row], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Run all rounds; return all measurements, including those that ``out`` holds already.

    Args:
        settings: what is measured.
        out: JSONL file to write, and to resume from; None: none.
        wanted: default: :func:`cases` of ``settings``.
        systems: constructors by name.
        on_progress: called with each new row.

    Raises:
        ConfigError: ``out`` was made with other settings, or on another machine.
    """
    wanted = cases(settings) if wanted is None else list(wanted)
    provenance = {**settings.provenance, "cases": [asdict(c) for c in wanted], "machine": environment.machine()}
    with _output_path(out) as path, open_blocks(path, 1, settings.rounds * len(wanted), provenance) as file:
        if not file.complete:
            session = Session(settings, {c.system for c in wanted}, systems)
            session.warm_up(wanted)
            for positions in file.missing():
                number, place = divmod(positions.start, len(wanted))
                row = session.measure(wanted[place], number)
                file.append([row])
                on_progress(row)
        return list(read_jsonl(path))[: file.total]


@contextmanager
def _output_path(out: Path | None) -> Iterator[Path]:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / "measurements.jsonl"


class Session:
    """Models, prompts and systems of one process.

    Args:
        settings: what is measured.
        names: the systems that will be measured.
        systems: constructors by name; called when a system is first used.
    """

    def __init__(self, settings: BenchSettings, names: set[str], systems: Systems = SYSTEMS) -> None:
        logging.set_verbosity_error()  # transformers warns of padding wherever token 0 is drawn
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings, self.threads, self.constructors = settings, torch.get_num_threads(), systems
        shape: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "seed": settings.seed}
        baselines = names - {METHOD}
        self.model = build_model(settings.shape, settings.guide, **shape, packed=not baselines)
        network = self.model.reader.network
        # baselines get the networks as transformers loads them, the method as ivg does: the same weights, made twice where that differs
        self.unpacked_model = self.model
        if baselines and can_pack(network):
            self.model = build_model(settings.shape, settings.guide, **shape)
        self.device, self.dtype = str(self.model.reader.model.device), str(next(network.parameters()).dtype).removeprefix("torch.")
        self.sizes, self.commit = parameters(self.model), environment.commit()
        self._systems: dict[str, System] = {}
        self._prompts: list[Any] = []
        self._products: dict[Case, Counter[roofline.Product]] = {}

    def warm_up(self, wanted: Sequence[Case]) -> None:
        """Run every system once, on the tokens of one chunk and one more."""
        few = (self.settings.resolved_method.chunk_length or 5) + 1
        for name in dict.fromkeys(c.system for c in wanted):
            own = [c for c in wanted if c.system == name]
            self.measure(Case(name, name, max(c.prompts for c in own), min(few, max(c.new_tokens for c in own))), 0, roof=False)

    def measure(self, case: Case, number: int, *, roof: bool = True) -> dict[str, Any]:
        """One row of round ``number``; ``roof``: with its ``roofline``, in seconds (:mod:`ivg.bench.roofline`).

        ``before`` is memory in use before the run (all models are loaded), ``peak`` the maximum during it; ``caches`` the maximum that
        the method's caches needed if rows shared nothing, ``held`` what they held; ``others`` the share of the processors that other
        processes took; None where it is not known.
        """
        system, prompts = self._system(case.system), self._first_prompts(case.prompts)
        self.model.reset_caches()
        environment.malloc_trim()
        environment.reset_peak()
        before, clock, start = environment.resident_bytes(self.device), environment.cpu_clock(), time.perf_counter()
        gc.disable()
        try:
            output = system.run(prompts, case.new_tokens, self.settings.seed + number)
        finally:
            gc.enable()
        seconds = time.perf_counter() - start
        peak, others = environment.peak_bytes(self.device), environment.cpu_contention(clock)
        models = [reader.model for reader in language_models(self.model).values()]
        caches, held = sum(m.unshared_peak_bytes for m in models), sum(m.peak_bytes for m in models)
        self.model.reset_caches()
        return {
            **asdict(case),
            "round": number,
            "seconds": seconds,
            "roofline": self._roofline(case) if roof else None,
            "first_text_seconds": output.first_text_seconds,
            "answers": output.answers,
            "tokens": output.tokens,
            "peak": peak,
            "before": before,
            "caches": caches,
            "held": held,
            "others": others,
            "forward_tokens": dict(output.forward_tokens),
            "flops": flops(output.forward_tokens, self.sizes),
            "sizes": self.sizes,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "commit": self.commit,
        }

    def _roofline(self, case: Case) -> float | None:
        """Seconds of the matrix products of ``case`` alone; they are counted in a run of their own, and timed anew in each round."""
        system = self._system(case.system)
        if not system.networks:
            return None
        if case not in self._products:
            with roofline.count_products(system.networks) as found:
                system.run(self._first_prompts(case.prompts), case.new_tokens, self.settings.seed)
            self.model.reset_caches()
            self._products[case] = found
        base = self.model.reader.model
        return roofline.seconds(self._products[case], next(base.network.parameters()).dtype, base.device)

    def _system(self, name: str) -> System:
        if name not in self._systems:
            self._systems[name] = self.constructors[name](self.settings, self.model if name == METHOD else self.unpacked_model)
        return self._systems[name]

    def _first_prompts(self, count: int) -> list[Any]:
        """The first ``count`` prompts; the first stay the same when more are needed."""
        if len(self._prompts) < count:
            self._prompts = make_prompts(self.model.base.tokenizer, count, self.settings.prompt_tokens, self.settings.seed)
        return self._prompts[:count]
