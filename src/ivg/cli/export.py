"""``ivg export``: base and guides as one directory that vLLM loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ivg.cli.options import command
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.settings.recipe import Recipe

HELP = """Write a composite model for vLLM: base and guides, weights by reference.

Requests say how much they are guided: {"vllm_xargs": {"ivg_beta": 0.5}}. Without models: the embedded ones.
See docs/how-to/vllm.md.

    ivg export --base meta-llama/Llama-3.1-8B --tuned PATH --untuned PATH --out composite

    vllm serve composite --logits-processors ivg.engines.vllm.processor:IVGBeta
"""


@command(recipe=RecipeOptions("models", only={"models": ("base", "tuned", "untuned", "value", "arm")}))
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; one that holds another model is left alone.")],
    guides: Annotated[
        str | None,
        typer.Option("--guides", help="Values that guide tokens, NAME,NAME … (default: all pairs and arms; ivg_beta is the first's)"),
    ] = None,
    beta: Annotated[float, typer.Option("--beta", help="Weight of the first guide where a request names none.")] = 1.0,
    *,
    recipe: Recipe,
) -> None:
    """See HELP."""
    from ivg.engines.vllm.export import export_composite as write
    from ivg.factory.engines import inner_guides
    from ivg.factory.recipe import load_options

    if not math.isfinite(beta):
        raise ConfigError(f"beta must be finite, got {beta}")
    if guides is not None:
        recipe = recipe.override(vllm={"guides": [name.strip() for name in guides.split(",")]})
    reference, chosen = inner_guides(recipe, load_options(recipe), every_guide=True)
    if not chosen:
        raise ConfigError("got no model that guides\n  give --tuned and --untuned, or --arm, or --value with --guides explicit")
    write(reference, chosen, out, betas={chosen[0].name: beta}, options=load_options(recipe).of(reference))
    names = ", ".join(f"{guide.name} ({' - '.join(part for part, _, _ in guide.parts)})" for guide in chosen)
    for note in _dropped(out):
        typer.echo(note, err=True)
    typer.echo(f"{out}: base with {names}\nserve it: vllm serve {out} --logits-processors ivg.engines.vllm.processor:IVGBeta")


def _dropped(folder: Path) -> list[str]:
    """A line for what generation_config.json sets and vLLM's own server leaves out without a word."""
    from ivg.models.generation_config import SERVED_BY_VLLM, generation_defaults, read_generation_config

    found = generation_defaults(read_generation_config(folder))
    names = sorted({*found.settings, *found.refused} - SERVED_BY_VLLM)
    return [f"note: generation_config.json sets {', '.join(names)}, which vLLM's own server does not apply"] if names else []
