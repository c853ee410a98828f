"""The composite: base and guides as vLLM's own networks over the same tokens, logits mixed at the end (docs/how-to/vllm.md).

Log-probabilities, grammars, penalties and sampling of vLLM all see guided logits. Keys and values do not depend on the
weights, so cached prefixes serve requests of any guidance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from ivg.engines.vllm.batch_betas import batch_betas
from ivg.engines.vllm.config import IVGConfig, Submodel
from ivg.engines.vllm.shared_weights import SharedNetwork, by_network
from ivg.engines.vllm.submodels import renamed, source_of
from ivg.errors import ConfigError


class IVGForCausalLM(nn.Module):
    """See the module. Pipeline parallelism is not declared: the submodels have different depths."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: IVGConfig = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.submodels, self.sources = config.submodels, config.sources
        running = [part for part in self.submodels if self.sources[part.name] == part.name]
        self.networks = [SharedNetwork(parts, vllm_config, prefix) for parts in by_network(running)]
        self.running = [part for network in self.networks for part in network.parts]
        """The submodels that compute, in the order in which they were built: vLLM may count layers of experts in a pass. Others have the
        outputs of one of them."""
        for network in self.networks:
            for name, module in network.modules.items():
                self.add_module(name, module)
        self.secondary_weights = [source_of(network.parts[0]) for network in self.networks]
        self.groups, self.columns, self.batch_betas = config.groups, config.group_columns, batch_betas(vllm_config)
        self.added = config.group_added
        self.widths: list[int] = []  # of the submodels' hidden states; configurations do not name it alike (OPT projects them)
        self.vocabularies = [(part.vocab_size, part.eos_id) for part in self.running]
        self.biases = nn.ParameterDict({part.name: _zeros(part.vocab_size) for part in self.submodels if part.head == "vocabulary"})
        self.ivg_beta = nn.Parameter(torch.tensor(config.default_betas or [0.0], dtype=torch.float32), requires_grad=False)

    def _network(self, name: str) -> Any:
        return self.get_submodule(name)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The base's; vLLM uses it where prompts are given as embeddings."""
        return self._network(self.submodels[0].name).embed_input_ids(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the submodels that run, side by side, [tokens, sum of widths]."""
        if input_ids is None:
            raise ConfigError("prompts as embeddings cannot be guided: guides have embeddings of their own\n  give tokens or text")
        hidden = [self._network(part.name)(self._known(input_ids, i), positions) for i, part in enumerate(self.running)]
        self.widths = [h.shape[-1] for h in hidden]
        return torch.cat(hidden, -1)

    def _known(self, input_ids: Tensor, part: int) -> Tensor:
        """Tokens that only the base has are end-of-sequence tokens to guides (as in :mod:`ivg.models.prompt_encoder`)."""
        size, end = self.vocabularies[part]
        return input_ids if size >= self.vocabularies[0][0] else torch.where(input_ids < size, input_ids, end)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Guided logits [rows, the base's vocabulary], float32, at the rows' temperature; None on ranks that have none."""
        logits = {
            part.name: self._network(part.name).compute_logits(hidden.contiguous())
            for part, hidden in zip(self.running, hidden_states.split(self.widths, -1), strict=True)
        }
        given = self.batch_betas.pop(len(hidden_states))
        base = logits[self.submodels[0].name]
        if base is None:
            return None
        mixed = base.to(torch.float32, copy=True)  # a guide may have the base's logits, too
        weights = self.ivg_beta.expand(len(mixed), -1) if given is None else given.to(mixed.device)
        for group, (name, columns, added) in enumerate(zip(self.groups, self.columns, self.added, strict=True)):
            members = [(part, logits[self.sources[part.name]]) for part in self.submodels if part.group == name]
            width = min(columns, mixed.shape[1])  # columns behind that are no token keep the base's logits
            masked = None if added is None else added.mask(mixed)
            for part, z in members:
                if len(members) == 1 and part.head == "language" and width < mixed.shape[1]:
                    z = z.float().log_softmax(-1)  # a reward is a log-probability; where all columns move, the constant does not show
                weight, delta = weights[:, group, None], self._biased(part, z[:, :width].float())
                mixed[:, :width].addcmul_(weight, delta, value=part.sign)
                if added is not None:
                    added.add_to_eos(mixed, part.sign * weight * delta[:, added.guide_eos_id : added.guide_eos_id + 1])
            if added is not None:
                added.restore(mixed, masked)
        return mixed if given is None else mixed.div_(weights[:, -1:])

    def _biased(self, part: Submodel, z: Tensor) -> Tensor:
        return z + self.biases[part.name][: z.shape[1]] if part.name in self.biases else z

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Each network by its own loader; vLLM's loader yields the weights of one after the other. Then the adapters."""
        loaded: set[str] = set()
        networks = {network.parts[0].name: network for network in self.networks}
        for name, group in _by_owner(weights):
            if name == "ivg_beta":
                self.ivg_beta.data.copy_(next(iter(group))[1].float().to(self.ivg_beta.device))
                loaded.add("ivg_beta")
                continue
            found = self._network(name).load_weights(networks[name].watch(self._without_bias(networks[name].parts[0], group)))
            loaded |= {f"{name}.{key}" for key in found or ()}
        for network in self.networks:
            loaded |= network.add_adapters()
        return loaded | {f"biases.{name}" for name in self.biases}  # most heads have none, and stay at 0

    def _without_bias(self, part: Submodel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in renamed(part, weights):
            if name == "lm_head.bias" and part.name in self.biases:
                self.biases[part.name].data.copy_(tensor)
            else:
                yield name, tensor

    @staticmethod
    def get_model_state_cls() -> type:
        """How model runner V2 hands the weights of requests over."""
        from ivg.engines.vllm.model_runner import IVGModelState

        return IVGModelState


def _zeros(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=torch.float32), requires_grad=False)


def _by_owner(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Iterable[tuple[str, Tensor]]]]:
    """(submodel, its weights under their own names), consecutive ones together and one tensor at a time."""
    from itertools import groupby

    for owner, group in groupby(weights, key=lambda pair: pair[0].partition(".")[0]):
        yield owner, ((name.partition(".")[2] or name, tensor) for name, tensor in group)
