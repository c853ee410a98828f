"""Penalties and bad words of responses that vLLM sees in chunks. One class for both model runners.

To vLLM a chunk is a request whose prompt ends with the response so far, so its own penalties would begin anew in every chunk. Here a
request says how many tokens at the end of its prompt belong to the response (``SamplingParams.extra_args``), and vLLM's own are off.
The arithmetic is :class:`~ivg.engines.token_penalties.TokenPenalties`,
that of the transformers engine: behind ``logit_bias``, before temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from ivg.engines.token_penalties import TokenPenalties
from ivg.engines.vllm.config import RESPONSE_KEY
from ivg.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class _Request:
    """What a request looks back at.

    Attributes:
        settings: of the request.
        tokens: of the response, at the end of the prompt.
        prompt: all tokens of vLLM's prompt; model runner V2 keeps them itself.
        output: what vLLM has drawn, which grows; likewise.
    """

    settings: TokenPenalties
    tokens: int
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


class ResponsePenalties(V1LogitsProcessor, V2LogitsProcessor):
    """Settings of each request from ``SamplingParams.extra_args``; requests without them stay as they are."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Front end: what is wrong here fails the request, and never reaches the worker.

        Raises:
            ValueError: it is none of ours.
        """
        try:
            _request(sampling_params.extra_args)
        except ConfigError as e:
            raise ValueError(str(e)) from None

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        """``runner``: (device, is_pin_memory) of model runner V1, (req_states,) of V2."""
        self.states: Any = runner[0] if len(runner) == 1 else None
        self.requests: dict[int, _Request] = {}
        """By row of the batch (V1) or slot (V2)."""

    def is_argmax_invariant(self) -> bool:
        """Penalties change what is likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Model runner V1, before every pass: follow the batch."""
        process_dict_updates(self.requests, batch_update, lambda params, prompt, output: _request(params.extra_args, prompt, output))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Model runner V2: a request enters a slot, which another may have had."""
        self.requests.pop(req_idx, None)
        found = _request(sampling_params.extra_args)
        if found is not None:
            self.requests[req_idx] = found
        return found is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Change the rows of requests that look back, in place."""
        if self.states is not None:
            return self._apply_v2(logits, ctx)
        for row, request in self.requests.items():
            request.settings.apply_to_chunk(logits[row], request.prompt, request.output, request.tokens)
        return logits

    def _apply_v2(self, logits: Tensor, ctx: Any) -> Tensor:
        if self.requests.keys().isdisjoint(ctx.idx_mapping_np.tolist()):  # which is on the host: nothing to wait for
            return logits
        for row, (slot, position) in enumerate(zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)):
            request = self.requests.get(slot)
            if request is not None:
                length = int(self.states.prompt_len.np[slot])
                text = self.states.all_token_ids.gpu[slot, : position + 1].tolist()
                request.settings.apply_to_chunk(logits[row], text[:length], text[length:], request.tokens)
        return logits


def _request(extra_args: Mapping[str, Any] | None, prompt: Sequence[int] | None = (), output: Sequence[int] = ()) -> _Request | None:
    """What a request looks back at; None: nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    given = (extra_args or {}).get(RESPONSE_KEY)
    if given is None:
        return None
    tokens = given.get("tokens") if isinstance(given, Mapping) else None
    if not isinstance(tokens, int):
        raise ConfigError(f"extra_args[{RESPONSE_KEY!r}] is for ivg's own requests, got {given!r}\n  leave it out")
    return _Request(TokenPenalties.read(given), tokens, prompt or (), output)
