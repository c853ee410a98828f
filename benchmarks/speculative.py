"""Speculative sampling with the guide pair as draft model: acceptance and base passes on the embedded models, speed on larger ones.

    .venv/bin/python -m benchmarks.speculative --docs docs/explanation/speculation.md
    .venv/bin/python -m benchmarks.speculative --quick

A gain in speed needs a base that costs more than its guides. Such models are made here with random weights: a base of 98 M parameters,
guides of 17 M, 16 384 tokens. How often guide and base agree is **constructed, not learnt**: the tied embeddings are so large that they
determine the next token, up to contributions of positions and layers. The *agreeing* base has the guides' embeddings (concatenated with
themselves, which preserves all inner products); the *disagreeing* base has others. The layers of each model are its own, scaled by
``--spread``. The tuned guide is the untuned one with some noise in its layers and output. The table shows the resulting entropy, and the
overlap of the draft's distribution and the guided one. The time depends on such a pair only through its acceptance.

For W·K = 1 one text is generated (`eft`); for 4 and 16 one text by `ivg` with W = K = 2 and 4, L = 5, with the value. `base` is as many
plain samples of the base, in one batch. All run in turn; ratios are medians of the ratios within the rounds.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.docs_page import markdown_table, update_page
from ivg.bench.shapes import build_model, make_prompts, networks
from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.speculation import Speculator
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.models.packed_linear import pack
from ivg.models.runner import ModelRunner
from ivg.types import Beam, Prompt, new_key
from ivg.utils.environment import command, commit, machine
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import ImplicitValue

Row = dict[str, Any]
PEAK = 3.4
"""Standard deviation of the logits in nats: leaves some 4 nats of entropy over 16 384 tokens."""
OPENINGS = ("The movie was", "I have to say that", "This film", "What a", "The acting", "If you like", "I watched it", "The story")
SIDES = {1: 1, 4: 2, 16: 4}
"""W·K -> W = K."""


# Models with a known agreement


def constructed_models(shape: str, dtype: str, spread: float, *, agree: bool, seed: int = 0, device: str | None = None) -> GuidedModel:
    """A base, its guides and a value with a known agreement; see the module docstring."""
    plain = build_model(shape, dtype=dtype, device=device, packed=False, seed=seed)
    nets, tokenizer = networks(plain), plain.base.tokenizer
    size = nets["untuned"].config.n_embd
    copies = nets["base"].config.n_embd // size
    generator = torch.Generator().manual_seed(seed + 100)

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(nets["base"].device)

    def reader(name: str) -> CachedLM:
        return CachedLM(ModelRunner(pack(nets[name]), "explicit" if name == "value" else name), tokenizer)

    embedding, other = (random(*nets["untuned"].transformer.wte.weight.shape) for _ in range(2))
    positions = 0.1 * random(*nets["untuned"].transformer.wpe.weight.shape)
    signs = random(size).sign()  # else every token would predict itself
    with torch.no_grad():
        _set_embeddings(nets["untuned"].transformer, embedding, positions, signs, 1)
        nets["tuned"].load_state_dict(nets["untuned"].state_dict())
        for block in nets["tuned"].transformer.h:
            for weights in block.parameters():
                if weights.dim() == 2:
                    weights += (0.3 * weights.float().std() * random(*weights.shape)).to(weights)
        nets["tuned"].transformer.ln_f.bias += 0.02 * random(size).to(nets["tuned"].transformer.ln_f.bias)
        _set_embeddings(nets["base"].transformer, embedding if agree else other, positions, signs, copies)
        for name in ("base", "tuned", "untuned"):
            for block in nets[name].transformer.h:
                for layer in (block.attn.c_proj, block.mlp.c_proj):
                    layer.weight *= spread
    values = {"implicit": ImplicitValue(reader("tuned"), reader("untuned")), "explicit": ExplicitValue(reader("value"))}
    return GuidedModel(reader("base"), values)


def _set_embeddings(body: Any, embedding: Tensor, positions: Tensor, signs: Tensor, copies: int) -> None:
    """Set token and position embeddings and the last norm, concatenated ``copies`` times; the logits are those of one copy."""
    body.wte.weight.copy_(torch.cat([embedding] * copies, 1) / copies**0.5)
    body.wpe.weight.copy_(torch.cat([positions] * copies, 1) / copies**0.5)
    body.ln_f.weight.copy_(torch.cat([signs] * copies) * PEAK / embedding.shape[1] ** 0.5 / copies**0.5)


def pair_statistics(model: GuidedModel, prompt: Prompt, tokens: int) -> dict[str, float]:
    """Along a guided text at temperature 1: mean entropy of base and guided distribution in nats, mean overlap of draft and guided."""
    done = model.generate(prompt, "eft", temperature=1.0, max_new_tokens=tokens, ignore_eos=True, seed=1)
    beam = Beam(new_key(), None, prompt, done.token_ids[:-1], vocabulary=model.base.vocabulary)
    implicit = model.values["implicit"]
    assert isinstance(implicit, ImplicitValue)
    readers = (model.reader, implicit.tuned, implicit.untuned)
    base, tuned, untuned = (reader.recent_outputs([beam], [tokens])[0] for reader in readers)
    for reader in readers:
        reader.release([beam.key])
    guided = (base + tuned - untuned).softmax(-1)
    overlap = torch.minimum(guided, tuned.softmax(-1)).sum(-1).mean()
    nats = [float(torch.special.entr(p).sum(-1).mean()) for p in (base.softmax(-1), guided)]
    return {"entropy_base": nats[0], "entropy_guided": nats[1], "overlap": float(overlap)}


# Measurements


def embedded(arguments: argparse.Namespace) -> list[Row]:
    """Acceptance and base passes per token of the embedded models, with a fixed number of drafted tokens."""
    model = GuidedModel.embedded()
    speculator, rows = _speculator(model), []
    openings = OPENINGS[:2] if arguments.quick else OPENINGS
    for method in ("eft", "ivg"):
        for beta in (0.5, 1.0, 2.0):
            for temperature in (0.7, 1.0):
                row: Row = {"method": method, "beta": beta, "temperature": temperature}
                for ahead in (2, 4, 8):
                    speculator.draft_length = ahead
                    speculator.reset_stats()
                    settings = {"temperature": temperature, "max_new_tokens": arguments.new_tokens, "seed": 1}
                    model.generate(openings, method, beta=beta, draft=ahead, **settings)
                    stats = speculator.stats()
                    row |= {"acceptance": stats["acceptance"], f"passes_{ahead}": stats["passes_per_token"]}
                rows.append(row)
    return rows


def speed(model: GuidedModel, pair: str, arguments: argparse.Namespace) -> list[Row]:
    """Seconds of base, guided and drafted sampling, in turn, for each W·K."""
    texts = make_prompts(model.base.tokenizer, arguments.rounds + 1, arguments.prompt_tokens)
    known = pair_statistics(model, texts[0], arguments.new_tokens)
    rows: list[Row] = []
    for count in SIDES:
        entries = {"base": ("base", 0), "guided": ("eft" if count == 1 else "ivg", 0)}
        entries["drafted"] = (entries["guided"][0], arguments.draft)
        seconds: dict[str, list[float]] = {name: [] for name in entries}
        stats = []
        for number, text in enumerate(texts):
            for name, (method, draft) in entries.items():
                took = _seconds(model, text, method, count, draft, number, arguments)
                if number:  # the first round warms up
                    seconds[name].append(took)
            stats.append(_speculator(model).stats())
        over = {
            f"over_{name}": median(a / b for a, b in zip(seconds[name], seconds["drafted"], strict=True)) for name in ("base", "guided")
        }
        row: Row = {"pair": pair, "wk": count, **{name: median(s) for name, s in seconds.items()}, **over, **known}
        rows.append(row | {key: fmean(s[key] for s in stats[1:]) for key in ("acceptance", "passes_per_token")})
        print(f"{pair}, W·K = {count}: " + ", ".join(f"{k} {v:.3g}" for k, v in rows[-1].items() if isinstance(v, float)), flush=True)
    return rows


def _speculator(model: GuidedModel) -> Speculator:
    assert isinstance(model.engine, TransformersEngine)
    return model.engine.speculation


def _seconds(model: GuidedModel, text: Prompt, method: str, count: int, draft: int, seed: int, arguments: argparse.Namespace) -> float:
    """Seconds to continue ``text``, prompt included."""
    settings: Row = {"temperature": 1.0, "max_new_tokens": arguments.new_tokens, "ignore_eos": True, "seed": seed}
    if method == "base":
        requests = [model.request(text, method, index=i, **settings) for i in range(count)]
    else:
        side = SIDES[count]
        sizes = {"width": side, "successors": side, "chunk_length": arguments.chunk_length} if method == "ivg" else {}
        requests = [model.request(text, method, draft=draft, **sizes, **settings)]
    model.reset_caches()
    _speculator(model).reset_stats()
    started = time.perf_counter()
    done = dict(model.run(requests))
    took = time.perf_counter() - started
    assert all(len(c.token_ids) == arguments.new_tokens for c in done.values())
    return took


# Output


def render(found: Row) -> str:
    """Both tables as Markdown."""
    lines = []
    if found["embedded"]:
        head = ["method", "β", "T", "acceptance", "2 ahead", "4 ahead", "8 ahead"]
        body = [
            [r["method"], f"{r['beta']:g}", f"{r['temperature']:g}"]
            + [f"{r[k]:.2f}" for k in ("acceptance", "passes_2", "passes_4", "passes_8")]
            for r in found["embedded"]
        ]
        lines += ["Embedded models, base passes per token, with 2, 4 or 8 drafted tokens:", "", markdown_table(head, body), ""]
    if found["speed"]:
        s = found["settings"]
        head = ["pair", "W·K", "base unguided", "guided", "drafted", "faster than guided", "than base", "acceptance", "passes per token"]
        body = [
            [r["pair"], str(r["wk"])]
            + [f"{r[k]:.2f}" for k in ("base", "guided", "drafted")]
            + [f"{r[k]:.2f}×" for k in ("over_guided", "over_base")]
            + [f"{r[k]:.2f}" for k in ("acceptance", "passes_per_token")]
            for r in found["speed"]
        ]
        title = f"Shape {s['shape']}, {found['dtype']}, {s['new_tokens']} new tokens, at most {s['draft']} drafted tokens; seconds:"
        lines += [title, "", markdown_table(head, body), ""]
        for pair, r in {r["pair"]: r for r in found["speed"]}.items():
            entropies = f"base {r['entropy_base']:.1f} nats of entropy, guided {r['entropy_guided']:.1f}"
            lines.append(f"- {pair}: {entropies}; draft and guided distribution overlap by {r['overlap']:.2f}.")
        lines.append("")
    m = found["machine"]
    lines.append(f"{m['processor']}, {found['threads']} threads, PyTorch {m['torch']}, commit {found['commit']}.")
    return "\n".join([*lines, "", "```text", found["command"], "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-small-16k")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--chunk-length", type=int, default=5)
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.4, help="scale of each model's own layers")
    parser.add_argument("--only", choices=("embedded", "speed"), help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="tiny models; the figures mean nothing")
    parser.add_argument("--docs", type=Path, help="page to put the tables into")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.rounds, arguments.new_tokens, arguments.prompt_tokens = "tiny", 1, 16, 8
    found: Row = {"embedded": embedded(arguments) if arguments.only != "speed" else [], "speed": []}
    for pair, agree in (("agreeing", True), ("disagreeing", False)):
        if arguments.only != "embedded":
            model = constructed_models(arguments.shape, arguments.dtype, arguments.spread, agree=agree, device=arguments.device)
            found["dtype"] = str(next(model.reader.network.parameters()).dtype).removeprefix("torch.")
            found["speed"] += speed(model, pair, arguments)
    found |= {"machine": machine(), "threads": torch.get_num_threads(), "commit": commit(Path(__file__)), "command": command()}
    found["settings"] = {k: v for k, v in vars(arguments).items() if k != "docs"}
    text = render(found)
    print(text)
    if arguments.docs is not None:
        update_page(arguments.docs, "speculative", text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
