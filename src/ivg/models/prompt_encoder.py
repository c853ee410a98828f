"""How one model reads prompts and hypotheses: in its own tokens, behind its own prompt.

Handles templates, vocabularies, lengths. Must not depend on networks: they may run here (``models.cached_lm``) or inside another engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar

from ivg.errors import ContextLengthError, PromptError
from ivg.models.cache import common_length
from ivg.models.chat_template import encode_each, encode_rendered, is_chat, join_instruction, render
from ivg.models.image_prompts import ImageEncoder, ImageInputs
from ivg.models.prompt_template import PromptTemplate
from ivg.models.vocabulary import Vocabulary, check_embedded
from ivg.settings.chat import ChatSettings
from ivg.types import Beam, Hypothesis, Message, Prompt, new_key
from ivg.types.messages import check_text

T = TypeVar("T")


class PromptCache(Generic[T]):
    """A function of prompts, whose last ``size`` results are kept; the content of pictures is not."""

    def __init__(self, function: Callable[[Prompt], T], size: int) -> None:
        self.function, self.size = function, size
        self._of_text = lru_cache(maxsize=size)(function)
        self._of_images: OrderedDict[Prompt, T] = OrderedDict()
        self.cache_info = self._of_text.cache_info

    def cache_clear(self) -> None:
        """Forget all results."""
        self._of_text.cache_clear()
        self._of_images.clear()

    def __call__(self, prompt: Prompt) -> T:
        """The function's result."""
        if not prompt.images:
            return self._of_text(prompt)
        key = prompt.without_data
        if key not in self._of_images:
            self._of_images[key] = self.function(prompt)
            while len(self._of_images) > self.size:
                self._of_images.popitem(last=False)
        self._of_images.move_to_end(key)
        return self._of_images[key]


