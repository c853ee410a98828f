"""Which causal language models of transformers ivg reads exactly: ``python -m benchmarks.coverage --docs docs/reference/architectures.md``.

Every type is built with a tiny random configuration (``tests/architectures.py``), each in a process of its own. Then rows at
random (forks, cuts, pieces, rows of other lengths beside them) are held against passes over each row alone, without cache
(``tests/naive.py``), and greedy answers against transformers' ``generate``. Results are appended to a JSONL file; the same
command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.docs_page import update_page

ROOT = Path(__file__).parents[1]
MEMORY = 6 << 30
"""Bytes that one type may take."""
SECONDS = 300
NOT_BUILT = {
    "blt": "refused when it is loaded: it cuts its text into patches",
    "gemma3n": "pictures and sound too; its text part is gemma3n_text",
    "dots3_note": "the text part is dots3_note_text",
    "gemma4_assistant": "refused when it is loaded: it drafts tokens for a Gemma 4 and takes that network's states",
    "gemma4_unified_assistant": "as gemma4_assistant",
    "musicgen": "writes codes of sound, not text",
    "musicgen_melody": "as musicgen",
}
"""Types that are refused or tested under another name, and why no tiny one is made."""
STEPS_DIFFER = {"zamba2": "its time steps have a lower bound in passes over several tokens only (transformers' code)"}
TOLERANCE, WIDE = 2e-3, 0.1
"""Largest error of an output, in units of the largest; the second for those of ``STEPS_DIFFER``."""
TOKENS = 16
PROMPTS = ("I am", "The movie was fine", "What a long prompt this one is")


def examine(name: str) -> dict[str, Any]:
    """Class, cache and result of one type, in this process."""
    from ivg.errors import ModelError
    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner
    from ivg.testing import byte_tokenizer

    tiny, wander = import_module("architectures").tiny, import_module("naive").wander
    network = tiny(name)
    found: dict[str, Any] = {"name": name, "class": type(network).__name__}
    try:
        model = ModelRunner(network, "base")
    except ModelError as e:
        return found | {"result": "refused", "reason": str(e).splitlines()[0].removeprefix(f"base: {found['class']} ")}
    found |= {"cache": type(model.cache).__name__, "reason": model.support.state_reason or ""}
    if model.max_positions is not None and model.max_positions < 64:
        return found | {"result": "exact", "reason": f"up to {model.max_positions} tokens: {model.support.limit_reason}"}
    try:
        for seed in range(3):
            model.reset_cache()
            wander(model, random.Random(f"{name} {seed}"), 256, WIDE if name in STEPS_DIFFER else TOLERANCE)
    except AssertionError:
        return found | {"result": "wrong", "reason": "rows differ from passes over each alone"}
    model.reset_cache()
    lm = CachedLM(model, byte_tokenizer())
    answers = {prompt: answer(lm, prompt) for prompt in PROMPTS}
    if differing := [p for p, tokens in answers.items() if tokens != plain(lm, p)]:
        return found | {"result": "wrong", "reason": f"greedy answers to {len(differing)} prompts differ from passes without cache"}
    remarks = [STEPS_DIFFER.get(name) or found["reason"]]
    try:
        if any(tokens != generated(lm, p) for p, tokens in answers.items()):
            remarks.append("transformers' generate gives other answers than its own passes without cache")
    except Exception as e:  # code of the network
        remarks.append(f"transformers' generate fails on it ({type(e).__name__})")
    return found | {"result": "exact", "reason": "; ".join(filter(None, remarks))}


def answer(lm: Any, prompt: str) -> list[int]:
    """A greedy answer by ivg."""
    from ivg.engines.transformers.engine import TransformersEngine
    from ivg.search.methods import get_method
    from ivg.search.searcher import Request, Searcher
    from ivg.types import Prompt, SamplingParams

    sampling = SamplingParams(temperature=0, max_new_tokens=TOKENS)
    request = Request(Prompt(prompt), get_method("base").search({}), sampling, 0)
    return list(dict(Searcher(TransformersEngine(lm)).run([request]))[0].token_ids)


def plain(lm: Any, prompt: str) -> list[int]:
    """The same token by token, each by a pass over all tokens without cache."""
    prompt_ids = lm.tokenizer(prompt).input_ids
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + TOKENS and (len(ids) == len(prompt_ids) or ids[-1] != 0):
        with torch.no_grad():
            ids.append(int(lm.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def generated(lm: Any, prompt: str) -> list[int]:
    """The same by transformers' ``generate``."""
    ids = torch.tensor([lm.tokenizer(prompt).input_ids])
    network = lm.network
    network.generation_config = transformers.GenerationConfig(eos_token_id=0, pad_token_id=0)  # without beams, forced tokens …
    out = network.generate(ids, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
    return out[0, ids.shape[1] :].tolist()


def in_child(name: str) -> dict[str, Any]:
    """:func:`examine` in a forked process, within bounds of time and memory."""
    context = multiprocessing.get_context("fork")  # so that libraries are imported once
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, send))
    child.start()
    send.close()
    try:
        if receive.poll(SECONDS):
            return receive.recv()
        return {"name": name, "result": "not tried", "reason": f"took more than {SECONDS} s"}
    except EOFError:
        return {"name": name, "result": "not tried", "reason": "its process died"}
    finally:
        child.kill()
        child.join()


def _child(name: str, send: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        send.send(examine(name))
    except Exception as e:  # code of the network
        send.send({"name": name, "result": "not tried", "reason": f"no tiny one was made: {type(e).__name__}: {str(e)[:160]}"})


def page(rows: Sequence[Mapping[str, Any]], version: str) -> str:
    """The table, with a summary above it."""
    caches = {"SlotCache": "prefix-sharing slots", "StateCache": "transformers' own, per row"}
    counts = Counter(row["result"] for row in rows)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "refused", "not tried", "wrong") if counts[kind])
    lines = [f"{len(rows)} types of causal language models of transformers {version}: {summary}.", ""]
    lines += ["| type | class | result | cache | remark |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: r["name"]):
        cells = [
            f"`{row['name']}`",
            row.get("class", ""),
            row["result"],
            caches.get(row.get("cache", ""), ""),
            " ".join(row["reason"].replace("|", "/").split()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/coverage.jsonl"))
    parser.add_argument("--docs", type=Path, help="page with the table")
    parser.add_argument("--one", help="examine this type here and print the result")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    if given.one is not None:
        print(json.dumps(examine(given.one)))
        return
    import_module("architectures")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {row["name"] for row in done}
    with given.out.open("a") as file:
        for name in (n for n in TYPES if n not in known):
            row = {"name": name, "result": "not tried", "reason": NOT_BUILT[name]} if name in NOT_BUILT else in_child(name)
            done.append(row)
            print(name, row["result"], row["reason"], flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
    if given.docs is not None:
        update_page(given.docs, "coverage", page(done, transformers.__version__))


if __name__ == "__main__":
    main()
