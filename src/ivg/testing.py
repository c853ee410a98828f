"""For tests, ours and yours: laws that every value obeys, a fake engine, a byte tokenizer, tiny models.

The laws are plain functions that raise AssertionError. :class:`FakeEngine` needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ivg.types import (
    Beam,
    ExpandOutput,
    ExpandRequest,
    FinishReason,
    Hypothesis,
    Prompt,
    SamplingParams,
    TokenCounter,
    TokenGuidance,
    Value,
    new_key,
)
from ivg.utils.rng import child_rng_path, uniform

if TYPE_CHECKING:
    from ivg.values.base import CompositeValue
    from ivg.values.implicit import ImplicitValue

EOS = "<eos>"

# Laws


def check_batch_invariance(value: Value, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """Scores do not depend on who shares the batch."""
    together = value.score(hypotheses)
    value.release([h.key for h in hypotheses])
    for h, expected in zip(hypotheses, together, strict=True):
        (alone,) = value.score([h])
        value.release([h.key])
        assert abs(alone - expected) <= tolerance, f"{h.text!r}: {alone} alone, {expected} in a batch of {len(hypotheses)}"


def check_token_sum(value: ImplicitValue, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """An implicit score is the sum of its token scores, one for each token."""
    parts, totals = value.token_scores(hypotheses), value.score(hypotheses)
    value.release([h.key for h in hypotheses])
    for h, scores, total in zip(hypotheses, parts, totals, strict=True):
        assert len(scores) == len(h.token_ids), f"{len(scores)} token scores for {len(h.token_ids)} tokens"
        assert abs(sum(scores) - total) <= tolerance, f"{h.text!r}: token scores sum to {sum(scores)}, the score is {total}"


def check_linearity(composite: CompositeValue, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """A composite is the weighted sum of its parts."""
    expected = [0.0] * len(hypotheses)
    for weight, part in composite.parts:
        expected = [e + weight * s for e, s in zip(expected, part.score(hypotheses), strict=True)]
        part.release([h.key for h in hypotheses])
    got = composite.score(hypotheses)
    composite.release([h.key for h in hypotheses])
    for g, e in zip(got, expected, strict=True):
        assert abs(g - e) <= tolerance, f"composite {g}, weighted sum of parts {e}"


def check_cache(make: Callable[[], Value], chains: Sequence[Sequence[Hypothesis]], tolerance: float = 1e-4) -> None:
    """The cache is only an optimisation: scoring prefix after prefix gives what a fresh value gives for each."""
    kept = make()
    for generation in zip(*chains, strict=True):
        scores = kept.score(generation)
        for h, score in zip(generation, scores, strict=True):
            (fresh,) = make().score([h])
            assert abs(score - fresh) <= tolerance, f"{h.text!r}: {score} with the cache, {fresh} read anew"
    kept.release([h.key for chain in chains for h in chain])


# A fake engine


class FakeEngine:
    """Letters instead of tokens: id i is the letter ``alphabet[i]``, the last id ends the text; drawn uniformly.

    Counts what it holds, so that tests can see that everything is released.

    Args:
        alphabet: letters.
        weights: of the letters and the end behind a text; the base's distribution up to a factor.
        proposal: the same for requests with guidance, whose value itself is not asked.
    """

    name = "fake"
    vocabulary: Any = None
    unsupported: Mapping[str, str] = {}

    def __init__(
        self,
        alphabet: str = "abcdefgh",
        weights: Callable[[str], Sequence[float]] | None = None,
        proposal: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        self.alphabet, self.weights, self.proposal = alphabet, weights, proposal
        self.eos = len(alphabet)
        self.held: set[int] = set()
        self.calls: list[int] = []

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response."""
        beam = Beam(new_key(), None, prompt, inherits=False)
        self.held.add(beam.key)
        return beam

    def prompt_tokens(self, prompt: Prompt) -> int:
        """One for each letter."""
        return len(str(prompt.content))

    def check(self, guidance: TokenGuidance | None) -> None:
        """Anything goes."""

    def release(self, keys: Sequence[int]) -> None:
        """Forget them."""
        self.held -= set(keys)

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """Children of every beam."""
        self.calls.append(len(requests))
        return [self._family(request) for request in requests]

    def _family(self, request: ExpandRequest) -> list[Beam]:
        beam = request.beam
        if self._pauses(request, beam.text, len(beam.token_ids)):
            return [replace(beam, paused=True)]
        return [self._child(request, request.first + i) for i in range(request.successors)]

    def _pauses(self, request: ExpandRequest, text: str, length: int) -> bool:
        """Does the request's chunk end behind ``text``?"""
        if request.pause is None or length < request.pause.after:
            return False
        base = self._distribution(text)
        return -sum(p * math.log(p) for p in base if p) >= request.pause.entropy

    def _child(self, request: ExpandRequest, index: int) -> Beam:
        beam = request.beam
        rng_path, ids = child_rng_path(beam.rng_path, len(beam.token_ids), index), list(beam.token_ids)
        text, ratio, paused = beam.text, beam.log_ratio, False
        finish: FinishReason | None = None
        for _ in range(request.tokens):
            if self._pauses(request, text, len(ids)):
                paused = True
                break
            base = self._distribution(text, allow_eos=not request.sampling.ignore_eos)
            guided = self.proposal is not None and request.guidance is not None
            used = self._distribution(text, allow_eos=not request.sampling.ignore_eos, guided=True) if guided else base
            token = sample_from_weights(used, uniform(request.seed, rng_path, len(ids)))
            if request.return_log_ratio:
                ratio += (math.log(base[token]) if base[token] else -math.inf) - math.log(used[token])
            ids.append(token)
            beam.token_counter.add("fake", 1)
            text += "" if token == self.eos else self.alphabet[token]
            found = [text.find(s) for s in request.sampling.stop if s in text]
            if token == self.eos or found:
                text, finish = text[: min(found, default=len(text))], "stop"
                break
            if len(ids) == request.sampling.max_new_tokens:
                finish = "length"
                break
        key = new_key()
        self.held.add(key)
        pieces = tuple("" if i == self.eos else self.alphabet[i] for i in ids) if request.record else ()
        shifts = (0.0,) * len(ids) if request.record else ()
        return Beam(
            key,
            beam.key,
            beam.prompt,
            tuple(ids),
            text,
            finish,
            beam.token_counter,
            rng_path=rng_path,
            pieces=pieces,
            guide_shift=shifts,
            log_ratio=ratio,
            paused=paused,
        )

    def _distribution(self, text: str, *, allow_eos: bool = True, guided: bool = False) -> list[float]:
        source = self.proposal if guided else self.weights
        weights = list(source(text)) if source else [1.0] * (len(self.alphabet) + 1)
        if not allow_eos:
            weights[self.eos] = 0.0
        return [w / sum(weights) for w in weights]


