"""Log-probabilities of labels on a CPU: the head of ``ivg train sft`` and ``dpo`` beside TRL's.

``OMP_NUM_THREADS=1 python -m benchmarks.label_log_probs`` prints seconds of the processor for a small Llama with a vocabulary of 49 152
tokens, 64 rows of 72 tokens of which 10 are the prompt, in bfloat16: the best of three.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from ivg.training.cpu_head import score_on_cpu

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def seconds(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, backward: bool) -> float:
    """Of one pass."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(backward):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    if backward:
        found.log_probs.sum().backward()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=options.vocabulary, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    ids = torch.randint(0, options.vocabulary, (options.rows, 72))
    labels = ids.clone()
    labels[:, :10] = -100
    print("| head | forward | with backward |\n|---|---|---|")
    for name in ("TRL", "ivg"):
        model = LlamaForCausalLM(config)
        add_fused_lm_head(model, outputs=OUTPUTS)
        if name == "ivg":
            score_on_cpu(model)
        times = [min(seconds(model, ids, labels, backward=backward) for _ in range(3)) for backward in (False, True)]
        print(f"| {name} | {times[0]:.2f} | {times[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
