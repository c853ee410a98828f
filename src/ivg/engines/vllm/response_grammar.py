"""The grammar of a chunk on its way to vLLM's scheduler (:mod:`ivg.engines.vllm.scheduler`)."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ivg.errors import ConfigError
from ivg.types import SamplingParams

_KEY = "x-ivg"
"""Of the JSON schema that carries a grammar: vLLM's parameters have no field for what a response begins with."""


@dataclass(frozen=True)
class ResponseGrammar:
    """The grammar of a request, as its JSON schema carries it.

    Attributes:
        structure: name of the setting, and its text.
        response: tokens at the end of the prompt that the response begins with.
        eos_ids: end-of-sequence tokens of the base.
        ends: all tokens that end the response.
        least: so many tokens must come before one of those, unless nothing else can.
        ignore_eos: ``eos_ids`` come where nothing else can, and nowhere else.
    """

    structure: tuple[str, str]
    response: tuple[int, ...]
    eos_ids: tuple[int, ...]
    ends: tuple[int, ...]
    least: int = 0
    ignore_eos: bool = False

    def parameters(self) -> Any:
        """As ``SamplingParams.structured_outputs`` of vLLM."""
        from vllm.sampling_params import StructuredOutputsParams

        return StructuredOutputsParams(json=json.dumps({_KEY: vars(self)}))

    @classmethod
    def of_chunk(cls, sampling: SamplingParams, response: Sequence[int], eos_ids: Collection[int], least: int) -> Any:
        """``SamplingParams.structured_outputs`` of vLLM for a chunk behind ``response``; None: there is no grammar."""
        if sampling.structure is None:
            return None
        eos, ends = tuple(sorted(eos_ids)), tuple(sorted({*eos_ids, *sampling.stop_token_ids}))
        return cls(sampling.structure, tuple(response), eos, ends, least, sampling.ignore_eos).parameters()

    @classmethod
    def read(cls, text: str) -> ResponseGrammar:
        """From that text.

        Raises:
            ConfigError: it is another schema.
        """
        found = json.loads(text).get(_KEY)
        if found is None:
            raise ConfigError("got structured_outputs of vLLM\n  this engine reads the grammars of ivg's settings alone")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return cls(**given)  # type: ignore[arg-type]
