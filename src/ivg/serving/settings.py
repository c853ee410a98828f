"""What a server allows: address, keys, ceilings. Knows nothing of HTTP frameworks; the recipe's table ``[serve]`` has these fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ivg.errors import ConfigError

KEYS_VARIABLE = "IVG_API_KEYS"
"""Environment variable with keys, separated by commas or white space."""


class ServeSettings(BaseModel):
    """Settings of ``ivg serve``.

    Attributes:
        host: address to listen at; the default is reached from this machine only.
        port: 0: any free one.
        name: how clients call the base model; None: ``embedded``, or the last part of the base's path.
        api_keys: any of these opens the server; none: no key is asked for.
        max_beams: hypotheses in flight at most, over all requests.
        max_hypotheses: W·K of one request at most.
        max_chunk_length: L at most, where one is given.
        max_candidates: tokens that a value re-scores at each place, at most.
        max_tokens: of one answer; None: as many as the context has room for. How many an answer has whose client does not say is
            ``max_new_tokens`` of the recipe's sampling, and without that, as many again.
        max_n: answers of one request, over all its prompts.
        max_body_bytes: of one request.
        queue_limit: answers that may wait for their turn.
        deadline: seconds that one request may take.
        drain: seconds that requests on their way get when the server is told to stop.
        strict: refuse fields of bodies that change no answer, instead of ignoring them.
        keep_alive: seconds of idle time between the requests of a connection; longer than proxies before this server keep theirs.
        max_connections: open at once, at most; None: as many as the limit of open files leaves room for.
        cors_origins: web origins that may ask from a browser; none by default.
        log_prompts: write prompts to the log. Off: no text of anybody is written anywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    name: str | None = Field(None, pattern=r"^[^:\s]+$")
    api_keys: tuple[str, ...] = ()
    max_beams: int = Field(256, ge=1)
    max_hypotheses: int = Field(64, ge=1)
    max_chunk_length: int = Field(512, ge=1)
    max_candidates: int = Field(128, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_n: int = Field(64, ge=1)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    queue_limit: int = Field(128, ge=1)
    deadline: float = Field(600.0, gt=0)
    drain: float = Field(30.0, ge=0)
    strict: bool = False
    keep_alive: int = Field(75, ge=1)
    max_connections: int | None = Field(None, ge=1)
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False

    @field_validator("api_keys")
    @classmethod
    def _usable(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(k) < 8 or not k.isascii() or any(c.isspace() for c in k) for k in keys):
            raise ValueError("an API key has at least 8 ASCII characters and no white space")
        return keys

    @classmethod
    def of(cls, table: dict[str, Any], **given: Any) -> ServeSettings:
        """A recipe's table with what else was given (not None) over it.

        Raises:
            ConfigError: unknown keys or unusable values.
        """
        try:
            return cls.model_validate(table | {k: v for k, v in given.items() if v is not None})
        except ValidationError as e:
            shown = "; ".join(map(_explain, e.errors()))
            raise ConfigError(f"serve: {shown}\n  expected some of: {', '.join(cls.model_fields)}") from None


def _explain(error: Any) -> str:
    """Without what was got: it may be a key."""
    where = ".".join(map(str, error["loc"]))
    return f"unknown setting {where}" if error["type"] == "extra_forbidden" else f"{where}: {error['msg'].lower()}"


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
