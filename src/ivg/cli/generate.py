"""``ivg generate``: prompts from the command line or a JSONL file, answers on the screen or in a JSONL file."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError, PromptError
from ivg.prompts import Prompt

if TYPE_CHECKING:
    from ivg.cluster.settings import ClusterSettings
    from ivg.config import Recipe
    from ivg.types import Completion

_CLUSTER = "Many machines (docs/scaling.md)"
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Share prompts out over Ray: local, auto, HOST:PORT or ray://HOST:PORT.", rich_help_panel=_CLUSTER),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Copies of the models. (default: as many as there is room for)", rich_help_panel=_CLUSTER)
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", help="vllm splits its models over them. (default: 1 if there are any)", rich_help_panel=_CLUSTER),
]
Cpus = Annotated[
    float | None, typer.Option("--cpus-per-worker", help="(default: 1 beside GPUs, else all of a node's)", rich_help_panel=_CLUSTER)
]

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
    gate: o.Gate = None,
    draft: o.Draft = None,
    weights: o.Weights = None,
    select_weights: o.SelectWeights = None,
    decay: o.Decay = None,
    settings: o.Settings = None,
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
    engine: o.Engine = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    cpus_per_worker: Cpus = None,
) -> None:
    """See HELP."""
    from ivg.cluster.settings import ClusterSettings

    given = o.recipe_of(recipe, template, locals())
    cluster = ClusterSettings.of(ray, workers, gpus_per_worker, cpus_per_worker)
    if bool(prompts) == bool(input):
        raise ConfigError("give prompts, or --input FILE (exactly one of the two)")
    _check_method(given)
    run(given, prompts or [], input, output, trace, cluster)


def _check_method(recipe: Recipe) -> None:
    """Before any model is loaded: does the method exist, are its settings possible?"""
    from ivg.decoding.strategies import strategy

    strategy(recipe.search.method, **recipe.search.settings())


def run(
    recipe: Recipe,
    prompts: list[str],
    source: Path | None,
    output: Path | None,
    trace: Path | None,
    cluster: ClusterSettings | None = None,
) -> None:
    """Answer every prompt that is not answered yet; what cannot be answered is reported, the others are done."""
    from ivg.cli.progress import progress, report

    failures: list[str] = []

    def fail(message: str) -> None:
        if message not in failures:  # a prompt that is asked for several times is reported once
            failures.append(message)
            report(message)

    jobs = [Job(i, p) for i, p in enumerate(prompts)] if source is None else list(read_jobs(source, fail))
    done = answered(output, recipe) if output else set()
    todo = [(job, k) for job in jobs for k in range(recipe.run.n) if (_key(job.id), k) not in done]
    kept: list[tuple[str, Completion]] = []
    sink = _open(output) if output else None
    count = 0
    try:
        with progress(len(todo), "answers") as advance:
            for job, index, completion in _answers(recipe, todo, fail, cluster, trace=trace is not None):
                _write(sink, recipe, job, index, completion, many=len(todo) > 1)
                if trace is not None:
                    kept.append((_shown(job.prompt), completion))
                count += 1
                advance()
    finally:
        if sink:
            sink.close()
        if trace is not None and kept:
            from ivg.cli.trace import write_trace

            write_trace(trace, kept, recipe.search.method)
    if failures:
        raise typer.Exit(1 if count or done else 2)


def _answers(
    recipe: Recipe, todo: list[tuple[Job, int]], fail: Callable[[str], None], cluster: ClusterSettings | None, *, trace: bool
) -> Iterator[tuple[Job, int, Completion]]:
    if cluster is None:
        return answers(recipe, todo, fail, trace=trace)
    from ivg.cluster import driver

    return driver.answers(recipe, todo, fail, cluster, trace=trace)


def answers(
    recipe: Recipe, todo: list[tuple[Job, int]], fail: Callable[[str], None], *, trace: bool
) -> Iterator[tuple[Job, int, Completion]]:
    """(job, sample number, completion) as each is done; ``batch_size`` requests in flight at any time."""
    from ivg.build import load_models

    if not todo:
        return
    model = load_models(recipe)
    searcher = model.searcher(max_beams=1 << 30)
    settings = {**recipe.search.settings(), **recipe.sampling.settings()}
    flying: dict[int, tuple[Job, int]] = {}
    queue = deque(todo)
    while queue or flying:
        while queue and len(flying) < recipe.run.batch_size:
            job, index = queue.popleft()
            try:
                request = model.request(job.prompt, recipe.search.method, seed=recipe.run.seed, index=index, trace=trace, **settings)
                flying[searcher.add(request)] = job, index
            except PromptError as e:  # what is wrong with the method or the models is wrong for all
                fail(f"{job.place}: {e}")
        for step in searcher.step():
            if step.completion is None:
                continue
            job, index = flying.pop(step.request)
            if step.completion.error:
                fail(f"{job.place}: {step.completion.error}")
            else:
                yield job, index, step.completion


def read_jobs(source: Path, fail: Callable[[str], None]) -> Iterator[Job]:
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
            prompt = Prompt.of(prompt).plain
        except PromptError as e:
            fail(f"{source}, line {number}: {e}")
            continue
        except (ValueError, TypeError, KeyError):
            shown = line.strip()[:60]
            fail(f'{source}, line {number}: expected {{"id": …, "prompt": "…"}} or "messages", got {shown}')
            continue
        yield Job(row.get("id", number), prompt, number)


def answered(output: Path, recipe: Recipe) -> set[tuple[str, int]]:
    """(id, sample number) of the rows that ``output`` holds; half a line at its end is cut off.

    Raises:
        ConfigError: its rows are not ours, or were made with another method, seed or settings.
    """
    if not output.exists():
        return set()
    raw = output.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        output.write_bytes(whole)
    out, wanted = set(), _provenance(recipe)
    for line in whole.splitlines():
        try:
            row = json.loads(line)
            found = {k: row[k] if k in _ALWAYS else row.get(k) for k in (*_ALWAYS, *_SOMETIMES) if k in row or k in wanted or k in _ALWAYS}
            out.add((_key(row["id"]), row["index"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{output} holds rows that ivg did not write\n  give another --output") from None
        if found != wanted:
            raise ConfigError(f"{output} holds answers made with {found}\n  this run has {wanted}; give another --output")
    return out


_ALWAYS, _SOMETIMES = ("method", "seed", "settings", "models"), ("engine", "endpoint", "values")
"""What every row says it was made with, and what only some say."""


def _provenance(recipe: Recipe) -> dict[str, Any]:
    """What an answer depends on, as it stands in every row."""
    settings = {**recipe.search.settings(), **recipe.sampling.settings()}
    models = {role: ref.path for role, ref in recipe.models.given.items()} or "embedded"
    out = {"method": recipe.search.method, "seed": recipe.run.seed, "settings": settings, "models": models}
    if recipe.run.engine != "transformers":
        out["engine"] = recipe.run.engine
    if recipe.run.engine.startswith("http"):
        out["endpoint"] = recipe.endpoint.model
    if recipe.values:
        out["values"] = {name: {role: ref.path for role, ref in value.given.items()} for name, value in recipe.values.items()}
    return out


def _open(output: Path) -> TextIO:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("a", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {output}: {e.strerror}\n  expected a JSONL file in a folder of yours") from None


def _key(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _write(sink: TextIO | None, recipe: Recipe, job: Job, index: int, completion: Completion, *, many: bool) -> None:
    if sink is None:
        from ivg.cli.screen import show

        show(_shown(job.prompt), completion, recipe.search.method, many=many)
        return
    row = {"id": job.id, "prompt": job.prompt, "index": index, **completion.to_dict(), **_provenance(recipe)}
    sink.write(json.dumps(row, ensure_ascii=False) + "\n")
    sink.flush()
