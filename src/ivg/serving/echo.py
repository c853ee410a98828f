"""Prompts in responses: ``echo``, and log-probabilities of their tokens under the guided distribution.

A token of a prompt has the log-probability with which the method would draw it behind the tokens before it: softmax at temperature 1,
without filters, whatever the request's own are. All models must read the prompt as the base's very tokens. Independent of HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ivg.model import GuidedModel
from ivg.search.given import check_distribution, given_logprobs, split_prompt
from ivg.search.request import Request
from ivg.types import Completion, Prompt, ResponseLogprobs, Usage

STEP_TOKENS = 2048
"""Tokens of prompts that are read between two steps of the search, or one prompt."""


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """One prompt as the response shows it.

    Attributes:
        text: as the client gave it, or decoded.
        first: its first token: id and text; it has no log-probability.
        rest: the others; None: no log-probabilities are wanted.
    """

    text: str
    first: tuple[int, str] = (0, "")
    rest: ResponseLogprobs | None = None


@dataclass(slots=True)
class EchoJob:
    """The prompts of one HTTP request, read some at a time, so that no other request waits long.

    Attributes:
        model: reads them.
        template: the request without its prompt; None: the texts alone are wanted.
        prompts: of the request, in order.
        alternatives: likely tokens for each position.
        echoed: those that are done.
    """

    model: GuidedModel
    template: Request | None
    prompts: Sequence[Prompt]
    alternatives: int
    echoed: list[EchoedPrompt] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Have all been read?"""
        return len(self.echoed) == len(self.prompts)

    @property
    def forward_tokens(self) -> Counter[str]:
        """Tokens that each model has read for it."""
        read: Counter[str] = Counter()
        for prompt in self.echoed:
            read.update(prompt.rest.forward_tokens if prompt.rest is not None else {})
        return read

    def check(self) -> None:
        """Raise where they can have no log-probabilities.

        Raises:
            ConfigError: the method, or the engine.
            PromptError: a model that reads a prompt as other tokens.
        """
        if self.template is not None:
            check_distribution(self.template)
            for prompt in self.prompts:
                self._split(self.template, prompt)

    def step(self) -> None:
        """Read some more.

        Raises:
            IVGError: a model failed.
        """
        left = self.prompts[len(self.echoed) :]
        if self.template is None:
            self.echoed += [EchoedPrompt(_text(prompt)) for prompt in left]
            return
        pairs: list[tuple[Prompt, tuple[int, ...]]] = []
        while left[len(pairs) :] and (not pairs or sum(len(ids) for _, ids in pairs) < STEP_TOKENS):
            pairs.append(self._split(self.template, left[len(pairs)]))
        requests = [replace(self.template, prompt=first) for first, _ in pairs]
        found = given_logprobs(self.model.engine, self.model.lock, requests, [ids for _, ids in pairs], self.alternatives)
        for prompt, (first, _), rest in zip(left, pairs, found, strict=False):
            token = (first.token_ids or (0,))[0]
            self.echoed.append(EchoedPrompt(_text(prompt), (token, self.model.base.vocabulary.prompt_text([token])), rest))

    def _split(self, template: Request, prompt: Prompt) -> tuple[Prompt, tuple[int, ...]]:
        guidance = template.search.guidance
        return split_prompt(self.model.base.own(prompt), self.model.base, None if guidance is None else guidance.value)


def no_completion(prompt_tokens: int) -> Completion:
    """What a request gets that wants no text (``max_tokens: 0``)."""
    return Completion("", (), None, "length", Usage({}, prompt_tokens, 0, 0.0))


def _text(prompt: Prompt) -> str:
    assert isinstance(prompt.content, str)  # of a completion
    return prompt.content
