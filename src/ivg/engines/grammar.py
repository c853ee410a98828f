"""Structured output: which tokens a JSON schema, a regular expression, some choices or a grammar allow behind a response.

The masks are llguidance's (https://github.com/guidance-ai/llguidance). They forbid tokens of the base before guidance is mixed in, so what
guides re-scores the likeliest of the allowed tokens, and every distribution is that of the method, token by token, over the allowed
tokens. A token is allowed where the text can still become one that the grammar accepts, however it is split into tokens (``no_forcing``:
llguidance would else allow the tokenizer's own split alone). Tokens that end a response are allowed where the grammar is complete.

Each hypothesis has a matcher, a fork of its parent's. It is a function of the tokens: one that is gone is made again from them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence
from ivg.errors import ConfigError, MissingDependencyError
from ivg.models.json_grammar import llguidance_schema
from ivg.models.vocabulary import Vocabulary
from ivg.types import Beam, SamplingParams

_STATES = 4096
"""Matchers that are kept; further ones are made again."""
_GRAMMARS = 64
_WHOLE = '%llguidance {"no_forcing": true}\nstart: @inner'


@dataclass(slots=True)
class _State:
    """A matcher and the tokens that it has read."""

    matcher: Any
    tokens: list[int] = field(default_factory=list)

    def fork(self) -> _State:
        return _State(self.matcher.deep_copy(), list(self.tokens))

    def move_to(self, tokens: Sequence[int]) -> bool:
        """Read or take back tokens until it has read ``tokens``; False where that is impossible, and the state is of no more use."""
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b), min(len(self.tokens), len(tokens)))
        back = len(self.tokens) - same
        if back and not self.matcher.rollback(back):
            return False
        self.tokens = list(tokens)
        return all(self.matcher.consume_token(token) for token in tokens[same:])


class Grammars:
    """Compiled grammars over one tokenizer; safe to use from several threads.

    Args:
        tokenizer: of transformers; None: every byte is a token.
        eos_ids: tokens that end a response.
        owner: name of the model in errors.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], owner: str = "model") -> None:
        self.tokenizer, self.eos_ids, self.owner = tokenizer, frozenset(eos_ids), owner
        self._roots: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._read_tokenizer: Any = None
        self._lock = Lock()

    def matcher(self, structure: tuple[str, str]) -> Any:
        """A new matcher of a grammar, before the first token.

        Args:
            structure: name of the setting, and its text (:attr:`ivg.types.SamplingParams.structure`).

        Raises:
            ConfigError: it cannot be read, or does more than llguidance can; or the tokenizer is none that it knows.
            MissingDependencyError: no llguidance.
        """
        with self._lock:
            found = self._roots.get(structure)
            if found is None:
                found = self._compile(*structure)
                self._roots[structure] = found
                while len(self._roots) > _GRAMMARS:
                    self._roots.popitem(last=False)
            self._roots.move_to_end(structure)
            return found.deep_copy()

    def allowed(self, matcher: Any, width: int, ends: Collection[int], least: int = 0) -> Any:
        """[width] of bool: which tokens may follow.

        Args:
            matcher: behind the response so far; None: the grammar excludes it, and nothing may follow.
            width: of the vocabulary.
            ends: tokens that end the response: allowed where the grammar is complete.
            least: so many more tokens must come before one of those, unless nothing else can.
        """
        out = np.zeros(width, dtype=bool)
        if matcher is None or matcher.is_error():
            return out
        if not (stopped := matcher.is_stopped()):
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            most = min(width, self._read_tokenizer.vocab_size)
            out[:most] = bits[:most]
        out[[i for i in ends if i < width]] = matcher.is_accepting() and (stopped or least <= 0)
        return out

    def _compile(self, name: str, text: str) -> Any:
        llguidance = _llguidance()
        if self._read_tokenizer is None:
            self._read_tokenizer = _tokenizer(llguidance, self)
        if name == "json_schema":
            text = llguidance_schema(json.loads(text))
        try:
            inner = llguidance.grammar_from(name, text)
        except ValueError as e:
            raise ConfigError(f"{name} cannot be read: {_first_line(str(e))}") from None
        parts = json.loads(inner)["grammars"] if inner.lstrip().startswith("{") else [{"lark_grammar": inner}]
        parts[0]["name"] = "inner"
        matcher = llguidance.LLMatcher(self._read_tokenizer, json.dumps({"grammars": [{"lark_grammar": _WHOLE}, *parts]}), log_level=0)
        if matcher.is_error():
            raise ConfigError(f"{name} cannot be used: {_first_line(matcher.get_error())}")
        return matcher


