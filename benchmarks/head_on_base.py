"""A value that is a head on the base's network against the same value as a network of its own: weights, tokens read, seconds.

``python -m benchmarks.head_on_base [--model smollm2 --method cbs-explicit --prompts 1 8 --tokens 24 --rounds 5]`` writes a random compact
head on the network and generates with both, each in a process of its own, in turn. The tokens are compared: they are equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ivg.model import GuidedModel
from ivg.models.added import locate
from ivg.models.loading import LoadOptions, load_config
from ivg.models.packed_linear import packed_layers
from ivg.training.kept_adapter import save_head
from ivg.values.explicit import ExplicitValue

OPTIONS = LoadOptions(dtype="float32")
PROMPTS = [f"Letter {i}: what a fine day it was when we went to the sea and" for i in range(64)]


def write(folder: Path, model: str) -> None:
    """A value on ``model``, whose head is random."""
    torch.manual_seed(0)
    hidden = load_config(model, OPTIONS, "base").get_text_config().hidden_size
    head = {"score_head.shared": 0.1 * torch.randn(hidden), "score_head.map": torch.randn(hidden, hidden) / hidden**0.5}
    folder.mkdir(parents=True, exist_ok=True)
    save_head(folder, model, {"ivg_value": {"head": "vocabulary"}}, head)


def load(model: str, value: Path, *, shared: bool) -> GuidedModel:
    """The base and the value, on its network or apart."""
    if shared:
        return GuidedModel.from_pretrained(model, value=value, options=OPTIONS)
    out = GuidedModel.from_pretrained(model, options=OPTIONS)
    out.add_value("explicit", ExplicitValue.from_pretrained(value, options=OPTIONS))
    return out


def weights(model: GuidedModel) -> float:
    """MB of the networks, each tensor once."""
    networks = [model.reader.network, *(network for value in model.values.values() for _, network in value.networks())]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for network in networks for p in network.parameters()}
    packed = {layer: layer.num_weights * layer.dtype.itemsize for network in networks for layer in packed_layers(network)}
    return (sum(storages.values()) + sum(packed.values())) / 1e6


def measure(model: GuidedModel, method: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Seconds of the processor, tokens read, and the answers."""
    model.reset_caches()
    sizes: dict[str, Any] = {"width": 4, "successors": 4} if method == "cbs-explicit" else {}
    started = time.process_time()
    done = model.generate(PROMPTS[:prompts], method, seed=1, max_new_tokens=tokens, ignore_eos=True, **sizes)
    seconds = time.process_time() - started
    return {"seconds": seconds, "read": sum(c.usage.total_forward_tokens for c in done), "answers": [c.token_ids for c in done]}


def serve(given: argparse.Namespace) -> None:
    """A process that measures once for each line of its standard input."""
    model = load(given.model, Path(given.value), shared=given.serve == "shared")
    print(json.dumps(weights(model)), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, given.method, int(line), given.tokens)), flush=True)


class Served:
    """A process of :func:`serve`, with the value on the base's network (``shared``) or ``apart``."""

    def __init__(self, kind: str, value: Path, given: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.head_on_base", "--serve", kind, "--value", str(value)]
        command += ["--model", given.model, "--method", given.method, "--tokens", str(given.tokens)]
        self.kind, self.process = kind, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.weights: float = self.ask("")

    def ask(self, line: str) -> Any:
        """What the process prints for ``line``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(processes: list[Served], given: argparse.Namespace) -> None:
    """Print the table."""
    print("weights MB: " + ", ".join(f"{served.kind} {served.weights:,.0f}" for served in processes))
    for prompts in given.prompts:
        found: dict[str, list[dict[str, Any]]] = {served.kind: [] for served in processes}
        for _ in range(given.rounds + 1):  # the first is not counted
            for served in processes:
                found[served.kind].append(served.ask(f"{prompts}\n"))
        for kind, rows in found.items():
            seconds = [row["seconds"] for row in rows[1:]]
            print(
                f"{given.method}, {prompts} prompts, {kind:6}: {statistics.median(seconds):.2f} s of the processor "
                f"({min(seconds):.2f} to {max(seconds):.2f}), {rows[0]['read']:,} tokens read",
                flush=True,
            )
        print(f"tokens equal: {found['shared'][0]['answers'] == found['apart'][0]['answers']}", flush=True)


def main() -> None:
    """Measure, or be one of the processes that do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="cbs-explicit")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    for name, default in (("tokens", 24), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--serve", choices=["shared", "apart"], help=argparse.SUPPRESS)
    parser.add_argument("--value", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given)
        return
    given.model = str(Path(locate(given.model)).expanduser())
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "value", given.model)
        processes = [Served(kind, Path(place) / "value", given) for kind in ("shared", "apart")]
        compare(processes, given)
        for served in processes:
            served.process.communicate()


if __name__ == "__main__":
    main()
