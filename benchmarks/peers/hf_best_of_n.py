"""Best-of-N by transformers' ``generate`` and the value network. Run by ``benchmarks.peers``: BASE VALUE."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.protocol import SAMPLES, TEMPERATURE, serve, versions
from benchmarks.peers.value import Value

base, value = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(base)
network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
judge = Value(value)


@torch.inference_mode()
def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
    """All prompts in one batch, padded on the left."""
    torch.manual_seed(seed)
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    drawn = network.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        num_return_sequences=SAMPLES,
        max_new_tokens=tokens,
        pad_token_id=network.generation_config.eos_token_id,
    )
    texts = tokenizer.batch_decode(drawn[:, longest:], skip_special_tokens=True)
    return [judge.best(prompt, texts[i * SAMPLES : (i + 1) * SAMPLES]) for i, prompt in enumerate(prompts)]


serve(versions("torch", "transformers"), answer)
