"""How many new tokens fit behind a prompt: the contexts of the base and of the values of a request. Standard library only."""

from __future__ import annotations

from dataclasses import replace

from ivg.errors import ContextLengthError
from ivg.search.request import Request
from ivg.types import Engine

DEFAULT_MAX_TOKENS = 2048
"""New tokens at most where nobody says a length, as far as the contexts allow."""
_UNLIMITED = 1 << 40
"""More tokens than any context has."""


def max_new_tokens(engine: Engine, request: Request) -> int | None:
    """How many new tokens every model of ``request`` can read after its prompt; None where no model has a limit.

    Raises:
        ContextLengthError: not even one.
        PromptError: a prompt that cannot be read.
    """
    tokens = _UNLIMITED
    while True:
        try:
            check_lengths(engine, request, tokens)
        except ContextLengthError as e:
            if e.length >= e.limit or tokens <= 1:
                raise
            tokens = min(tokens - 1, e.limit - e.length)
        else:
            return None if tokens == _UNLIMITED else tokens


def check_lengths(engine: Engine, request: Request, tokens: int) -> None:
    """Raise PromptError unless every model of ``request`` can read its prompt and ``tokens`` new tokens; 0: the prompt alone."""
    search = request.search
    if tokens:
        prompt = engine.open(request.prompt, replace(request.sampling, max_new_tokens=tokens)).prompt
    else:
        prompt = engine.base.root(request.prompt, 0).prompt
    for value in (search.guidance.value if search.guidance else None, search.value):
        if value is not None:
            value.check(prompt, tokens)
