"""The settings of ``ivg check --preferences``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ivg.errors import ConfigError
from ivg.settings import rules as r
from ivg.settings.rows import RowSettings
from ivg.settings.schema import Setting, validate


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(RowSettings):
    """Which preference pairs are read, and what is measured on them."""

    preferences: Annotated[
        Path | None,
        Setting("Pairs (docs/reference/data.md): prompt, chosen, rejected; - is standard input.", flags=("--preferences",), unset="none"),
    ] = None
    pairs: Annotated[int, Setting("Number of pairs, from the first.", r.count(1, label="--pairs"), flags=("--pairs",))] = 400
    sweep: Annotated[int, Setting("Prompts for which texts are sampled; 0: none.", r.count(0, label="--sweep"), flags=("--sweep",))] = 16
    samples: Annotated[int, Setting("Texts for each prompt and beta.", r.count(2, label="--samples"), flags=("--samples",))] = 4
    betas: Annotated[str, Setting("Guidance weights to try.", flags=("--betas",))] = "0.25,0.5,1,2"
    from_base: Annotated[
        bool, Setting("Sample from the base only, with importance weights: cheaper, good for small betas.", flags=("--from-base",))
    ] = False
    judge: Annotated[
        str | None,
        Setting(
            "What scores sampled texts: reward, explicit, gold (of the recipe) or none.",
            flags=("--judge",),
            unset="gold for the embedded models, else reward, else explicit",
        ),
    ] = None
    output: Annotated[Path | None, Setting("Write all numbers to this file, as JSON.", flags=("--output", "-o"), unset="none")] = None

    def __post_init__(self) -> None:
        validate(self)

    @staticmethod
    def weights_of(betas: str) -> tuple[float, ...]:
        """The numbers of ``betas``.

        Raises:
            ConfigError: something else.
        """
        try:
            return tuple(float(b) for b in betas.split(","))
        except ValueError:
            raise ConfigError(f"--betas {betas!r}\n  expected numbers with commas between them, e.g. 0.25,0.5,1,2") from None

    @classmethod
    def of(cls, **given: object) -> PreferenceSettings:
        """From options.

        Raises:
            ConfigError: settings of preferences, but no preferences.
        """
        if "preferences" not in given and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{names} needs preferences\n  give --preferences FILE too")
        return cls(**given)  # type: ignore[arg-type]
