"""``ivg train``: the guide pair, the reward model, rollouts and values. Thin over ``ivg.training`` (extra ``train``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ivg.cli.options import Options, command
from ivg.cli.recipe_options import RecipeOptions
from ivg.cli.train_run import finish, read_comparisons, read_rows, train_extra
from ivg.errors import ConfigError
from ivg.settings.recipe import Recipe
from ivg.settings.train import (
    DataSettings,
    DPOSettings,
    PairSettings,
    RefineSettings,
    RolloutSettings,
    SFTSettings,
    TrainSettings,
    ValueSettings,
    ValueTrainSettings,
)

HELP = "Train a guide pair (sft, dpo), a reward model, and values from rollouts. Needs: pip install 'ivg\\[train]'."

app = typer.Typer(name="train", help=HELP, no_args_is_help=True, add_completion=False)

Model = Annotated[str, typer.Option("--model", help="Model to start from: hub id, directory, or embedded:NAME.")]
Data = Annotated[
    list[str],
    typer.Option("--data", help="Rows (docs/reference/data.md): a file, -, a folder of splits, or a data set on the hub; may be repeated."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run; the same command again resumes it.")]
PushTo = Annotated[str | None, typer.Option("--push-to", help="Upload the finished folder to this repository on the hub.")]

ROWS = Options(DataSettings, "Data")
PAIRS = Options(PairSettings, "Pairs of rated responses")


@app.command("sft", help="Supervised fine-tuning (TRL): a base, or the untuned guide of a pair.")
@command(options=Options(SFTSettings, "Training"), rows=ROWS)
def sft(model: Model, data: Data, out: Out, push_to: PushTo = None, *, options: SFTSettings, rows: DataSettings) -> None:
    """See the command's help."""
    with train_extra():
        from ivg.training import tune
        from ivg.training.data import read_sft_examples

        found = read_rows(read_sft_examples, data, rows)
        finish(out, tune.sft(model, found, out, options, sources=data), options, push_to)


@app.command("dpo", help="The tuned guide by direct preference optimisation (TRL), from preferences or rated responses.")
@command(options=Options(DPOSettings, "Training"), pairs=PAIRS, rows=ROWS)
def dpo(
    model: Model, data: Data, out: Out, push_to: PushTo = None, *, options: DPOSettings, pairs: PairSettings, rows: DataSettings
) -> None:
    """See the command's help."""
    with train_extra():
        from ivg.training import tune

        found = read_comparisons(data, rows, pairs, options)
        finish(out, tune.dpo(model, found, out, options, sources=data), options, push_to)


@app.command("reward", help="A reward model by Bradley and Terry (TRL), from preferences or rated responses.")
@command(options=Options(TrainSettings, "Training"), pairs=PAIRS, rows=ROWS)
def reward(
    model: Model, data: Data, out: Out, push_to: PushTo = None, *, options: TrainSettings, pairs: PairSettings, rows: DataSettings
) -> None:
    """See the command's help."""
    with train_extra():
        from ivg.training import tune

        found = read_comparisons(data, rows, pairs, options)
        finish(out, tune.reward(model, found, out, options, sources=data), options, push_to)


