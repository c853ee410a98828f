"""Model runner V2: weights of requests by slot, set row by row before every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class IVGModelState(DefaultModelState):
    """Keeps [slots, groups + 1] weights and temperatures; slots are used again, so every request writes its own."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        composite: Any = model
        self.ivg = composite
        self.table = torch.zeros(self.max_num_reqs, len(composite.groups) + 1)
        self.table[:, -1] = 1.0  # the temperature
        self.on_device = self.table.to(device)
        self.changed = False

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Read the weights of a request that enters the batch."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.table[req_index] = torch.tensor(self.ivg.config.row_of(params.extra_args if params is not None else None))
        self.changed = True

    def apply_staged_writes(self) -> None:
        """To the device, once a step."""
        super().apply_staged_writes()
        if self.changed:
            self.on_device.copy_(self.table, non_blocking=False)
            self.changed = False

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        """Before the pass: one row of weights for each row of logits."""
        self.ivg.batch_betas.set(self.on_device[input_batch.expanded_idx_mapping.long()])
        return super().prepare_inputs(input_batch, req_states)
