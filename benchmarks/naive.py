"""Integrated Value Guidance (Liu et al. 2024, arXiv 2409.17819) the way released codes of this family implement it: a baseline.

    python benchmarks/naive.py --new-tokens 20

Self-contained: needs torch and transformers, nothing of ivg. One prompt at a time. The prompt is repeated W·K times and read by base,
tuned and untuned, each with an ordinary DynamicCache and full logits in float32. Each token is sampled from
softmax((z_base + beta·(z_tuned − z_untuned)) / T). After every chunk the value network reads the whole text of all beams again, with full
float32 logits; its entry for the last token is the score. The best W beams are repeated K times; all three caches are copied in full.
Finished beams are still stepped, compete with their own copies, and are padded with the end-of-sequence token.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

Draw = Callable[[tuple[int, ...], int], float]
"""A number in [0, 1) for the beam with this path (index of the child at every chunk) at this position."""


@dataclass
class Models:
    """Without ``tuned`` and ``untuned`` tokens are not guided; without ``value`` there is no selection. All return ``.logits``."""

    base: Any
    tuned: Any = None
    untuned: Any = None
    value: Any = None


@dataclass
class Answer:
    """One answer: its tokens, its score, tokens read by each model, seconds."""

    token_ids: list[int]
    score: float
    forward_tokens: Counter = field(default_factory=Counter)
    seconds: float = 0.0


class _Cached:
    """A causal model with its DynamicCache."""

    def __init__(self, network: Any, name: str, counts: Counter) -> None:
        self.network, self.name, self.counts = network, name, counts
        self.cache = DynamicCache()

    def read(self, ids: Tensor) -> Tensor:
        """Float32 logits after the last of ``ids`` [rows, tokens]; the logits of all tokens are computed."""
        self.counts[self.name] += ids.numel()
        logits = self.network(input_ids=ids, past_key_values=self.cache, use_cache=True).logits.float()
        return logits[:, -1]

    def reorder(self, rows: Tensor) -> None:
        """Copy the cache in the order of ``rows``."""
        self.cache.reorder_cache(rows)


@torch.no_grad()
def answer(
    models: Models,
    prompt: Sequence[int],
    *,
    width: int = 4,
    successors: int = 4,
    chunk: int | None = 5,
    new_tokens: int = 50,
    beta: float = 1.0,
    temperature: float = 0.7,
    eos: int | None = None,
    draw: Draw | None = None,
) -> Answer:
    """The best beam of chunk-level beam search (width, successors, chunk) after ``prompt``.

    Args:
        models: all on one device, one vocabulary.
        prompt: token ids.
        width: beams kept (W).
        successors: continuations of each (K).
        chunk: tokens between selections (L); None: one chunk.
        new_tokens: maximum length of the answer.
        beta: weight of token guidance.
        temperature: 0 is greedy.
        eos: end-of-sequence token; None: none.
        draw: random numbers, for tests; None: torch.multinomial.
    """
    begin, counts = time.perf_counter(), Counter[str]()
    device, rows = next(models.base.parameters()).device, width * successors
    readers = [_Cached(models.base, "base", counts)]
    if models.tuned is not None and beta:
        readers += [_Cached(models.tuned, "tuned", counts), _Cached(models.untuned, "untuned", counts)]
    text = torch.tensor([list(prompt)] * rows, device=device)
    new, start = text, len(prompt)
    ends = torch.full((rows,), start + new_tokens, device=device)
    paths: list[tuple[int, ...]] = [(k,) for k in range(rows)]
    while True:
        for _ in range(min(chunk or new_tokens, start + new_tokens - text.shape[1])):
            tokens = _choose(_guided([r.read(new) for r in readers], beta), temperature, draw, paths, text.shape[1] - start)
            done = ends <= text.shape[1]
            if eos is not None:
                tokens = tokens.masked_fill(done, eos)
                ends = ends.masked_fill(~done & (tokens == eos), text.shape[1] + 1)
            new = tokens[:, None]
            text = torch.cat([text, new], 1)
        scores = _scores(models.value, text, ends, counts)
        best = torch.sort(scores, descending=True, stable=True).indices[:width]
        if bool((ends[best] <= text.shape[1]).all()):
            i = int(best[0])
            return Answer(text[i, start : ends[i]].tolist(), float(scores[i]), counts, time.perf_counter() - begin)
        tiled = best.repeat_interleave(successors)
        for reader in readers:
            reader.reorder(tiled)
        text, new, ends = text[tiled], new[tiled], ends[tiled]
        paths = [(*paths[i], k) for i in best.tolist() for k in range(successors)]


def _guided(logits: list[Tensor], beta: float) -> Tensor:
    return logits[0] if len(logits) == 1 else logits[0] + beta * (logits[1] - logits[2])


def _choose(z: Tensor, temperature: float, draw: Draw | None, paths: list[tuple[int, ...]], position: int) -> Tensor:
    """One token for each row of ``z`` [rows, vocabulary]."""
    if temperature == 0:
        return z.argmax(-1)
    probabilities = (z / temperature).softmax(-1)
    if draw is None:
        return torch.multinomial(probabilities, 1)[:, 0]
    mass = probabilities.double().cumsum(-1)
    u = torch.tensor([draw(p, position) for p in paths], dtype=torch.float64, device=z.device)
    return (mass <= u[:, None] * mass[:, -1:]).sum(-1)


def _scores(value: Any, text: Tensor, ends: Tensor, counts: Counter) -> Tensor:
    """Q(s_t, y_t) of the last token of every row [rows]: the whole text is read, rows x length x vocabulary numbers are made."""
    if value is None:
        return torch.zeros(len(text), device=text.device)
    counts["value"] += text.numel()
    logits = value(input_ids=text, use_cache=False).logits.float()
    last = ends.clamp(max=text.shape[1]) - 1
    row = torch.arange(len(text), device=text.device)
    return logits[row, last - 1, text[row, last]]


class QHead(nn.Module):
    """A backbone with a vocabulary head, for running this file alone."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = AutoModel.from_config(config, dtype=dtype)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """An object with ``logits`` [rows, tokens, vocabulary]."""
        out = self.backbone(input_ids=input_ids, use_cache=use_cache)
        out.logits = self.head(out.last_hidden_state)
        return out


def main() -> None:
    """Random models of the benchmark's shapes; prints seconds of each answer, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="of the base, 64 wide for each; guides have half of it")
    parser.add_argument("--vocabulary", type=int, default=16384)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    def shape(layers: int) -> Any:
        size = {"n_layer": layers, "n_head": layers, "n_embd": 64 * layers, "vocab_size": args.vocabulary}
        return AutoConfig.for_model("gpt2", **size, bos_token_id=0, eos_token_id=0)

    torch.manual_seed(0)
    small = shape(max(1, args.layers // 2))
    base, tuned, untuned = (AutoModelForCausalLM.from_config(c, dtype=dtype) for c in (shape(args.layers), small, small))
    models = Models(*(m.to(args.device).eval() for m in (base, tuned, untuned, QHead(small, dtype))))
    prompts = torch.randint(1, args.vocabulary, (args.prompts, args.prompt_tokens)).tolist()
    answer(models, prompts[0], new_tokens=6)
    seconds = []
    for prompt in prompts:
        seconds.append(answer(models, prompt, new_tokens=args.new_tokens).seconds)
        print(f"{args.new_tokens} tokens in {seconds[-1]:.2f} s")
    rate = len(seconds) / sum(seconds)
    print(json.dumps({"system": "naive", "answers_per_second": rate, "tokens_per_second": rate * args.new_tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
