"""The table of ``ivg check``: how the models of a recipe fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ivg.cli.printing import plain_table, say

if TYPE_CHECKING:
    from ivg.model import GuidedModel


def show_models(out: Console, model: GuidedModel) -> bool:
    """Print how the models fit together; True when the tokens of all that guide over the whole vocabulary are the base's."""
    from ivg.diagnostics.compatibility import compare_vocabularies, models_of
    from ivg.models.vocabulary import difference

    table = plain_table("model", "tokens", "context", "chat template", "vocabulary")
    base = model.reader
    table.add_row("base", str(len(base.vocabulary.pieces)), str(base.max_positions), _yes(base.tokenizer.chat_template), "")
    guides = {reader for value in model.values.values() if value.full_vocabulary() for reader in value.cached_lms()}
    fine, notes = True, []
    for lm in models_of(model.values).values():
        c = compare_vocabularies(base, lm)
        words = "same as base" if c.same_vocabulary else f"{c.different} ids differ: guides by text (--guide-candidates), selects by text"
        table.add_row(c.name, str(c.tokens), str(c.context), _yes(c.chat_template), words)
        notes += [difference(i, piece, other, base.vocabulary.owner, c.name) for i, piece, other in c.examples]
        fine = fine and (c.same_vocabulary or lm not in guides)
    out.print(table)
    for note in notes:
        out.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    _say_generation_config(out, model)
    return fine


def _say_generation_config(out: Console, model: GuidedModel) -> None:
    """Say what the base's generation_config.json sets, and what of it does not apply."""
    if model.generation_config:
        listed = ", ".join(f"{name}={value!r}" for name, value in model.generation_config.items())
        say(out, f"generation_config.json of the base sets: {listed}")
    for name, why in model.generation_config_left_out.items():
        say(out, f"generation_config.json of the base: {name} does not apply ({why})")


def _yes(value: object) -> str:
    return "yes" if value else "no"