class AsyncFakeEngine(FakeEngine):
    """As :class:`FakeEngine`, whose requests end each at its own time, in no particular order.

    Children under way are shown with half of their new letters where ``stream`` is set. ``given_up`` has the beams whose requests were.
    """

    name = "paced-fake"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given_up: list[int] = []
        self._orders: dict[int, ExpandRequest] = {}
        self._rounds = 0

    def submit(self, requests: Sequence[ExpandRequest]) -> None:
        """Begin them."""
        self.calls.append(len(requests))
        self._orders |= {request.beam.key: request for request in requests}

    def collect(self, beams: Collection[int] | None = None) -> list[ExpandOutput]:
        """Some of the requests of ``beams``, done; of the others what is streamed."""
        self._rounds += 1
        out: list[ExpandOutput] = []
        requests = [(key, request) for key, request in self._orders.items() if beams is None or key in beams]
        for place, (key, request) in enumerate(requests):
            if len(requests) == 1 or uniform(place, self._rounds) < 0.3:
                del self._orders[key]
                out.append(ExpandOutput(key, self._family(request)))
            elif request.stream and request.tokens > 1:
                half = self._family(replace(request, tokens=request.tokens // 2))
                self.held -= {b.key for b in half}
                out.append(ExpandOutput(key, half, done=False))
        return out

    def release(self, keys: Sequence[int]) -> None:
        """Forget them, and give their requests up."""
        super().release(keys)
        self.given_up += [k for k in keys if self._orders.pop(k, None) is not None]


def sample_from_weights(distribution: Sequence[float], u: float) -> int:
    """The first position whose cumulated probability exceeds ``u``."""
    total = 0.0
    for i, p in enumerate(distribution):
        total += p
        if total > u:
            return i
    return max(i for i, p in enumerate(distribution) if p)


# Tokenizers and models


def byte_tokenizer(merges: Sequence[tuple[str, str]] = (), permute: bool = False, chat: bool = False, bos: bool = False) -> Any:
    """A transformers tokenizer over bytes, with a few ``merges``; ``permute`` gives the same tokens other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [EOS, *alphabet, *(a + b for a, b in merges)]
    if permute:
        tokens = [EOS, *reversed(tokens[1:])]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    if bos:
        tok.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, 0)])
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, pad_token=EOS, bos_token=EOS, clean_up_tokenization_spaces=False)
    if chat:
        out.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return out


ARCHITECTURES = ("gpt2", "llama", "mistral", "mixtral", "qwen3", "gemma3_text")
"""What :func:`tiny_model` can make. Windows are 6 tokens, so that they matter."""


def tiny_model(architecture: str = "llama", seed: int = 0, vocab_size: int = 257, hidden: int = 32, context: int = 256) -> Any:
    """A random causal language model in float32 whose distributions are far from flat."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    settings: dict[str, Any]
    if architecture == "gpt2":
        settings = {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_positions": context, "initializer_range": 0.3}
    else:
        settings = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
            "max_position_embeddings": context,
            "initializer_range": 0.3,
        }
    if architecture in ("mistral", "mixtral"):
        settings["sliding_window"] = 6
    if architecture == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if architecture == "gemma3_text":
        settings |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": hidden // 4}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **common, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_lm(name: str = "base", architecture: str = "llama", seed: int = 0, tokenizer: Any = None, **settings: Any) -> Any:
    """A :class:`~ivg.models.cached_lm.CachedLM` of a :func:`tiny_model`."""
    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner

    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    network = tiny_model(architecture, seed, vocab_size=len(tokenizer), **settings)
    return CachedLM(ModelRunner(network, name), tokenizer)


def tiny_value(head: str = "vocabulary", architecture: str = "llama", seed: int = 0, tokenizer: Any = None, name: str = "explicit") -> Any:
    """An :class:`~ivg.values.explicit.ExplicitValue` with a random head over the body of a :func:`tiny_model`."""
    import torch

    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner
    from ivg.models.value_head import ValueModel
    from ivg.values.explicit import ExplicitValue

    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    model = ValueModel(tiny_model(architecture, seed, vocab_size=len(tokenizer)).base_model, head)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return ExplicitValue(CachedLM(ModelRunner(model, name), tokenizer), name)


def hypothesis(prompt: str, text: str, reader: Any, parent: Hypothesis | None = None, *, end: bool = False) -> Beam:
    """A beam with ``text`` as response, in the tokens of ``reader``; ``end`` adds the end-of-sequence token."""
    ids = tuple(reader.vocabulary.response_ids(reader.prompt_ids(Prompt(prompt)), text)) if text else ()
    ids += (min(reader.vocabulary.eos_ids),) if end else ()
    return Beam(
        new_key(),
        parent.key if parent else None,
        Prompt(prompt),
        ids,
        text,
        "stop" if end else None,
        TokenCounter(),
        vocabulary=reader.vocabulary,
    )
