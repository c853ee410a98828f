"""Peak memory of a method over the memory it needs, in its own process: ``python -m benchmarks.peak_memory '{"shape": …}'``.

Needed: all weights, and the maximum of the keys and values of all running rows, as if rows shared nothing (the maximum of each model;
they occur within one chunk of each other). Measured: the peak of resident memory during a run, minus that before the models were built,
after a run of tiny models has loaded all code and libraries. It needs a fresh process, because earlier work leaves memory behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ivg.bench.runner import Session, cases
from ivg.bench.settings import METHOD, BenchSettings
from ivg.diagnostics.cost import language_models
from ivg.errors import ModelError
from ivg.models.packed_linear import packed_layers
from ivg.utils import environment


def measure(settings: BenchSettings) -> dict[str, Any]:
    """Measure in a child process: ``peak``, ``weights``, ``caches`` and ``held`` (shared parts counted once) in bytes, and ratios.

    Raises:
        ModelError: the child process failed; with the last line of its standard error.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ModelError(f"the process that measures memory exited with code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(settings: BenchSettings) -> dict[str, Any]:
    """The same in this process, which should have done nothing before."""
    settings = replace(settings, baselines=())
    (case,) = cases(settings)
    tiny = "tiny-llama" if "llama" in settings.shape else "tiny"
    small = replace(settings, shape=tiny, guide=None, prompts=2, prompt_tokens=8, new_tokens=12)
    Session(small, {METHOD}).measure(replace(case, prompts=2, new_tokens=12), 0, roof=False)
    environment.malloc_trim()
    before = environment.resident_bytes(settings.device)
    session = Session(settings, {METHOD})
    row = session.measure(case, 0, roof=False)
    if before is None or row["peak"] is None:
        raise ModelError("this operating system does not report the peak memory of a process")
    networks = {id(r.network): r.network for r in language_models(session.model).values()}
    weights = sum(_size(n) for n in networks.values())
    caches, peak = row["caches"], row["peak"] - before
    common = {k: row[k] for k in ("dtype", "device", "threads", "commit", "others")}
    ratios = {"ratio": peak / (weights + caches), "ratio_shared": peak / (weights + row["held"])}
    return {"peak": peak, "weights": weights, "caches": caches, "held": row["held"], **ratios, **common}


def _size(network: Any) -> int:
    """Bytes of weights and buffers; tied weights count once, packed weights in their packed form."""
    held = {t.data_ptr(): t.nbytes for t in (*network.parameters(), *network.buffers())}
    return sum(held.values()) + sum(layer.num_weights * layer.packed.element_size() for layer in packed_layers(network))


def main(given: Mapping[str, Any]) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(measure_here(BenchSettings(**given))) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
