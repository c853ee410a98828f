"""The value network in training: its head, its loss and its batches, for transformers' ``Trainer``.

The loss covers response tokens only. No tensor of rows × length × vocabulary is made: a vocabulary head is computed at the sampled tokens
only; the expectation of CD-Q is computed in blocks.

A vocabulary head gets a training signal only for the sampled token of each position. So that other tokens get sensible values too, its rows
are trained as start + shared + embedding·map + own, and summed at the end into one matrix, ``score_head.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.models.adapter_directory import fitted
from ivg.models.placement import compute_dtype
from ivg.models.shared_prompts import SharedRows, read_shared, share_prompts
from ivg.models.value_head import ValueModel
from ivg.settings.train import ValueSettings
from ivg.training import targets
from ivg.training.encoding import Encoded, PromptRows, as_texts
from ivg.training.kept_adapter import round_to_half

BLOCK = 512
"""Positions for which values of the whole vocabulary are computed at once (CD-Q)."""
PARTS = (25, 50, 75, 100)
"""Percentages of the response at which values are evaluated."""


class FactoredHead(nn.Module):
    """A vocabulary head in training: W = start + 1·shared + embedding·map + own, [vocabulary, hidden].

    Args:
        head: as training starts.
        width: of the embedding.
        own: False: leave the last part out.
    """

    def __init__(self, head: nn.Linear, width: int, *, own: bool = True) -> None:
        super().__init__()
        size, hidden = head.weight.shape
        self.shared = nn.Parameter(torch.zeros(hidden))
        self.map = nn.Parameter(torch.zeros(width, hidden))
        self.own: nn.Embedding | None = None
        if own:
            self.own = nn.Embedding(size, hidden)
            nn.init.zeros_(self.own.weight)

    def rows(self, start: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The head's rows for ``tokens`` [...] (None: all), [..., hidden]."""
        if tokens is None:
            together = start + self.shared + embedding.float() @ self.map
            return together if self.own is None else together + self.own.weight
        looked_up = nn.functional.embedding(tokens, embedding).float()
        together = nn.functional.embedding(tokens, start) + self.shared + looked_up @ self.map
        return together if self.own is None else together + self.own(tokens)


