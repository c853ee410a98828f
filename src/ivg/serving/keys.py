"""API keys of the server, from a file and the environment; :mod:`ivg.settings.serve` has the other settings."""

from __future__ import annotations

import os
from pathlib import Path

from ivg.errors import ConfigError

KEYS_VARIABLE = "IVG_API_KEYS"
"""Environment variable with keys, separated by commas or white space."""


def read_keys(file: Path | None, environment: bool = True) -> tuple[str, ...] | None:
    """Keys from a file (one a line, # begins a comment) and from ``IVG_API_KEYS``; None where neither gives any.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read keys from {file}: {e}\n  expected one key a line") from None
        keys += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"{file} has no key\n  expected one key a line")
    if environment:
        keys += os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()
    return tuple(dict.fromkeys(keys)) or None
