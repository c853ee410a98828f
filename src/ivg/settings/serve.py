"""The settings of ``ivg serve``: address, keys, limits. Needs no web framework."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from ivg.settings import rules as r
from ivg.settings.schema import Setting
from ivg.settings.tables import Table

SERVED_BEAMS = 512
"""Beams of all requests at once, where nothing is said: 32 requests with W = K = 4. A request that waits has no first text."""

_COUNT = r.count(1)
_LISTS = Field(strict=False)
"""TOML has lists where tuples are kept."""


class ServeSettings(Table):
    """What a server allows; the recipe's table ``[serve]``."""

    host: Annotated[str, Setting("Address to listen on; the default is reached from this machine only.", flags=("--host",))] = "127.0.0.1"
    port: Annotated[
        int,
        Setting(
            "Port to listen on; 0: any free one.",
            r.Rule("a whole number", r.whole, "in [0, 65535]", lambda v: 0 <= v <= 65535),
            flags=("--port",),
        ),
    ] = 8000
    name: Annotated[
        tuple[str, ...],
        _LISTS,
        Setting(
            "Model name of the base for clients; may be repeated.", flags=("--name",), unset="embedded, or the last part of the base's path"
        ),
    ] = ()
    api_keys: Annotated[tuple[str, ...], _LISTS, Setting("Accepted API keys; none: no key is required.", secret=True)] = ()
    max_beams: Annotated[
        int, Setting("Maximum number of beams (W*K of each) of all running requests together.", _COUNT, flags=("--max-beams",))
    ] = SERVED_BEAMS
    max_hypotheses: Annotated[int, Setting("Upper limit of W*K of one request.", _COUNT, flags=("--max-hypotheses",))] = 64
    max_chunk_length: Annotated[int, Setting("Upper limit of chunk_length.", _COUNT)] = 512
    max_candidates: Annotated[int, Setting("Upper limit of candidates.", _COUNT)] = 128
    max_tokens: Annotated[
        int | None,
        Setting("Upper limit of max_tokens.", r.count(1, optional=True), flags=("--max-tokens",), unset="the context length"),
    ] = None
    max_n: Annotated[int, Setting("Maximum number of completions of one request, over all its prompts.", _COUNT)] = 64
    max_body_bytes: Annotated[int, Setting("Maximum size of a request body in bytes.", r.count(1024))] = 1 << 20
    queue_limit: Annotated[int, Setting("Maximum number of completions waiting to be scheduled.", _COUNT, flags=("--queue-limit",))] = 128
    deadline: Annotated[float, Setting("Seconds until a request fails.", r.POSITIVE, flags=("--deadline",))] = 600.0
    drain: Annotated[
        float, Setting("Seconds that running requests get to finish after SIGTERM.", r.number("at least 0", 0), flags=("--drain",))
    ] = 30.0
    strict: Annotated[bool, Setting("Refuse fields that do not change the response, instead of ignoring them.", flags=("--strict",))] = (
        False
    )
    keep_alive: Annotated[
        int,
        Setting(
            "Seconds an idle connection is kept open; more than a load balancer in front keeps its own.", _COUNT, flags=("--keep-alive",)
        ),
    ] = 75
    max_connections: Annotated[
        int | None,
        Setting(
            "Maximum number of open connections.",
            r.count(1, optional=True),
            flags=("--max-connections",),
            unset="as the limit of open files allows",
        ),
    ] = None
    cors_origins: Annotated[
        tuple[str, ...], _LISTS, Setting("Web origin that may send requests from a browser; may be repeated.", flags=("--cors-origin",))
    ] = ()
    tool_call_parser: Annotated[
        str | None,
        Setting(
            "How the base writes calls of tools: hermes, llama3_json, mistral (as in vLLM), or none.",
            r.choice("hermes", "llama3_json", "mistral", "none", optional=True),
            flags=("--tool-call-parser",),
            unset="as its chat template does",
        ),
    ] = None
    log_prompts: Annotated[bool, Setting("Write prompts to the log.", flags=("--log-prompts",))] = False

    @field_validator("name", mode="before")
    @classmethod
    def _one_or_more(cls, name: Any) -> Any:
        return (name,) if isinstance(name, str) else () if name is None else name

    @field_validator("name")
    @classmethod
    def _has_no_colon(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name or ":" in name or any(c.isspace() for c in name) for name in names):
            raise ValueError("a name has no colon and no white space")
        if len(set(names)) < len(names):
            raise ValueError("the same name twice")
        return names

    @field_validator("api_keys")
    @classmethod
    def _usable(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(k) < 8 or not k.isascii() or any(c.isspace() for c in k) for k in keys):
            raise ValueError("an API key has at least 8 ASCII characters and no white space")
        return keys