class ValueModelWithLoss(nn.Module):
    """A value network with its loss, for transformers' ``Trainer``.

    Args:
        model: the value network to train.
        settings: head and target.
        base: the policy of CD-Q; frozen, and not part of the checkpoints.
    """

    def __init__(self, model: ValueModel, settings: ValueSettings, base: Any = None) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.factors: FactoredHead | None = None
        if model.kind == "vocabulary" and settings.factored:
            model.head.weight.requires_grad_(False)
            self.factors = FactoredHead(model.head, self.embedding.shape[1], own=not settings.compact_head)
        self._base = (base,)  # in a tuple, so that it is not a submodule

    @property
    def embedding(self) -> Tensor:
        """Input embeddings of the body, [vocabulary, width]; cut or padded to the head's rows."""
        weight: Tensor = cast("Any", self.model.backbone).get_input_embeddings().weight
        return fitted(weight, self.model.head.weight.shape[0])

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade compute for memory in the body."""
        body: Any = self.model.backbone
        body.gradient_checkpointing_enable(**kwargs)
        if hasattr(body, "enable_input_require_grads"):
            body.enable_input_require_grads()  # a frozen embedding would cut the graph before the first checkpoint

    def values(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """V of the prefix that ends in each token, [rows, positions]; 0 for the first token with a vocabulary head, which has none."""
        if self.model.kind == "scalar":
            head = self.model.head
            return nn.functional.linear(hidden, head.weight.float(), None if head.bias is None else head.bias.float())[..., 0]
        tokens, before = input_ids[:, 1:], hidden[:, :-1]
        start = self.model.head.weight.float()
        rows = nn.functional.embedding(tokens, start) if self.factors is None else self.factors.rows(start, self.embedding, tokens)
        return nn.functional.pad((before * rows).sum(-1), (1, 0))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, rewards: Tensor, groups: Tensor,
        base_ids: Tensor | None = None, base_attention: Tensor | None = None, base_mask: Tensor | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Loss, and the values after 25, 50, 75 and 100 % of each response [rows, 4]; ``shared``: the same rows as one pass reads them."""
        if shared is not None:
            hidden = read_shared(self.model.backbone, SharedRows(**shared)).float()
        else:
            hidden = self.model.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        with torch.autocast(hidden.device.type, enabled=False):  # values and targets in float32
            return self._loss(self.values(hidden, input_ids), hidden, mask, rewards, (base_ids, base_attention, base_mask))

    def _loss(self, values: Tensor, hidden: Tensor, mask: Tensor, rewards: Tensor, base: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        if self.settings.target == "binary":
            loss = targets.cross_entropy(values, rewards, mask)
        else:
            wanted = self._targets(values, hidden, mask, rewards, base)
            loss = targets.squared_error(values, wanted, mask)
        with torch.no_grad():
            at = torch.stack([targets.positions_at(mask, part / 100) for part in PARTS], 1)
            in_reward_unit = values.sigmoid() if self.settings.target == "binary" else values
            return {"loss": loss, "parts": in_reward_unit.gather(1, at)}

    def _targets(self, values: Tensor, hidden: Tensor, mask: Tensor, rewards: Tensor, base: tuple[Tensor | None, ...]) -> Tensor:
        if self.settings.target == "td":
            return targets.td_lambda(values, rewards, mask, self.settings.lam)
        if self.settings.target == "cd-q":
            return targets.cd_q(self.expected_next(hidden, mask, base), rewards, mask)
        return targets.fudge(rewards, mask)

    @torch.no_grad()
    def expected_next(self, hidden: Tensor, mask: Tensor, base: tuple[Tensor | None, ...]) -> Tensor:
        """Expectation of Q over the base's next token after every response token, [rows, positions]; ``base``: ids and masks."""
        policy, (ids, attention, positions) = self._base[0], base
        assert policy is not None and ids is not None and positions is not None
        states = policy.to(ids.device).base_model(input_ids=ids, attention_mask=attention).last_hidden_state[positions > 0]
        own = hidden[mask > 0]
        head = self.matrix()
        out = []
        for start in range(0, len(own), BLOCK):
            logits = policy.get_output_embeddings()(states[start : start + BLOCK]).float()
            width = min(logits.shape[1], head.shape[0])
            logps = logits[:, :width].log_softmax(-1)
            out.append(targets.expected(own[start : start + BLOCK].float() @ head[:width].T, logps))
        return torch.zeros_like(mask).masked_scatter(mask > 0, torch.cat(out))

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The head as one matrix, float32 [vocabulary or 1, hidden]."""
        weight = self.model.head.weight
        return (weight if self.factors is None else self.factors.rows(weight, self.embedding)).float()

    @torch.no_grad()
    def settle(self) -> None:
        """Round what was trained to float16, in which an adapter is stored; a head in parts becomes one matrix, unless it is compact."""
        if self.factors is None or not self.settings.compact_head:
            self.model.head.weight.copy_(self.matrix())
            self.factors = None
            self.model.head.weight.requires_grad_(True)  # a parameter that was trained
        round_to_half(p for p in self.parameters() if p.requires_grad)

    def stored_head(self) -> dict[str, Tensor]:
        """The tensors of the head, named as in :mod:`ivg.models.adapter_directory`."""
        if self.factors is not None:
            return {"score_head.shared": self.factors.shared, "score_head.map": self.factors.map}
        name = "score_head" if self.model.kind == "vocabulary" else "score"
        return {f"{name}.{part}": tensor for part, tensor in self.model.head.named_parameters()}

    @torch.no_grad()
    def finished(self) -> ValueModel:
        """The value network for inference: head summed, LoRA merged."""
        self.model.head.weight.copy_(self.matrix())
        self.model.head.to(compute_dtype(self.model.backbone))
        body: Any = self.model.backbone
        if hasattr(body, "merge_and_unload"):
            self.model.backbone = body.merge_and_unload()
        return self.model.eval()


@dataclass
class ValueCollator:
    """Pads rows on the right to a multiple of 8 tokens; the policy of CD-Q gets prompts in its own template."""

    pad: int
    scale: float = 1.0

    def __call__(self, given: Sequence[Encoded | PromptRows]) -> dict[str, Any]:
        """Inputs of :meth:`ValueModelWithLoss.forward`."""
        groups = [row if isinstance(row, tuple) else (row,) for row in given]
        rows = [row for group in groups for row in group]
        ids, attention, mask = self._padded([(r.ids, r.prompt_length) for r in rows])
        out: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention,
            "mask": mask,
            "rewards": torch.tensor([r.score * self.scale for r in rows]),
            "groups": torch.tensor([r.group for r in rows]),
        }
        if rows[0].policy_prompt:
            for_policy = [([*r.policy_prompt, *r.ids[r.prompt_length :]], len(r.policy_prompt)) for r in rows]
            out["base_ids"], out["base_attention"], out["base_mask"] = self._padded(for_policy)
        if isinstance(given[0], tuple):
            out["shared"] = vars(share_prompts([as_texts(group) for group in groups], self.pad, ids.shape[1]))
        return out

    def _padded(self, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
        ids = torch.full((len(rows), width), self.pad)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(rows), width)
        for i, (tokens, border) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            attention[i, : len(tokens)] = 1
            mask[i, border : len(tokens)] = 1.0
        return ids, attention, mask
