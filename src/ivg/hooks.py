"""ivg inside transformers: token guidance as a LogitsProcessor, the whole search as ``custom_generate``.

>>> model.generate(**inputs, logits_processor=[GuidanceLogitsProcessor(guidance, tokenizer)])
>>> model.generate(**inputs, custom_generate=SearchGenerate(tokenizer, values, "ivg"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ivg.decoding.search import Request, Searcher
from ivg.decoding.strategies import strategy
from ivg.engine.guidance import check_guidance, guided
from ivg.engine.transformers import TransformersEngine
from ivg.errors import ConfigError
from ivg.models.cached import CachedModel
from ivg.models.loading import eos_ids
from ivg.models.reader import Reader
from ivg.models.vocab import Vocabulary
from ivg.types import Beam, Prompt, SamplingParams, TokenGuidance, Value, new_key
from ivg.values.base import CompositeValue


class GuidanceLogitsProcessor(LogitsProcessor):
    """Adds token guidance in ``model.generate``; follows rows through beam search too. Use a fresh one for each call.

    Args:
        guidance: value, weight and candidates.
        tokenizer: the base model's.
    """

    def __init__(self, guidance: TokenGuidance, tokenizer: Any) -> None:
        self.guidance, self.tokenizer = guidance, tokenizer
        self.vocabulary = Vocabulary(tokenizer, owner="base")
        check_guidance(guidance, self.vocabulary)
        self._start: int | None = None
        self._seen: dict[tuple[int, ...], Beam] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [rows, vocabulary] moved by the guidance, given ``input_ids`` [rows, tokens]."""
        if self._start is None:
            self._start = input_ids.shape[1]
        now: dict[tuple[int, ...], Beam] = {}
        rows = []
        for ids in map(tuple, input_ids.tolist()):
            rows.append(now.setdefault(ids, self._beam(ids)))
        unique = {beam.key: beam for beam in rows}
        beams = list(unique.values())
        first = {key: next(i for i, b in enumerate(rows) if b.key == key) for key in unique}
        moved = guided(scores[[first[b.key] for b in beams]].float(), beams, [b.decoded for b in beams], self.guidance)
        self.guidance.value.release([b.key for b in self._seen.values() if b.key not in unique])
        self._seen = now
        place = {b.key: i for i, b in enumerate(beams)}
        return moved[[place[b.key] for b in rows]].to(scores.dtype)

    def _beam(self, ids: tuple[int, ...]) -> Beam:
        parent = self._seen.get(ids[:-1])
        if parent is not None:
            tokens = (*parent.token_ids, ids[-1])
            text, decoded = self.vocabulary.continue_text(tokens, parent.decoded)
            return Beam(
                new_key(),
                parent.key,
                parent.prompt,
                tokens,
                parent.text + text,
                vocabulary=self.vocabulary,
                inherits=False,
                decoded=decoded,
            )
        tokens = ids[self._start :]
        text, decoded = self.vocabulary.continue_text(tokens, self.vocabulary.begin(ids[: self._start]))
        prompt = Prompt(self.vocabulary.decode(ids[: self._start]))
        return Beam(new_key(), None, prompt, tokens, text, vocabulary=self.vocabulary, inherits=False, decoded=decoded)


class SearchGenerate:
    """The search as a ``custom_generate`` callable: returns ids [rows, prompt + response], padded at the right.

    Sampling settings come from the call's generation config (``do_sample``, ``temperature``, ``top_k``, ``top_p``,
    ``min_p``, ``repetition_penalty``, ``max_new_tokens``, ``eos_token_id``).

    Args:
        tokenizer: the base model's.
        values: by the names that the method asks for.
        method: see ``decoding.strategies``.
        seed: of all draws.
        settings: of the strategy (``width``, ``beta`` …).
    """

    def __init__(self, tokenizer: Any, values: Mapping[str, Value], method: str = "ivg", seed: int = 0, **settings: Any) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.search = strategy(method, **settings).search(values, CompositeValue)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Called by ``model.generate``; prompts may be padded at the left, as told by ``attention_mask``."""
        if generation_config is None:
            raise ConfigError("SearchGenerate is called by model.generate(custom_generate=...), not directly")
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        base = Reader(CachedModel(model, "base"), self.tokenizer, None, eos_ids(model, self.tokenizer))
        sampling = _sampling(generation_config, input_ids.shape[1])
        requests = []
        for row, (ids, seen) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens = tuple(ids[seen].tolist())
            prompt = Prompt(base.vocabulary.decode(tokens), tokens)
            requests.append(Request(prompt, self.search, sampling, self.seed, row))
        done = dict(Searcher(TransformersEngine(base)).run(requests))
        pad = generation_config.pad_token_id
        pad = self.tokenizer.pad_token_id if pad is None else pad
        longest = max(len(c.token_ids) for c in done.values())
        out = input_ids.new_full((len(requests), longest), 0 if pad is None else int(pad))
        for row, completion in done.items():
            out[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
        return torch.cat([input_ids, out], dim=1)


def _sampling(config: Any, prompt_length: int) -> SamplingParams:
    limit = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - prompt_length
    return SamplingParams(
        temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty or 1.0,
        max_new_tokens=limit,
    )
