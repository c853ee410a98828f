"""Token guidance by guides with another tokenizer: tokens that they read, and seconds.

``python -m benchmarks.candidates [--base smollm2 --tokens 40]`` guides SmolLM2 (``ivg models add smollm2``) over 20 candidates with
the embedded guides, which have a tokenizer of their own, and with a random pair of the same shape that has the base's. Seconds are
those of the processor: a busy machine changes them less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ivg.embedded import path
from ivg.model import GuidedModel
from ivg.models.added import locate

PROMPT = "Write a short review of a film that you saw last week."
TEMPLATES = {"base": "chat", "tuned": "raw"}
IVG = {"method": "ivg", "select": "implicit", "width": 2, "successors": 4}


def write_pair(base: str, folder: Path) -> tuple[str, str]:
    """Two random networks of the embedded pair's shape with the base's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate(base))
    for name in ("tuned", "untuned"):
        config = LlamaConfig.from_pretrained(path(name))
        config.vocab_size = len(tokenizer)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "tuned"), str(folder / "untuned")


def measure(title: str, model: GuidedModel, tokens: int, **settings: Any) -> None:
    """Print one row of the table."""
    model.generate(PROMPT, max_new_tokens=2, seed=1, **settings)
    before = time.process_time()
    read = model.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True, seed=1, **settings).usage.forward_tokens
    seconds = time.process_time() - before
    guides = {name: count for name, count in read.items() if name != "base"}
    print(f"| {title} | {', '.join(f'{name} {count}' for name, count in guides.items())} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    print("| guidance | tokens read | seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tuned, untuned = write_pair(options.base, Path(folder))
        own = GuidedModel.from_pretrained(options.base, tuned=tuned, untuned=untuned, templates=TEMPLATES)
        measure("eft, pair of the base's tokenizer", own, options.tokens, method="eft")
        measure("ivg W=2 K=4, pair of the base's tokenizer", own, options.tokens, **IVG)
    other = GuidedModel.from_pretrained(
        options.base, tuned=path("tuned"), untuned=path("untuned"), value=path("value-other"), templates=TEMPLATES
    )
    measure("eft, 20 candidates", other, options.tokens, method="eft", candidates=20)
    measure("scalar value, 20 candidates", other, options.tokens, method="custom", token="explicit", candidates=20)
    measure("ivg W=2 K=4, 20 candidates", other, options.tokens, candidates=20, **IVG)


if __name__ == "__main__":
    main()
