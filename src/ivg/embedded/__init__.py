"""The embedded models: small film-review models that make every example run from nothing. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ivg.errors import ConfigError

ASSETS = Path(__file__).parent
"""Where the package keeps them."""


PREFIX = "embedded:"
"""``embedded:base`` stands for the embedded model of that name wherever a model is named."""


def names() -> list[str]:
    """What is embedded."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def path(name: str) -> Path:
    """Directory of one embedded model, in hub layout.

    Raises:
        ConfigError: no such model.
    """
    folder = ASSETS / name
    if not (folder / "config.json").exists():
        raise ConfigError(f"no embedded model {name!r}\n  expected one of: {', '.join(names()) or 'none: this copy ships no models'}")
    return folder
