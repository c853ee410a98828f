"""Settings that a request has besides those of search and sampling. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ivg.settings import rules as r
from ivg.settings.schema import Setting, validate


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """Settings of one request, besides those of search and sampling (``ivg.search.request.Request``)."""

    seed: Annotated[int, Setting("Random seed.", r.SEED)] = 0
    index: Annotated[int, Setting("Number of the response to this prompt; part of the seed of its draws.", r.count(0, most=1 << 62))] = 0
    trace: Annotated[bool, Setting("Keep the tree of beams.", r.FLAG)] = False
    record: Annotated[bool, Setting("Keep the shift by guidance of every token.", r.FLAG)] = False
    alternatives: Annotated[
        int | None, Setting("Likeliest tokens to keep at each place.", r.count(0, "0 or more tokens", optional=True), unset="none")
    ] = None
    stride: Annotated[int, Setting("Largest number of tokens in one round; changes no result.", r.count(1, "at least 1 token"))] = 16

    def __post_init__(self) -> None:
        validate(self)