class PromptEncoder:
    """The tokenizer and template of one model.

    Args:
        name: of the model, in usage and errors.
        tokenizer: its own.
        template: see :class:`~ivg.models.prompt_template.PromptTemplate`.
        eos_ids: ids that end a response; default: the tokenizer's.
        vocab_size: rows of the model's embedding.
        max_positions: tokens that it can read at most; None: any number.
        limit_reason: why no more, where it is not simply the model's context.
        system: an instruction that this model alone reads before every prompt (see ``models.chat_template.render``).
        instruction: read the request's own behind it, where it has one: which of ``Prompt.contrast`` and ``Prompt.negative``.
    """

    reads_given_ids = False
    """Takes the tokens of a prompt that has them (``Prompt.token_ids``) whatever its template: True for the base alone."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        template: str | PromptTemplate | None = None,
        eos_ids: Sequence[int] | None = None,
        *,
        vocab_size: int,
        max_positions: int | None = None,
        limit_reason: str = "",
        system: str | None = None,
        instruction: Literal["contrast", "negative"] | None = None,
    ) -> None:
        self.system, self.instruction = system, instruction
        self.name, self.tokenizer = name, tokenizer
        self.template, self.chat_settings = PromptTemplate.of(template).resolved
        self.vocab_size, self.max_positions, self.limit_reason = vocab_size, max_positions, limit_reason
        self.vocabulary = Vocabulary(tokenizer, eos_ids, owner=name)
        self.generation_config: Any = None
        """The checkpoint's sampling defaults (transformers' ``GenerationConfig``), where it has any."""
        self.images: ImageEncoder | None = None
        """Reads prompts with pictures, where the model can; all others read the text of such a prompt alone."""
        self._encodes_as: dict[int, tuple[PromptEncoder, bool]] = {}
        self.prompt_ids = PromptCache(self._prompt_ids, 512)
        self._rendered = PromptCache(self._render, 64)

    def _render(self, prompt: Prompt) -> str:
        return render(prompt, self.tokenizer, self.template, self.name, self.chat_settings, self.system_of(prompt))

    def system_of(self, prompt: Prompt) -> str | None:
        """The instruction that this model reads before ``prompt``; None: it reads the prompt alone."""
        own = {"contrast": prompt.contrast, "negative": prompt.negative}[self.instruction] if self.instruction else None
        return self.system if own is None else own if self.system is None else join_instruction(self.system, own)

    def own(self, prompt: Prompt) -> Prompt:
        """The prompt with this model's vocabulary, where it has tokens of the base without saying whose they are."""
        return replace(prompt, vocabulary=self.vocabulary) if prompt.token_ids is not None and prompt.vocabulary is None else prompt

    def root(self, prompt: Prompt, new_tokens: int) -> Beam:
        """The empty response to ``prompt`` by this model, the base.

        Raises:
            PromptError: empty, or too long together with ``new_tokens``, or with pictures for a model that reads none.
        """
        prompt = self.read_images(self.own(prompt))
        self.check_length(prompt, new_tokens)
        state = self.vocabulary.start_decoding(self.prompt_ids(prompt))
        return Beam(new_key(), None, prompt, vocabulary=self.vocabulary, inherits=False, decoded=state)

    def read_images(self, prompt: Prompt) -> Prompt:
        """``prompt`` with the content of its pictures (see :class:`~ivg.models.images.ImageReader`).

        Raises:
            PromptError: this model reads none; or one cannot be read.
        """
        if not prompt.images:
            return prompt
        if self.images is None:
            raise PromptError(f"the prompt has pictures, but {self.title} reads text alone\n  {self.images_advice}")
        return self.images.reader.read(prompt)

    @property
    def title(self) -> str:
        """The model in an error: its role and what it is."""
        return self.name

    images_advice = "expected a vision-language model with a processor, on the engine transformers"
    """What to do where there are pictures that the model does not read."""

    def image_inputs(self, prompt: Prompt) -> ImageInputs | None:
        """What the model takes beside the tokens of ``prompt``; None: nothing."""
        return self.images.inputs(prompt) if self.images is not None and prompt.images else None

    def make_beam(self, prompt: Prompt, response: str) -> Beam:
        """A beam for a response that was not generated here, in this model's tokens.

        Raises:
            PromptError: ``response`` is no Unicode text, or holds a token that the model has no embedding for.
        """
        check_text(response, "the response")
        prompt = self.own(prompt)
        try:
            before = self.prompt_ids(prompt)
        except PromptError:  # chat messages, and a base without a chat template: a value may have one
            before = ()
        ids = self.response_ids(before, response)
        return Beam(new_key(), None, prompt, ids, response, vocabulary=self.vocabulary, inherits=False)

    def response_tokens(self, prompt: Prompt, response: str | Sequence[int]) -> tuple[int, ...]:
        """A response that was not generated here, in this model's tokens; those that are given are kept.

        Raises:
            PromptError: no Unicode text; a token outside the vocabulary.
        """
        if isinstance(response, str):
            return self.make_beam(prompt, response).token_ids
        given = tuple(response) if isinstance(response, Iterable) else (response,)
        ids = tuple(i for i in given if isinstance(i, int))
        if len(ids) < len(given):
            raise PromptError(f"unusable response {str(response)[:60]}\n  expected text, or a list of token ids")
        self._check_ids(ids, "response")
        return ids

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if (inputs := self.image_inputs(prompt)) is not None:
            return inputs.ids
        plain = self.template is None and self.system_of(prompt) is None
        if prompt.token_ids is not None and (self.reads_given_ids or plain):
            known = prompt.vocabulary is not None or self.reads_given_ids
            if known and self.vocabulary.same_as(prompt.vocabulary):
                if self.reads_given_ids:
                    self._check_ids(prompt.token_ids)
                return tuple(self.own_ids(prompt.token_ids))
        ids = tuple(encode_rendered(self._rendered(prompt), self.tokenizer, chat=is_chat(prompt, self.template)))
        check_embedded(ids, self.tokenizer, self.vocab_size, self.name)
        return ids

    def _check_ids(self, ids: Sequence[int], what: str = "prompt") -> None:
        """Raise PromptError for token ids that the model has no embedding for."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise PromptError(
                f"{what} token {wrong} is outside the vocabulary of {self.name}\n  expected ids from 0 to {self.vocab_size - 1}"
            )

    def response_ids(self, prompt_ids: Sequence[int], text: str) -> tuple[int, ...]:
        """A response that is given as text, in this model's tokens (see :meth:`~ivg.models.vocabulary.Vocabulary.response_ids`).

        Raises:
            PromptError: it holds a token that this model has no embedding for.
        """
        ids = tuple(self.vocabulary.response_ids(prompt_ids, text))
        check_embedded(ids, self.tokenizer, self.vocab_size, self.name, "response")
        return ids

    def has_thought(self, prompt: Prompt, marker: str) -> bool:
        """Does the answer to ``prompt`` begin at once: is ``marker`` in the begun turn, or at the end of what a template begins it with?"""
        begun = prompt.continued or ""
        given = prompt.token_ids if self.reads_given_ids else None
        text = self._rendered(prompt) if given is None else self.vocabulary.decode(given)
        if begun and text.endswith(begun):
            text = text[: -len(begun)]
        return marker in begun or text.rstrip().endswith(marker.strip() or marker)

    def check_length(self, prompt: Prompt, new_tokens: int) -> int:
        """Length of the prompt in this model's tokens.

        Raises:
            PromptError: prompt and answer together outgrow the model's context.
        """
        length, limit = len(self.prompt_ids(prompt)), self.max_positions
        if limit is None or length + new_tokens <= limit:
            return length
        context = f"context of {self.name} ({limit}{f': {self.limit_reason}' if self.limit_reason else ''})"
        if length >= limit:
            message = (
                f"prompt of {length} tokens leaves no room in the {context}\n  shorten the prompt by at least {length - limit + 1} tokens"
            )
        else:
            message = (
                f"prompt of {length} tokens + {new_tokens} new tokens > {context}\n"
                f"  shorten the prompt, or ask for at most {limit - length} new tokens"
            )
        raise ContextLengthError(message, model=self.name, length=length, new_tokens=new_tokens, limit=limit)

    def ids(self, h: Hypothesis) -> tuple[list[int], int]:
        """(all tokens of prompt and response, how many of them are prompt).

        With the base's vocabulary: its very tokens. With another: the text is tokenised again, and a token that spans the end of the
        prompt counts as response. An end-of-sequence token of the base becomes this model's own.
        """
        return self.ids_of([h])[0]

    def ids_of(self, hypotheses: Sequence[Hypothesis]) -> list[tuple[list[int], int]]:
        """:meth:`ids` of each; texts are tokenised together."""
        texts = [h for h in hypotheses if not self.vocabulary.same_as(h.vocabulary) and h.text]  # text last: it decodes
        tokenised: dict[int, list[int]] = {}
        for chat in (False, True):
            some = [h for h in texts if is_chat(h.prompt, self.template) == chat]
            encoded = encode_each([(self._rendered(h.prompt), h.text) for h in some], self.tokenizer, chat=chat)
            tokenised |= {id(h): ids for h, ids in zip(some, encoded, strict=True)}
        return [self._joined(h, tokenised.get(id(h))) for h in hypotheses]

    def encodes_as(self, other: PromptEncoder) -> bool:
        """Does :meth:`ids` give for any hypothesis what it gives for ``other``? False where that is not known. Cached for each pair."""
        known = self._encodes_as.get(id(other))
        if known is None:
            known = self._encodes_as[id(other)] = (other, other is self or _settings_of(self) == _settings_of(other))
        return known[1]

    def _joined(self, h: Hypothesis, tokenised: list[int] | None) -> tuple[list[int], int]:
        """As :meth:`ids`; ``tokenised``: prompt and text, where this model has another vocabulary."""
        prompt = self.prompt_ids(h.prompt)
        if self.vocabulary.same_as(h.vocabulary):
            return [*prompt, *self.own_ids(h.token_ids)], len(prompt)
        ids = list(prompt) if tokenised is None else self.own_ids(tokenised)
        prompt_length = common_length(prompt, ids)
        if h.token_ids and h.token_ids[-1] in h.vocabulary.eos_ids and (end := self.eos_id) is not None:
            ids.append(end)
        return ids, prompt_length

    def own_ids(self, tokens: Sequence[int]) -> list[int]:
        """The base's tokens as this model's, which shares its vocabulary but for tokens that the base may have added."""
        known = self.vocab_size
        if max(tokens, default=0) < known:
            return list(tokens)
        end = self.eos_id or 0
        return [t if t < known else end for t in tokens]

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text for this model; None: none that it has an embedding for."""
        return self.vocabulary.eos_id_below(self.vocab_size)

    def last_id(self, h: Hypothesis) -> int:
        """The last token of prompt and response."""
        if h.token_ids and self.vocabulary.same_as(h.vocabulary) and len(self.prompt_ids(h.prompt)) + len(h.token_ids) > 1:
            return self.own_ids(h.token_ids[-1:])[0]
        ids, _ = self.ids(h)
        self.check_two_tokens(ids)
        return ids[-1]

    def check_two_tokens(self, ids: Sequence[int]) -> None:
        """Raise PromptError where ``ids`` is one token: nothing comes before it."""
        if len(ids) < 2:
            raise PromptError(f"{self.name}: a vocabulary head gives no value for a text of one token")