class GrammarMasks:
    """Masks for the hypotheses of one base.

    Args:
        vocabulary: of the base.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.grammars = Grammars(vocabulary.tokenizer, vocabulary.eos_ids, vocabulary.owner)
        self._states: OrderedDict[int, _State] = OrderedDict()

    def check(self, sampling: SamplingParams) -> None:
        """Raise where ``sampling`` has a grammar that cannot be used.

        Raises:
            ConfigError: it cannot be read, or does more than llguidance can; or the base's tokenizer is none that it knows.
            MissingDependencyError: no llguidance.
        """
        if sampling.structure is not None:
            self.grammars.matcher(sampling.structure)

    def restrict(
        self,
        logits: Tensor,
        nodes: Sequence[Beam | TokenSequence],
        params: Sequence[SamplingParams],
        lengths: Sequence[int] | None = None,
        *,
        in_place: bool = True,
    ) -> Tensor:
        """``logits`` [rows, vocabulary] without the tokens that the grammars of ``params`` forbid; itself where there are none.

        Args:
            logits: behind each node.
            nodes: one for each row.
            params: likewise.
            lengths: look at so many tokens of each node; default: all.
            in_place: write over ``logits``.
        """
        rows = [i for i, p in enumerate(params) if p.structure is not None and nodes[i].answer_start is not None]
        if not rows:
            return logits
        forbidden = np.empty((len(rows), logits.shape[1]), dtype=bool)
        for place, i in enumerate(rows):
            node = nodes[i]
            tokens = node.token_ids[node.answer_start : None if lengths is None else lengths[i]]
            ends = {*self.vocabulary.eos_ids, *params[i].stop_token_ids}
            forbidden[place] = ~self.grammars.allowed(self._matcher(node, tokens, params[i]), logits.shape[1], ends)
        out = logits if in_place else logits.clone()
        mask = torch.from_numpy(forbidden).to(out.device)
        if len(rows) == len(out):
            return out.masked_fill_(mask & ~out.isnan(), -torch.inf)
        out[rows] = out[rows].masked_fill(mask & ~out[rows].isnan(), -torch.inf)
        return out

    def completes(self, s: TokenSequence, *tokens: int) -> bool:
        """Is the grammar of ``s`` complete behind these further tokens, so that nothing can follow?"""
        sampling = s.request.sampling
        if sampling.structure is None or s.answer_start is None or any(map(s.ends_at, tokens)):
            return False
        matcher = self._matcher(s, [*s.token_ids[s.answer_start :], *tokens], sampling)
        return matcher is not None and bool(matcher.is_stopped() and matcher.is_accepting())

    def release(self, keys: Sequence[int]) -> None:
        """Free the matchers of these hypotheses."""
        for key in keys:
            self._states.pop(key, None)

    @property
    def live(self) -> int:
        """Hypotheses that have a matcher."""
        return len(self._states)

    def reset(self) -> None:
        """Free all matchers."""
        self._states.clear()

    def _matcher(self, node: Beam | TokenSequence, tokens: Sequence[int], params: SamplingParams) -> Any:
        """The matcher of ``node`` behind ``tokens``; None: the grammar excludes them."""
        assert params.structure is not None
        state = self._states.get(node.key)
        if state is None:
            parents = (self._states.get(key) for key in (node.parent, node.ancestor_key) if key is not None)
            parent = next((found for found in parents if found is not None), None)
            state = _State(self.grammars.matcher(params.structure)) if parent is None else parent.fork()
        if not state.move_to(tokens):
            state = _State(self.grammars.matcher(params.structure))
            if not state.move_to(tokens):
                self._states.pop(node.key, None)
                return None
        self._states[node.key] = state
        self._states.move_to_end(node.key)
        while len(self._states) > _STATES:
            self._states.popitem(last=False)
        return state.matcher


def _first_line(message: str) -> str:
    """Llguidance's message without the place in our own grammar."""
    line = message.strip().splitlines()[0]
    for prefix in ("failed to compile JSON schema: ", "failed to compile grammar: "):
        line = line.partition(prefix)[2] or line
    return line


def _tokenizer(llguidance: Any, grammars: Grammars) -> Any:
    import llguidance.hf

    if grammars.tokenizer is None:
        return llguidance.LLTokenizer("byte")
    try:
        return llguidance.hf.from_tokenizer(grammars.tokenizer, eos_token=sorted(grammars.eos_ids) or None)
    except Exception as e:  # of its Rust part
        raise ConfigError(
            f"structured output: llguidance cannot read the tokenizer of {grammars.owner}: {_first_line(str(e))}\n"
            "  leave json_schema, regex, choice and grammar out"
        ) from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingDependencyError("structured output needs the package llguidance\n  pip install 'ivg[structured]'") from None
    return llguidance
