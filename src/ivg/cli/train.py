"""``ivg train``: the guide pair, the reward model, rollouts and values. Thin over ``ivg.training`` (extra ``train``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli import options as o
from ivg.cli import train_options as t
from ivg.errors import ConfigError

if TYPE_CHECKING:
    from ivg.settings.recipe import Recipe

HELP = "Train what steers: pair (sft, dpo), reward model, rollouts, value. Needs: pip install 'ivg\\[train]'."

app = typer.Typer(name="train", help=HELP, no_args_is_help=True)


@contextmanager
def extra(folder: Path | None = None) -> Iterator[None]:
    """A missing package of the extra in plain words; ``folder``: of the run, which no other process may write meanwhile."""
    from ivg.utils.locks import lock_file

    try:
        with lock_file(folder) if folder is not None and int(os.environ.get("RANK", "0")) == 0 else nullcontext():
            yield
    except ModuleNotFoundError as e:
        if e.name not in ("trl", "peft", "accelerate", "datasets", "pyarrow"):
            raise
        raise ConfigError(f"training needs {e.name}\n  pip install 'ivg[train]'") from None


@app.command("sft", help="Supervised fine-tuning (TRL): a base, or the untuned guide of a pair.")
def sft(
    model: t.Model, data: t.Data, out: t.Out,
    loss: Annotated[str, typer.Option("--loss", help="On the tokens of the response, or on all.")] = "response",
    split: t.Split = "train", limit: t.Limit = None, format: t.Format = None, failed: t.Failed = None,
    columns: t.Columns = None, prompt_format: t.PromptFormat = None,
    response_format: t.ResponseFormat = None, template: t.Template = None, mode: t.Mode = "full", lora_rank: t.LoraRank = 16,
    epochs: t.Epochs = 1.0, lr: t.LearningRate = None, batch_size: t.Batch = 8, accumulate: t.Accumulate = 4,
    max_length: t.MaxLength = 1024, warmup: t.Warmup = 0.1, weight_decay: t.WeightDecay = 0.0,
    eval_share: t.EvalShare = 0.05, evaluations: t.EvalTimes = 4,
    save_steps: t.SaveSteps = 200, seed: t.Seed = 0, report_to: t.ReportTo = "none", set: t.Set = None, push_to: t.PushTo = None,
    trust_remote_code: t.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """See the command's help."""
    given = dict(locals())
    with extra(out):
        from ivg.training import tune
        from ivg.training.data import read_sft_examples

        rows = t.read(read_sft_examples, data, given)
        t.finish(out, tune.sft(model, rows, out, t.options_of(given, lr=2e-5), sources=data, loss=loss), push_to)


