"""The embedded models: small film-review models that make every example run from nothing, and guides of SmolLM2. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ivg.errors import ConfigError

ASSETS = Path(__file__).parent
"""Where the package keeps them."""

PREFIX = "embedded:"
"""``embedded:base`` stands for the embedded model of that name wherever a model is named."""
DEFAULTS = ("base", "tuned", "untuned", "value", "value-other")
"""What answers and guides where no models are named (``GuidedModel.embedded``)."""


def names() -> list[str]:
    """What is embedded."""
    return sorted(p.name for p in ASSETS.iterdir() if _is_model(p))


def path(name: str) -> Path:
    """Directory of one embedded model in hub layout, or adapter as PEFT writes it.

    Raises:
        ConfigError: no such model.
    """
    folder = ASSETS / name
    if not _is_model(folder):
        raise ConfigError(f"no embedded model {name!r}\n  expected one of: {', '.join(names()) or 'none: this copy ships no models'}")
    return folder


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
