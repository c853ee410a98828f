"""Reads the guidance weights of requests. One class for both model runners; changes no logits itself: the composite does.

Give it to an engine of a composite by name, ``logits_processors=["ivg.engines.vllm.processor:IVGBeta"]``, never under vLLM's entry point
for processors: that would load it into every engine of the environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from ivg.engines.vllm.batch_betas import batch_betas
from ivg.engines.vllm.config import KEY, TEMPERATURE_KEY, IVGConfig, check_betas

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class IVGBeta(V1LogitsProcessor, V2LogitsProcessor):
    """Weights of each request from ``SamplingParams.extra_args``: ``ivg_beta``, ``ivg_beta.NAME`` (OpenAI API: ``vllm_xargs``)."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Front end: what is wrong here fails the request, and never reaches the worker.

        Raises:
            ValueError: a weight that is no finite number, or of no guide; log-probabilities of a prompt beside a weight.
        """
        check_betas(sampling_params.extra_args)
        extra = [k for k in sampling_params.extra_args or {} if k in (KEY, TEMPERATURE_KEY) or k.startswith(f"{KEY}.")]
        if extra and sampling_params.prompt_logprobs is not None:
            raise ValueError(f"prompt_logprobs use the model's default weights and cannot be had beside {KEY}; leave one of them out")

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        """``runner``: (device, is_pin_memory) of model runner V1, (req_states,) of V2."""
        import torch

        self.config: IVGConfig = vllm_config.model_config.hf_config
        self.batch_betas = batch_betas(vllm_config)
        self.v2 = len(runner) == 1
        self.device = None if self.v2 else runner[0]
        most = vllm_config.scheduler_config.max_num_seqs
        self.table = torch.zeros(most, len(self.config.groups) + 1)
        self.table[:, -1] = 1.0  # the temperature
        self.rows = 0

    def is_argmax_invariant(self) -> bool:
        """``apply`` changes nothing."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Model runner V1, before every pass: follow the batch, and arm its rows."""
        if batch_update is not None:
            self.rows = batch_update.batch_size
            for index, params, _, _ in batch_update.added:
                self.table[index] = self._weights(params)
            for one, two, way in batch_update.moved:
                held = self.table[two].clone()
                self.table[two] = self.table[one]
                if way == MoveDirectionality.SWAP:
                    self.table[one] = held
        self.batch_betas.set(self.table[: self.rows].clone())

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Model runner V2 asks ``runner_v2``; nothing to do in the sampler."""
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """As they are."""
        return logits

    def _weights(self, params: SamplingParams) -> Tensor:
        import torch

        return torch.tensor(self.config.row_of(params.extra_args))
