"""A value network's backbone for vLLM's pooling engine: the hidden state of the last token. The head is applied outside of vLLM.

So one network serves vocabulary heads, of which one column is needed, and scalar heads alike (:mod:`ivg.models.value_head`), and
prefixes stay cached: only the last token of a text is read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.utils import StageMissingLayer, no_init_weights

from ivg.engines.vllm.config import IVGValueConfig
from ivg.engines.vllm.submodels import build_submodel, renamed, source_of


@default_pooling_type(seq_pooling_type="LAST")
class IVGForValue(nn.Module):
    """See the module."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: IVGValueConfig = vllm_config.model_config.hf_config
        self.part = config.submodel
        with no_init_weights(self, lambda module: StageMissingLayer("output", module), targets=(LogitsProcessor, ParallelLMHead)):
            self.add_module(self.part.name, build_submodel(self.part, vllm_config, prefix))
        self.secondary_weights = [source_of(self.part)]
        self.pooler = DispatchPooler.for_embedding(vllm_config.model_config.pooler_config)

    @property
    def network(self) -> Any:
        """The causal language model whose head is left out."""
        return self.get_submodule(self.part.name)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Of the network."""
        return self.network.embed_input_ids(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states [tokens, hidden]."""
        return self.network(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All but the heads; the primary source holds nothing that is used."""
        prefix = f"{self.part.name}."
        own = ((name.removeprefix(prefix), tensor) for name, tensor in weights if name.startswith(prefix))
        found = self.network.load_weights((n, t) for n, t in renamed(self.part, own) if not n.startswith("lm_head."))
        return {prefix + name for name in found or ()}