@app.command("rollout", help="Sample responses by any method and score them: the data of values and of pairs. Resumable.")
@command(
    settings=Options(RolloutSettings, "Rollouts"),
    rows=ROWS,
    recipe=RecipeOptions(
        "models",
        "search",
        "sampling",
        "run",
        only={"run": ("seed", "device", "dtype")},
        method="base",
        check_method=True,
        one_answer="ivg train rollout",
    ),
)
def rollout(
    prompts: Annotated[list[str], typer.Option("--prompts", help="Rows (docs/reference/data.md): a file, folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .jsonl or .parquet.")],
    *,
    settings: RolloutSettings,
    rows: DataSettings,
    recipe: Recipe,
) -> None:
    """See the command's help."""
    from ivg.cli.files import check_files
    from ivg.utils.jsonl import read_jsonl

    rollouts = [("--out", out), *([("--out", out.with_suffix(".jsonl"))] if out.suffix != ".jsonl" else [])]
    check_files([("--prompts", source) for source in prompts], [*rollouts, ("--failed", rows.failed)], rows.split)
    with train_extra():
        from ivg.cli.progress import progress
        from ivg.factory.recipe import load_models
        from ivg.jobs.provenance import answer_provenance, device_kind
        from ivg.training import rollout as r
        from ivg.training.data import read_prompts

        wanted = read_rows(read_prompts, prompts, rows)
        found = scorer(recipe)
        about = answer_provenance(recipe, device_kind(recipe))
        provenance = {k: v for k, v in about.items() if k not in ("method", "settings", "seed")}
        request = {**recipe.search.settings(), **recipe.sampling.settings(), "method": recipe.search.method, "seed": recipe.run.seed}
        size = settings.batch_size
        with progress(-(-len(wanted) // size), f"blocks of {size} prompts") as advance:
            model = load_models(_without_scorer(recipe))
            r.rollout(
                model,
                wanted,
                out,
                found,
                samples=settings.samples,
                batch_size=size,
                provenance=provenance,
                on_progress=advance,
                **request,
            )
    _report_failures(out, [row.get("error") for row in read_jsonl(out.with_suffix(".jsonl"))])


def _report_failures(out: Path, errors: Sequence[str | None]) -> None:
    """Say how many responses failed (each has its error, or None) and why; the exit code of ``ivg generate``."""
    from ivg.cli.progress import print_error
    from ivg.jobs.failures import MAX_REPORTED

    kinds = Counter(error for error in errors if error)
    for why, count in kinds.most_common(MAX_REPORTED):
        print_error(f"{out}: {count} of {len(errors)} responses failed: {why}")
    if len(kinds) > MAX_REPORTED:
        print_error(f"{out}: {len(kinds) - MAX_REPORTED} more reasons; each failed row names its own")
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
    from ivg.factory.values import prompt_template
    from ivg.values.reward import load_reward

    found = recipe.models.reward
    if found is None:
        raise ConfigError("rollouts need a score\n  give --reward MODEL, or --reward file.py:function")
    return load_reward(found.path, template=prompt_template(found), options=load_options(recipe).of(found))


_REFINEMENT = {
    "models": ("reward",),
    "search": ("method", "width", "successors", "chunk_length", "beta"),
    "sampling": ("temperature", "top_k", "top_p", "max_new_tokens", "stop", "ignore_eos"),
    "run": ("device", "dtype"),
}


@app.command("value", help="An explicit value: vocabulary or scalar head, FUDGE, TD(λ), CD-Q or binary targets, refinement rounds.")
@command(
    value=Options(ValueSettings, "Value"),
    options=Options(ValueTrainSettings, "Training"),
    rows=ROWS,
    refinement=Options(RefineSettings, "Refinement"),
    recipe=RecipeOptions(only=_REFINEMENT, method="cbs-explicit", bare=True),
)
def value(
    model: Model,
    data: Data,
    out: Out,
    push_to: PushTo = None,
    *,
    value: ValueSettings,
    options: ValueTrainSettings,
    rows: DataSettings,
    refinement: RefineSettings,
    recipe: Recipe,
) -> None:
    """See the command's help."""
    with train_extra():
        from ivg.factory.recipe import load_options
        from ivg.training.data import read_rated
        from ivg.training.refine import refine
        from ivg.training.value import train_value

        found = read_rows(read_rated, data, rows)
        if refinement.rounds == 0:
            metrics = train_value(model, found, out, options, value, sources=data)
        else:
            request = {**recipe.search.settings(), **recipe.sampling.settings()}
            metrics = refine(
                model,
                found,
                out,
                options,
                value,
                replace(refinement, method=recipe.search.method, request=request),
                scorer(recipe),
                sources=data,
                load=load_options(recipe),
                reward_name=recipe.models.reward.path if recipe.models.reward else None,
                on_progress=lambda text: typer.echo(text, err=True),
            )
    finish(out, metrics, options, push_to)
