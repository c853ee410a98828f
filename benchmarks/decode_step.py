"""The decode step of one network: PyTorch's eager mode against `torch.compile` with CUDA graphs, on transformers' static cache.

    python -m benchmarks.decode_step --shape llama-1b --dtype bfloat16 --rows 1 16 256

What a search could gain if its passes were captured: one token for each row, behind ``--context`` tokens. Off a GPU there are no graphs, so
that compiling is all that is compared. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from benchmarks.docs_page import markdown_table
from ivg.bench.named_shapes import shape
from ivg.bench.shapes import model_config
from ivg.models.placement import pick_device, pick_dtype
from ivg.utils.environment import command, commit, machine

WARM_UP = 3
"""Steps that are not measured; CUDA graphs are recorded in the second."""


def step_of(network: Any, rows: int, context: int, steps: int) -> Callable[[], torch.Tensor]:
    """A decode step of ``rows`` sequences behind ``context`` tokens, which may be called ``steps`` times: a static cache counts on."""
    device = network.device
    cache = StaticCache(config=network.config, max_cache_len=context + steps)
    ids = torch.arange(rows * context, device=device).reshape(rows, context) % network.config.vocab_size
    with torch.no_grad():
        network(ids, past_key_values=cache, logits_to_keep=1)
    last = ids[:, :1].contiguous()

    @torch.no_grad()
    def step() -> torch.Tensor:
        out: torch.Tensor = network(last, past_key_values=cache).logits
        return out

    return step


def seconds(step: Callable[[], torch.Tensor], rounds: int, device: torch.device) -> float:
    """Median seconds of a step, after some that warm up."""
    found = []
    for _ in range(rounds + WARM_UP):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-160m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    what = shape(arguments.shape)
    torch.manual_seed(0)
    with device:
        network = AutoModelForCausalLM.from_config(model_config(what, what.vocabulary), dtype=dtype, attn_implementation="sdpa").eval()
    found: list[dict[str, Any]] = []
    for rows in arguments.rows:
        steps = arguments.rounds + WARM_UP + 1
        step = step_of(network, rows, arguments.context, steps)
        expected = step().float()
        row: dict[str, Any] = {"rows": rows, "eager": seconds(step, arguments.rounds, device)}
        torch.compiler.reset()
        start = time.perf_counter()
        compiled = torch.compile(
            step_of(network, rows, arguments.context, steps), mode="reduce-overhead" if device.type == "cuda" else None
        )
        got = compiled().float()
        row |= {"compiling": time.perf_counter() - start, "compiled": seconds(compiled, arguments.rounds, device)}
        found.append(row | {"ratio": row["eager"] / row["compiled"], "largest_difference": float((got - expected).abs().max())})
    head = ["rows", "eager, ms", "compiled, ms", "times as fast", "compiling, s"]
    body = [
        [str(r["rows"]), *(f"{1000 * r[k]:.2f}" for k in ("eager", "compiled")), f"{r['ratio']:.2f}", f"{r['compiling']:.0f}"]
        for r in found
    ]
    print(markdown_table(head, body))
    where = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "shape": arguments.shape, "context": arguments.context}
    print(json.dumps({**where, "steps": found, "machine": machine(), "commit": commit(), "command": command()}))


if __name__ == "__main__":
    main()
