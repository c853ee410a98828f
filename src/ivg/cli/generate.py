"""``ivg generate``: prompts from the command line or a JSONL file, answers on the screen or in a JSONL file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError, IVGError

if TYPE_CHECKING:
    from ivg.config import Recipe
    from ivg.steered import SteeredModel
    from ivg.types import Completion

HELP = """Answer prompts, steered.

    ivg generate "The movie was"

    ivg generate --input prompts.jsonl --output out.jsonl --method ivg -W 4 -K 4 -L 5

Input rows are {"id", "prompt"} or {"id", "messages"}. Output rows are appended as they are done; the same command again
goes on where it stopped."""


@dataclass
class Job:
    """One prompt and where it came from."""

    id: Any
    prompt: Any
    line: int | None = None

    @property
    def place(self) -> str:
        """For error messages."""
        return f"line {self.line}" if self.line else f"prompt {self.id}"


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each one argument.", metavar="PROMPT...")] = None,
    input: Annotated[Path | None, typer.Option("--input", "-i", help="JSONL file of prompts; - reads standard input.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to append answers to.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the search as one HTML page.")] = None,
    recipe: o.RecipeFile = None,
    method: o.Method = None,
    base: o.Base = None,
    tuned: o.Tuned = None,
    untuned: o.Untuned = None,
    value: o.ValuePath = None,
    reward: o.Reward = None,
    arm: o.Arm = None,
    template: o.Template = None,
    width: o.Width = None,
    successors: o.Successors = None,
    chunk_length: o.ChunkLength = None,
    beta: o.Beta = None,
    token: o.Token = None,
    select: o.Select = None,
    candidates: o.Candidates = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
    seed: o.Seed = None,
    n: o.Number = None,
    batch_size: o.BatchSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """See HELP."""
    given = o.recipe_of(
        recipe,
        {"base": base, "tuned": tuned, "untuned": untuned, "value": value, "reward": reward, "arm": arm},
        {
            "method": method,
            "width": width,
            "successors": successors,
            "chunk_length": chunk_length,
            "beta": beta,
            "token": token,
            "select": select,
            "candidates": candidates,
        },
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "ignore_eos": ignore_eos,
        },
        {"seed": seed, "n": n, "batch_size": batch_size, "device": device, "dtype": dtype},
        template,
    )
    if bool(prompts) == bool(input):
        raise ConfigError("give prompts, or --input FILE (exactly one of the two)")
    _check_method(given)
    run(given, prompts or [], input, output, trace)


def _check_method(recipe: Recipe) -> None:
    """Before any model is loaded: does the method exist, are its settings possible?"""
    from ivg.decoding.strategies import strategy

    strategy(recipe.search.method, **recipe.search.settings())


def run(recipe: Recipe, prompts: list[str], source: Path | None, output: Path | None, trace: Path | None) -> None:
    """Answer every prompt that is not answered yet; what cannot be answered is reported, the others are done."""
    from ivg.build import load_models
    from ivg.cli.progress import progress

    failures: list[str] = []
    done = _answered(output) if output else set()
    model = load_models(recipe)
    jobs = [Job(i, p) for i, p in enumerate(prompts)] if source is None else list(read_jobs(source, failures))
    todo = [(job, k) for job in jobs for k in range(recipe.run.n) if (_key(job.id), k) not in done]
    kept: list[tuple[str, Completion]] = []
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    sink = output.open("a") if output else None
    try:
        with progress(len(todo), "answers") as advance:
            for job, index, completion in answers(model, recipe, todo, failures, trace=trace is not None):
                _write(sink, recipe, job, index, completion, many=len(todo) > 1)
                if trace is not None:
                    kept.append((_shown(job.prompt), completion))
                advance()
    finally:
        if sink:
            sink.close()
        if trace is not None and kept:
            from ivg.cli.trace import write_trace

            write_trace(trace, kept, recipe.search.method)
    for _failure in failures:
        pass
    if failures:
        raise typer.Exit(2 if len(failures) >= len(jobs) + len(failures) or not todo else 1)


def answers(
    model: SteeredModel, recipe: Recipe, todo: list[tuple[Job, int]], failures: list[str], *, trace: bool
) -> Iterator[tuple[Job, int, Completion]]:
    """(job, sample number, completion) as each is done; ``batch_size`` requests in flight at any time."""
    searcher = model.searcher(max_beams=1 << 30)
    settings = {**recipe.search.settings(), **recipe.sampling.settings()}
    flying: dict[int, tuple[Job, int]] = {}
    queue = iter(todo)
    more = True
    while more or flying:
        while more and len(flying) < recipe.run.batch_size:
            item = next(queue, None)
            if item is None:
                more = False
                break
            job, index = item
            try:
                request = model.request(job.prompt, recipe.search.method, seed=recipe.run.seed, index=index, trace=trace, **settings)
                flying[searcher.add(request)] = item
            except IVGError as e:
                if len(todo) == recipe.run.n:
                    raise
                failures.append(f"{job.place}: {' - '.join(x.strip() for x in str(e).splitlines())}")
        for step in searcher.step():
            if step.completion is None:
                continue
            job, index = flying.pop(step.request)
            if step.completion.error:
                failures.append(f"{job.place}: {step.completion.error}")
            else:
                yield job, index, step.completion


def read_jobs(source: Path, failures: list[str]) -> Iterator[Job]:
    """Rows of a JSONL file; a row that cannot be read is reported with its line number."""
    try:
        lines = sys.stdin.readlines() if str(source) == "-" else source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {source}: {e}\n  expected JSONL") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["messages"] if "messages" in row else row["prompt"]
            if not isinstance(prompt, str):
                prompt = [{"role": str(m["role"]), "content": str(m["content"])} for m in prompt]
        except (ValueError, TypeError, KeyError):
            shown = line.strip()[:60]
            failures.append(f'{source}, line {number}: expected {{"id": …, "prompt": "…"}} or "messages", got {shown}')
            continue
        yield Job(row.get("id", number), prompt, number)


def _answered(output: Path) -> set[tuple[str, int]]:
    """(id, sample number) of the rows that ``output`` holds; half a line at its end is cut off."""
    if not output.exists():
        return set()
    raw = output.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        output.write_bytes(whole)
    out = set()
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            out.add((_key(row["id"]), row.get("index", 0)))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{output} holds rows that ivg did not write\n  give another --output") from None
    return out


def _key(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _write(sink: TextIO | None, recipe: Recipe, job: Job, index: int, completion: Completion, *, many: bool) -> None:
    if sink is None:
        from ivg.cli.screen import show

        show(_shown(job.prompt), completion, recipe.search.method, many=many)
        return
    row = {"id": job.id, "prompt": job.prompt, **completion.to_dict(), "method": recipe.search.method, "seed": recipe.run.seed}
    row |= {"index": index, "settings": {**recipe.search.settings(), **recipe.sampling.settings()}}
    sink.write(json.dumps(row, ensure_ascii=False) + "\n")
    sink.flush()