@app.command("dpo", help="The tuned guide by direct preference optimisation (TRL), from preferences or rated rollouts.")
def dpo(
    model: t.Model, data: t.Data, out: t.Out,
    beta: Annotated[float, typer.Option("--beta", help="Strength of DPO's KL term.")] = 0.1,
    split: t.Split = "train", limit: t.Limit = None, format: t.Format = None, failed: t.Failed = None,
    columns: t.Columns = None, prompt_format: t.PromptFormat = None,
    response_format: t.ResponseFormat = None, template: t.Template = None, mode: t.Mode = "full", lora_rank: t.LoraRank = 16,
    epochs: t.Epochs = 1.0, lr: t.LearningRate = None, batch_size: t.Batch = 8, accumulate: t.Accumulate = 4,
    max_length: t.MaxLength = 1024, warmup: t.Warmup = 0.1, weight_decay: t.WeightDecay = 0.0,
    eval_share: t.EvalShare = 0.05, evaluations: t.EvalTimes = 4,
    save_steps: t.SaveSteps = 200, seed: t.Seed = 0, report_to: t.ReportTo = "none", set: t.Set = None, push_to: t.PushTo = None,
    trust_remote_code: t.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """See the command's help."""
    given = dict(locals())
    with extra(out):
        from ivg.training import tune
        from ivg.training.data import read_preferences

        rows = t.read(read_preferences, data, given, seed=seed)
        t.finish(out, tune.dpo(model, rows, out, t.options_of(given, lr=5e-6), sources=data, beta=beta), push_to)


@app.command("reward", help="A reward model by Bradley and Terry (TRL), from preferences or rated rollouts.")
def reward(
    model: t.Model, data: t.Data, out: t.Out,
    split: t.Split = "train", limit: t.Limit = None, format: t.Format = None, failed: t.Failed = None,
    columns: t.Columns = None, prompt_format: t.PromptFormat = None,
    response_format: t.ResponseFormat = None, template: t.Template = None, mode: t.Mode = "full", lora_rank: t.LoraRank = 16,
    epochs: t.Epochs = 1.0, lr: t.LearningRate = None, batch_size: t.Batch = 8, accumulate: t.Accumulate = 4,
    max_length: t.MaxLength = 1024, warmup: t.Warmup = 0.1, weight_decay: t.WeightDecay = 0.0,
    eval_share: t.EvalShare = 0.05, evaluations: t.EvalTimes = 4,
    save_steps: t.SaveSteps = 200, seed: t.Seed = 0, report_to: t.ReportTo = "none", set: t.Set = None, push_to: t.PushTo = None,
    trust_remote_code: t.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """See the command's help."""
    given = dict(locals())
    with extra(out):
        from ivg.training import tune
        from ivg.training.data import read_preferences

        rows = t.read(read_preferences, data, given, seed=seed)
        t.finish(out, tune.reward(model, rows, out, t.options_of(given, lr=2e-5), sources=data), push_to)


@app.command("rollout", help="Sample responses by any method and score them: the data of values and of pairs. Resumable.")
def rollout(
    prompts: Annotated[list[str], typer.Option("--prompts", help="Rows (docs/reference/data.md): a file, folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .jsonl or .parquet.")],
    samples: Annotated[int, typer.Option("--samples", help="Responses for each prompt.")] = 4,
    reward: o.Reward = None,
    split: t.Split = "train", limit: t.Limit = None, format: t.Format = None, failed: t.Failed = None,
    columns: t.Columns = None, prompt_format: t.PromptFormat = None,
    recipe: o.RecipeFile = None, method: Annotated[str, typer.Option("--method", "-m", help="base, or any guided method.")] = "base",
    base: o.Base = None, tuned: o.Tuned = None, untuned: o.Untuned = None, value: o.ValuePath = None, template: o.Template = None,
    width: o.Width = None, successors: o.Successors = None, chunk_length: o.ChunkLength = None, beta: o.Beta = None,
    token: o.Token = None, select: o.Select = None, temperature: o.Temperature = None, top_k: o.TopK = None, top_p: o.TopP = None,
    max_new_tokens: o.MaxNewTokens = None, stop: o.Stop = None, ignore_eos: o.IgnoreEos = None, seed: o.Seed = None,
    device: o.Device = None, dtype: o.Dtype = None,
) -> None:  # fmt: skip
    """See the command's help."""
    given = dict(locals())
    made = o.recipe_of(recipe, template, given)
    if samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {samples}")
    from ivg.utils.jsonl import read_jsonl

    with extra():
        from ivg.cli.progress import progress
        from ivg.factory.recipe import load_models
        from ivg.jobs.provenance import answer_provenance, device_kind
        from ivg.training import rollout as r
        from ivg.training.data import read_prompts

        wanted = t.read(read_prompts, prompts, given)
        found = scorer(made)
        about = answer_provenance(made, device_kind(made.run.device))
        provenance = {k: v for k, v in about.items() if k not in ("method", "settings", "seed")}
        settings = {**made.search.settings(), **made.sampling.settings()}
        with progress(-(-len(wanted) // r.BLOCK), f"blocks of {r.BLOCK} prompts") as advance:
            r.rollout(
                load_models(_without_scorer(made)), wanted, out, found, method=made.search.method, samples=samples, seed=made.run.seed,
                provenance=provenance, on_progress=advance, **settings,
            )  # fmt: skip
    _close(out, [row.get("error") for row in read_jsonl(out.with_suffix(".jsonl"))])


def _close(out: Path, errors: Sequence[str | None]) -> None:
    """Say how many responses failed (each has its error, or None) and why; the exit code of ``ivg generate``."""
    from ivg.cli.progress import report
    from ivg.jobs.failures import MOST

    kinds = Counter(error for error in errors if error)
    for why, count in kinds.most_common(MOST):
        report(f"{out}: {count} of {len(errors)} responses failed: {why}")
    if len(kinds) > MOST:
        report(f"{out}: {len(kinds) - MOST} more reasons; each failed row names its own")
    failed = kinds.total()
    typer.echo(f"done: {out}: answered {len(errors) - failed}, failed {failed}", err=True)
    if failed:
        raise typer.Exit(1 if failed < len(errors) else 2)


def _without_scorer(recipe: Recipe) -> Recipe:
    """The recipe without its reward model, which scores what was sampled, unless the method itself uses it."""
    from ivg.search.methods import get_method

    if "reward" in get_method(recipe.search.method, **recipe.search.settings()).needs:
        return recipe
    return recipe.model_copy(update={"models": recipe.models.model_copy(update={"reward": None})})


def scorer(recipe: Recipe) -> Any:
    """The recipe's reward.

    Raises:
        ConfigError: there is none.
    """
    from ivg.factory.recipe import load_options
    from ivg.values.reward import load_reward

    found = recipe.models.reward
    if found is None:
        raise ConfigError("rollouts need a score\n  give --reward MODEL, or --reward file.py:function")
    return load_reward(found.path, template=found.template, options=load_options(recipe))


@app.command("value", help="An explicit value: vocabulary or scalar head, FUDGE, TD(λ), CD-Q or binary targets, refinement rounds.")
def value(
    model: t.Model, data: t.Data, out: t.Out,
    head: Annotated[str, typer.Option("--head", help="vocabulary (guides every token too), or scalar.")] = "vocabulary",
    target: Annotated[str, typer.Option("--target", help="fudge, td, cd-q, or binary.")] = "fudge",
    lam: Annotated[float, typer.Option("--lambda", help="λ of td.")] = 0.95,
    scale: Annotated[float, typer.Option("--scale", help="Rewards are multiplied by this.")] = 1.0,
    factored: Annotated[bool, typer.Option("--factored/--plain", help="Train a vocabulary head in shared parts.")] = True,
    base: Annotated[str | None, typer.Option("--base", help="The policy: of cd-q, and of the rounds.")] = None,
    base_template: Annotated[str | None, typer.Option("--base-template", help="How that policy reads prompts.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Refinement rounds: new rollouts from the value-guided policy.")] = 0,
    method: Annotated[str, typer.Option("--method", "-m", help="How the value guides in these rounds.")] = "cbs-explicit",
    samples: Annotated[int, typer.Option("--samples", help="New responses for each prompt and round.")] = 2,
    reward: o.Reward = None,
    width: o.Width = None, successors: o.Successors = None, chunk_length: o.ChunkLength = None, beta: o.Beta = None,
    temperature: o.Temperature = None, top_k: o.TopK = None, top_p: o.TopP = None, max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None, ignore_eos: o.IgnoreEos = None, device: o.Device = None, dtype: o.Dtype = None,
    split: t.Split = "train", limit: t.Limit = None, format: t.Format = None, failed: t.Failed = None,
    columns: t.Columns = None, prompt_format: t.PromptFormat = None,
    response_format: t.ResponseFormat = None, template: t.Template = None, mode: t.ValueMode = "full", lora_rank: t.LoraRank = 16,
    epochs: t.Epochs = 2.0, lr: t.LearningRate = None, batch_size: t.Batch = 16, accumulate: t.Accumulate = 4,
    max_length: t.MaxLength = 1024, warmup: t.Warmup = 0.1, weight_decay: t.WeightDecay = 0.02,
    eval_share: t.EvalShare = 0.1, evaluations: t.EvalTimes = 4,
    save_steps: t.SaveSteps = 200, seed: t.Seed = 0, report_to: t.ReportTo = "none", set: t.Set = None, push_to: t.PushTo = None,
    trust_remote_code: t.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """See the command's help."""
    given = dict(locals())
    with extra(out):
        from ivg.settings.train import ValueSettings
        from ivg.training.data import read_rated
        from ivg.training.value import train_value

        rows, options = t.read(read_rated, data, given), t.options_of(given, lr=1e-5)
        wanted = ValueSettings(head, target, lam, scale, factored, base, base_template)  # type: ignore[arg-type]
        if rounds == 0:
            metrics = train_value(model, rows, out, options, wanted, sources=data)
        else:
            metrics = _rounds(model, rows, out, options, wanted, given)
    t.finish(out, metrics, push_to)


def _rounds(model: str, rows: list[Any], out: Path, options: Any, wanted: Any, given: dict[str, Any]) -> dict[str, Any]:
    from ivg.training.refine import refine

    if given["base"] is None:
        raise ConfigError("refinement samples from a policy that the value guides\n  give --base MODEL, and --reward")
    from ivg.factory.recipe import load_options

    names = ("reward", "method", "width", "successors", "chunk_length", "beta", "temperature", "top_k", "top_p", "max_new_tokens", "stop")
    made = o.recipe_of(None, None, {k: given[k] for k in (*names, "ignore_eos", "device", "dtype")})
    settings = {**made.search.settings(), **made.sampling.settings()}
    return refine(
        model, rows, out, options, wanted, base=given["base"], reward=scorer(made), rounds=given["rounds"], method=given["method"],
        samples=given["samples"], sources=given["data"], load=load_options(made), reward_name=given["reward"],
        on_progress=lambda text: typer.echo(text, err=True), **settings,
    )  # fmt: skip
