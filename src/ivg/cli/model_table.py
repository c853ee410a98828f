"""The table of ``ivg check``: how the models of a recipe fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ivg.cli.printing import say
from ivg.utils.console import plain_table, print_table

if TYPE_CHECKING:
    from ivg.diagnostics.compatibility import Compatibility
    from ivg.model import GuidedModel


@dataclass(frozen=True)
class ModelsReport:
    """How the models of a recipe fit together.

    Attributes:
        base: size of its vocabulary, context in tokens, chat template.
        models: behind the values, against the base.
        notes: the first tokens that differ, in words.
        fits: the tokens of all that guide over the whole vocabulary are the base's.
        generation_config: what the base's generation_config.json sets.
        left_out: what of it does not apply, and why.
    """

    base: tuple[int, int | None, bool]
    models: tuple[Compatibility, ...]
    notes: tuple[str, ...]
    fits: bool
    generation_config: Mapping[str, Any]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        tokens, context, template = self.base
        base = {"name": "base", "tokens": tokens, "context": context, "chat_template": template}
        rows = [{**asdict(c), "same_vocabulary": c.same_vocabulary} for c in self.models]
        config = {"generation_config": dict(self.generation_config), "generation_config_left_out": dict(self.left_out)}
        return {"fits": self.fits, "models": [base, *rows], **config}


def describe_models(model: GuidedModel) -> ModelsReport:
    """How the models fit together."""
    from ivg.diagnostics.compatibility import compare_vocabularies, models_of
    from ivg.models.vocabulary import difference

    base = model.reader
    guides = {reader for value in model.values.values() if value.full_vocabulary() for reader in value.cached_lms()}
    found = {lm: compare_vocabularies(base, lm) for lm in models_of(model.values).values()}
    notes = [difference(i, piece, other, base.vocabulary.owner, c.name) for c in found.values() for i, piece, other in c.examples]
    return ModelsReport(
        (len(base.vocabulary.pieces), base.max_positions, bool(base.tokenizer.chat_template)),
        tuple(found.values()),
        tuple(notes),
        all(c.same_vocabulary or lm not in guides for lm, c in found.items()),
        model.generation_config,
        model.generation_config_left_out,
    )


def show_models(out: Console, found: ModelsReport, *, quiet: bool = False) -> None:
    """Print the table, and unless ``quiet`` the notes."""
    table = plain_table("model", "tokens", "context", "chat template", "vocabulary")
    tokens, context, template = found.base
    table.add_row("base", str(tokens), str(context), _yes(template), "")
    for c in found.models:
        words = "same as base" if c.same_vocabulary else f"{c.different} ids differ: guides by text (--guide-candidates), selects by text"
        table.add_row(c.name, str(c.tokens), str(c.context), _yes(c.chat_template), words)
    print_table(table, out)
    if quiet:
        return
    for note in found.notes:
        out.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    if found.generation_config:
        listed = ", ".join(f"{name}={value!r}" for name, value in found.generation_config.items())
        say(out, f"generation_config.json of the base sets: {listed}")
    for name, why in found.left_out.items():
        say(out, f"generation_config.json of the base: {name} does not apply ({why})")


def _yes(value: object) -> str:
    return "yes" if value else "no"
