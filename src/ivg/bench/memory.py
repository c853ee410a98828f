"""Peak memory of ours over what it cannot do without, in a process of its own: ``python -m ivg.bench.memory '{"shape": …}'``.

Needed is the memory of all weights, and of the keys and values of all live rows at the busiest moment, each row by itself (of each
model its own busiest moment; they coincide but for one chunk). Measured is the peak of resident memory while answers are made, above
that before any model was there, after tiny models have made everything loaded that code loads when it first runs. A fresh process,
because a peak knows nothing of what earlier work left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ivg.bench.settings import Settings, from_mapping
from ivg.errors import ModelError
from ivg.utils import environment


def measure(settings: Settings) -> dict[str, Any]:
    """``peak``, ``weights``, ``caches`` and ``held`` (shared parts once) in bytes and ``ratio``s, measured in a child process.

    Raises:
        ModelError: the child failed; its last words.
    """
    command = [sys.executable, "-m", "ivg.bench.memory", json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ModelError(f"the process that measures memory ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def here(settings: Settings) -> dict[str, Any]:
    """The same in this process, which should have done nothing before."""
    from ivg.bench.runner import Bench, entries
    from ivg.diagnostics.cost import readers

    settings = replace(settings, contestants=("ours",))
    (entry,) = entries(settings)
    tiny = "tiny-llama" if "llama" in settings.shape else "tiny"
    small = replace(settings, shape=tiny, guide=None, prompts=2, prompt_tokens=8, new_tokens=12)
    Bench(small).measure(replace(entry, prompts=2, new_tokens=12), 0)
    environment.trim()
    before = environment.resident_bytes(settings.device)
    bench = Bench(settings)
    row = bench.measure(entry, 0)
    if before is None or row["peak"] is None:
        raise ModelError("this system does not tell a process its peak memory")
    networks = {id(r.model): r.model.network for r in readers(bench.model).values()}
    weights = sum(_size(n) for n in networks.values())
    caches, peak = row["caches"], row["peak"] - before
    common = {k: row[k] for k in ("dtype", "device", "threads", "commit", "others")}
    ratios = {"ratio": peak / (weights + caches), "ratio_shared": peak / (weights + row["held"])}
    return {"peak": peak, "weights": weights, "caches": caches, "held": row["held"], **ratios, **common}


def _size(network: Any) -> int:
    """Bytes of weights and buffers; tied ones count once, packed ones as they lie."""
    from ivg.models.packed_linear import packed_layers

    held = {t.data_ptr(): t.nbytes for t in (*network.parameters(), *network.buffers())}
    return sum(held.values()) + sum(layer.elements * layer.packed.element_size() for layer in packed_layers(network))


def main(given: Mapping[str, Any]) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(here(from_mapping(given))) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
