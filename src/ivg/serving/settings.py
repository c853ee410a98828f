"""Settings of the server: address, API keys, limits; the table ``[serve]`` of a recipe. Needs no web framework."""

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
        host: address to listen on.
        port: port to listen on; 0: any free one.
        name: model name of the base; None: ``embedded``, or the last part of the base's path.
        api_keys: accepted API keys; none: no key is required.
        max_beams: maximum number of beams of all running requests together.
        max_hypotheses: upper limit of W·K of one request.
        max_chunk_length: upper limit of ``chunk_length``.
        max_candidates: upper limit of ``candidates``.
        max_tokens: upper limit of ``max_tokens``; None: the context length. The default where a client gives none is
            ``max_new_tokens`` of the recipe's sampling.
        max_n: maximum number of completions of one request, over all its prompts.
        max_body_bytes: maximum size of a request body.
        queue_limit: maximum number of completions waiting to be scheduled.
        deadline: seconds until a request fails.
        drain: seconds that running requests get to finish after SIGTERM.
        strict: refuse fields that do not change the response, instead of ignoring them.
        keep_alive: seconds an idle connection is kept open; more than a load balancer in front keeps its own.
        max_connections: maximum number of open connections; None: as the limit of open files allows.
        cors_origins: web origins that may send requests from a browser.
        log_prompts: write prompts to the log.
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
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(k) < 8 or not k.isascii() or any(c.isspace() for c in k) for k in keys):
            raise ValueError("an API key has at least 8 ASCII characters and no white space")
        return keys

    @classmethod
    def of(cls, table: dict[str, Any], **given: Any) -> ServeSettings:
        """A recipe's table, with ``given`` (where not None) in place of its values.

        Raises:
            ConfigError: unknown keys or unusable values.
        """
        try:
            return cls.model_validate(table | {k: v for k, v in given.items() if v is not None})
        except ValidationError as e:
            errors = e.errors()
            unknown = any(error["type"] == "extra_forbidden" for error in errors)
            hint = f"\n  expected some of: {', '.join(cls.model_fields)}" if unknown else ""
            raise ConfigError(f"serve: {'; '.join(map(_message, errors))}{hint}") from None


def _message(error: Any) -> str:
    """One of pydantic's errors in words; API keys are not shown."""
    field, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown setting {field}"
    if message.startswith(field):  # by a rule of ``ivg.settings``, which says what it got
        return message
    got = "" if field.startswith("api_keys") else f", got {error['input']!r}"
    return f"{field}: {message[:1].lower()}{message[1:]}{got}"


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
