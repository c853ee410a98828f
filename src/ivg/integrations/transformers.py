"""ivg inside transformers: token guidance as a LogitsProcessor, the whole search as ``custom_generate``.

>>> model.generate(**inputs, logits_processor=[GuidanceLogitsProcessor(guidance, tokenizer)])
>>> model.generate(**inputs, custom_generate=GuidedGenerate(tokenizer, values, "ivg"))

Both have the prompt as tokens. Guides without a template of their own read the same: these very tokens where they share the
vocabulary, else their text (``models.texts``). What ``generate`` is asked for is done or refused by name (``generate_args``).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, InfNanRemoveLogitsProcessor, LogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput

from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.guidance import apply_guidance, check_guidance
from ivg.engines.transformers.processors import clear_exhausted
from ivg.errors import ConfigError
from ivg.integrations.generate_args import (
    check_config,
    check_model_kwargs,
    end_ids,
    padding_id,
    read_processors,
    read_stops,
    removes_invalid_logits,
    sampling_params,
)
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.vocabulary import Vocabulary
from ivg.search.methods import CONTRAST, get_method
from ivg.search.searcher import Request, Search, Searcher
from ivg.types import Beam, Completion, ExpandRequest, Hypothesis, Prompt, SamplingParams, TokenGuidance, Value, new_key
from ivg.values.base import combine_values
from ivg.values.contrast import PromptContrast, choose_contrast


class GuidanceLogitsProcessor(LogitsProcessor):
    """Adds token guidance in ``model.generate``, beam search and drafts (``assistant_model``, ``prompt_lookup_num_tokens``) included.

    One object may serve several calls of ``generate`` in turn: what each was given is its prompt. Called by hand, a text whose beginning
    is a text of the last call continues it. The guide's cache of the last rows is freed by the next call, by :meth:`close` (or ``with``),
    or with this object.

    Args:
        guidance: value, weight and candidates.
        tokenizer: the base model's.
        attention_mask: of the prompts, [rows, tokens], where they are padded (at the left). Without it, padding tokens at the
            beginning of a row count as padding where other rows have fewer of them.
    """

    def __init__(self, guidance: TokenGuidance, tokenizer: Any, attention_mask: Tensor | None = None) -> None:
        self.guidance, self.tokenizer, self.attention_mask = guidance, tokenizer, attention_mask
        self.vocabulary = Vocabulary(tokenizer, owner="base")
        check_guidance(guidance, self.vocabulary)
        if guidance.kl_budget is not None:
            raise ConfigError(
                f"kl_budget={guidance.kl_budget:g}: a logits processor does not know the temperature, nor what an answer has cost\n"
                "  use GuidedGenerate(tokenizer, values, 'eft', kl_budget=…)"
            )
        self._start = 0
        self._call: object = None
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._seen: dict[tuple[int, ...], Beam] = {}
        self._free = weakref.finalize(self, _release, guidance.value, self._seen)

    def __enter__(self) -> GuidanceLogitsProcessor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the guide's cache of the last call."""
        self._call = None
        _release(self.guidance.value, self._seen)
        self._prompts.clear()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [rows, vocabulary] with guidance, given ``input_ids`` [rows, tokens].

        Raises:
            PromptError: a prompt that the guide cannot read, or a text that exceeds its context.
        """
        texts = [tuple(ids) for ids in input_ids.tolist()]
        call, other_tokenizer = _call_of_generate()
        if other_tokenizer:
            return scores  # the tokens are the assistant's; the base's, that answer, are guided
        # in one call of generate a draft that is refused leads back to an earlier text
        if call is not self._call if call is not None else not all(ids[:-1] in self._seen for ids in texts):
            self.close()
            self._call, self._start = call, input_ids.shape[1]
            self._read_prompts(texts)
        now: dict[tuple[int, ...], Beam] = {}
        rows = []
        for ids in texts:
            if ids not in now:
                now[ids] = self._beam(ids)
            rows.append(now[ids])
        beams = list(now.values())
        first = {beam.key: i for i, beam in reversed(list(enumerate(rows)))}
        moved = apply_guidance(scores[[first[b.key] for b in beams]].float(), beams, self.guidance)
        _release(self.guidance.value, self._seen)
        self._seen.update(now)
        place = {b.key: i for i, b in enumerate(beams)}
        return moved[[place[b.key] for b in rows]].to(scores.dtype)

    def _read_prompts(self, rows: Sequence[tuple[int, ...]]) -> None:
        if self.attention_mask is not None:
            if len(rows) % len(self.attention_mask) or self.attention_mask.shape[1] != self._start:
                shape = tuple(self.attention_mask.shape)
                raise ConfigError(f"attention_mask is {shape} and the prompts are {(len(rows), self._start)}\n  give that of these prompts")
            padding = (self.attention_mask.shape[1] - self.attention_mask.sum(1)).tolist()
            padding = [n for n in padding for _ in range(len(rows) // len(padding))]  # several sequences or beams for each
        else:
            padding = [next((i for i, t in enumerate(row) if t != self.tokenizer.pad_token_id), len(row)) for row in rows]
            padding = [n - min(padding) for n in padding]
        for row, skipped in zip(rows, padding, strict=True):
            ids = row[int(skipped) :]
            self._prompts[row] = Prompt(self.vocabulary.prompt_text(ids), ids, self.vocabulary)

    def _beam(self, ids: tuple[int, ...]) -> Beam:
        parent, tokens = self._seen.get(ids[:-1]), ids[self._start :]
        prompt = self._prompts[ids[: self._start]]
        self.guidance.value.check(prompt, len(tokens) + 1)
        before, state = ("", self.vocabulary.start_decoding(prompt.token_ids or ())) if parent is None else (parent.text, parent.decoded)
        text, state = self.vocabulary.continue_text(tokens, state)
        key = None if parent is None else parent.key
        return Beam(new_key(), key, prompt, tokens, before + text, vocabulary=self.vocabulary, inherits=False, decoded=state)


def _release(value: Value, seen: dict[tuple[int, ...], Beam]) -> None:
    value.release([beam.key for beam in seen.values()])
    seen.clear()


class GuidedGenerate:
    """The search as a ``custom_generate`` callable: returns ids [rows, prompt + response], padded at the right.

    Every setting of the call is done or refused by name (:mod:`ivg.integrations.generate_args`). What changes logits (``bad_words_ids``,
    ``min_new_tokens``, ``repetition_penalty`` …) acts on the guided ones, as for :class:`~ivg.GuidedModel`, and before ``temperature``,
    ``top_k``, ``top_p`` and ``min_p``.

    Args:
        tokenizer: the base model's.
        values: by the names that the method uses; ``contrast`` is the base itself where it is not among them.
        method: see :mod:`ivg.search.methods`.
        seed: random seed.
        processors: logits processors of your own, behind transformers', each a function of (input_ids, scores) and nothing else: rows
            of a search tree come in any order and number.
        settings: of the method (``width``, ``beta`` …).
    """

    def __init__(
        self,
        tokenizer: Any,
        values: Mapping[str, Value],
        method: str = "ivg",
        seed: int = 0,
        *,
        processors: Sequence[LogitsProcessor] = (),
        **settings: Any,
    ) -> None:
        self.tokenizer, self.seed, self.processors = tokenizer, seed, tuple(processors)
        self.method, self.values = get_method(method, **settings), values
        self.search = None if self.method.reads_contrast else self._search(values)

    def _search(self, values: Mapping[str, Value]) -> Search:
        return self.method.search(values, combine_values)

    def _search_with_contrast(self, base: CachedLM) -> Search:
        m, of_base = self.method, PromptContrast(base)
        return self._search({**self.values, CONTRAST: choose_contrast(self.values.get(CONTRAST), of_base, m.name, instructed=m.instructed)})

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by ``model.generate``; prompts may be padded at the left, see ``attention_mask``.

        Raises:
            ConfigError: an argument that a search does not support; names it.
            PromptError: a prompt that a model cannot read.
        """
        if generation_config is None:
            raise ConfigError("GuidedGenerate is called by model.generate(custom_generate=...), not directly")
        check_config(generation_config)
        mask = check_model_kwargs(model_kwargs)
        processors = [*read_processors(logits_processor or (), generation_config), *self.processors]
        if processors and (self.method.draft or self.method.rule == "speculate"):
            names, what = ", ".join(type(p).__name__ for p in processors), "draft" if self.method.draft else "rule=speculate"
            raise ConfigError(f"{what} reads several tokens at once, and {names} one by one\n  leave {what} out, or these processors")
        streamer = next((found.get("streamer") for found in _calls_of_generate()), None)
        if streamer is not None and len(input_ids) > 1:
            raise ConfigError(f"streamer: a streamer shows one row, got {len(input_ids)}\n  leave it out, or give one prompt")
        sampling = sampling_params(generation_config, input_ids.shape[1], read_stops(stopping_criteria or (), generation_config))
        kind = _FiniteLM if removes_invalid_logits(logits_processor or ()) else CachedLM
        mask = torch.ones_like(input_ids) if mask is None else mask
        with _modes_kept(model):
            base = kind(ModelRunner(model, "base"), self.tokenizer, None, end_ids(generation_config))
            done = self._answers(base, input_ids, mask, sampling, processors)
        pad, longest = padding_id(generation_config, self.tokenizer), max(len(c.token_ids) for c in done.values())
        out = input_ids.new_full((len(done), longest), pad)
        for row, completion in done.items():
            out[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
        if streamer is not None:
            for token in out[0].cpu():
                streamer.put(token[None])
            streamer.end()
        sequences = torch.cat([input_ids, out], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences  # type: ignore[arg-type]

    def _answers(
        self, base: CachedLM, input_ids: Tensor, mask: Tensor, sampling: SamplingParams, processors: Sequence[LogitsProcessor]
    ) -> dict[int, Completion]:
        """The answer to each row."""
        search = self.search or self._search_with_contrast(base)
        contrast, negative = self.method.contrast, self.method.negative
        sampling.check_token_ids(base.vocab_size)
        requests, padded = [], {}
        for row, (ids, seen) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens = tuple(ids[seen].tolist())
            padded[tokens] = ids.tolist()
            prompt = Prompt(base.vocabulary.prompt_text(tokens), tokens, contrast=contrast, negative=negative)
            requests.append(Request(prompt, search, sampling, self.seed, row))
        done = dict(Searcher(_Processed(base, processors, padded)).run(requests))
        failed = next((f"row {row}: {c.error}" for row, c in sorted(done.items()) if c.error), None)
        if failed is not None:
            raise ConfigError(f"{failed}\n  token ids cannot carry an error; use GuidedModel to get the other rows")
        return done


class _Processed(TransformersEngine):
    """An engine that applies transformers' processors to the guided logits.

    They see the rows that ``generate`` got, padding included.
    """

    def __init__(self, base: CachedLM, processors: Sequence[LogitsProcessor], padded: Mapping[tuple[int, ...], list[int]]) -> None:
        super().__init__(base)
        self.processors, self.padded = processors, padded

    def process_logits(
        self, logits: Tensor, nodes: Sequence[Hypothesis], requests: Sequence[ExpandRequest]
    ) -> tuple[Tensor, frozenset[int]]:
        if not self.processors:
            return logits, frozenset()
        out = logits.clone()
        groups: dict[int, list[int]] = {}
        for i, h in enumerate(nodes):
            groups.setdefault(len(h.token_ids), []).append(i)
        for rows in groups.values():
            ids = [[*self.padded[nodes[i].prompt.token_ids or ()], *nodes[i].token_ids] for i in rows]
            scores = out[rows]
            for processor in self.processors:
                scores = processor(torch.tensor(ids, device=out.device), scores)  # type: ignore[arg-type]
            out[rows] = scores.to(out.dtype)
        return out, clear_exhausted(out)


class _FiniteLM(CachedLM):
    """A base whose NaN and infinite logits are replaced before guidance (``remove_invalid_values``)."""

    def outputs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        out: Tensor = InfNanRemoveLogitsProcessor()(None, super().outputs(hypotheses))  # type: ignore[arg-type]
        return out


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def _calls_of_generate() -> Iterator[dict[str, Any]]:
    """The local variables of the calls of transformers' ``generate`` that called this, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _GENERATE:
            yield frame.f_locals
        frame = frame.f_back


def _call_of_generate() -> tuple[object, bool]:
    """(what tells one call of ``generate`` from another, is it an assistant with a tokenizer of its own that drafts?).

    The first is the configuration that the call has made for itself; None: it was called by hand. An assistant drafts in a call of its own.
    """
    calls = [found for found in _calls_of_generate() if "generation_mode" in found]  # one that runs code of the hub has made none
    own = next((found for found in calls if not found["generation_config"].is_assistant), None)
    if own is None:
        return None, False
    return own["generation_config"], own is not calls[0] and "assistant_tokenizer" in own["generation_mode_kwargs"]


@contextmanager
def _modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Every module is in training mode afterwards if it was: ``generate`` may be part of a training loop."""
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True