def _settings_of(encoder: PromptEncoder) -> Any:
    """All that tokens depend on, to be compared; what cannot be compared equals nothing."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or encoder.images is not None:
        return object()
    own = (encoder.template, encoder.chat_settings, encoder.system, encoder.instruction, encoder.reads_given_ids, encoder.vocab_size)
    special = (tokenizer.special_tokens_map, tokenizer.chat_template, sorted(encoder.vocabulary.eos_ids))
    return type(tokenizer), own, special, backend.to_str()


def has_chat_template(base: PromptEncoder) -> bool:
    """Can the base read messages?"""
    return base.template is not None or bool(getattr(base.tokenizer, "chat_template", None))


def conversation_prompt(messages: Iterable[Message], base: PromptEncoder, chat: ChatSettings | None = None) -> Prompt:
    """A conversation for ``base``: its messages, if the base has a chat template or there are pictures; else their texts, one a line.

    A base without a chat template refuses pictures (:meth:`PromptEncoder.read_images`): they are not dropped here.

    Args:
        messages: the turns, in order.
        base: answers.
        chat: how the messages are rendered; no effect on texts.
    """
    turns = tuple(messages)
    if has_chat_template(base) or any(m.images for m in turns):
        return Prompt(turns, chat=chat or ChatSettings())
    return Prompt("\n".join(m.text for m in turns))
