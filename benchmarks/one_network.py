"""One set of weights against three: memory, forward passes and seconds of guidance by models of one network.

``python -m benchmarks.one_network [--hidden 512 --layers 8 --prompts 8 --tokens 32]`` writes a random network and a LoRA adapter to a
folder and runs token guidance (base, tuned, untuned) over it twice: with each model loaded by itself, as three networks, and with models of
one path loaded once. The tokens are compared: they are equal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from ivg.model import GuidedModel
from ivg.models.cached_lm import runners_of
from ivg.models.loading import LoadOptions
from ivg.models.packed_linear import packed_layers
from ivg.models.shared import SharedNetworks
from ivg.search.methods import get_method
from ivg.settings.models import ModelRef
from ivg.testing import byte_tokenizer
from ivg.values.implicit import ImplicitValue

INSTRUCTION = "Answer as kindly as you can, in whole sentences."
OPTIONS = LoadOptions(dtype="float32")


def write(folder: Path, hidden: int, layers: int) -> None:
    """A random network, an adapter of it, and the two merged."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8}
    ends = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", **sizes, **ends, max_position_embeddings=512, initializer_range=0.05)
    network = AutoModelForCausalLM.from_config(config).float()
    network.save_pretrained(folder / "network")
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(str(folder / "adapter"))
    cast("Any", wrapped).merge_and_unload().save_pretrained(folder / "merged")
    for name in ("network", "merged"):
        byte_tokenizer().save_pretrained(folder / name)


def load(folder: Path, kind: str, *, shared: bool) -> GuidedModel:
    """Base, tuned and untuned; ``kind``: the tuned model reads an ``instruction``, or has an ``adapter``."""
    network = str(folder / "network")
    tuned = ModelRef(path=network, system=INSTRUCTION)
    if kind == "adapter":
        tuned = ModelRef(path=network, adapter=str(folder / "adapter")) if shared else ModelRef(path=str(folder / "merged"))
    if shared:
        return GuidedModel.from_pretrained(network, tuned=tuned, untuned=network, options=OPTIONS)
    refs = {"base": ModelRef(path=network), "tuned": tuned, "untuned": ModelRef(path=network)}
    lms = {role: SharedNetworks().load(ref, role, OPTIONS) for role, ref in refs.items()}
    return GuidedModel(lms["base"], {"implicit": ImplicitValue(lms["tuned"], lms["untuned"])})


def measure(model: GuidedModel, prompts: list[str], tokens: int) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """(weights in MB, keys and values at the busiest moment in MB, passes, rows read in them, seconds of the processor; the tokens)."""
    networks = {id(lm.network): lm.network for lm in model.readers}
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for n in networks.values() for p in n.parameters()}
    packed = sum(layer.num_weights * layer.dtype.itemsize for n in networks.values() for layer in packed_layers(n))
    counts: list[int] = []
    for network in networks.values():
        network.register_forward_pre_hook(lambda _, args, kwargs: counts.append(len(kwargs["input_ids"])), with_kwargs=True)
    method = get_method("eft")
    model.generate(prompts[:1], method, seed=1, max_new_tokens=tokens, ignore_eos=True)
    model.reset_caches()
    counts.clear()
    started = time.process_time()
    done = model.generate(prompts, method, seed=1, max_new_tokens=tokens, ignore_eos=True)
    seconds = time.process_time() - started
    cache = sum(runner.peak_bytes for runner in runners_of(model.readers).values())
    row = {
        "weights MB": (sum(storages.values()) + packed) / 1e6,
        "keys and values MB": cache / 1e6,
        "passes": len(counts),
        "rows": sum(counts),
        "processor s": seconds,
    }
    return row, [c.token_ids for c in done]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 512), ("layers", 8), ("prompts", 8), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    prompts = [f"{i}: what a fine day it was when we went to the sea and" for i in range(given.prompts)]
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), given.hidden, given.layers)
        for kind in ("instruction", "adapter"):
            answers = []
            for shared in (False, True):
                row, tokens = measure(load(Path(place), kind, shared=shared), prompts, given.tokens)
                answers.append(tokens)
                print(f"{kind:12} {'one network' if shared else 'three      '}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            print(f"{kind:12} tokens equal: {answers[0] == answers[1]}")


if __name__ == "__main__":
    main()
