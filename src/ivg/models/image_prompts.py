"""Prompts with pictures, as a vision-language model reads them: its processor's token ids, and tensors beside them.

The chat template of the processor places the pictures. Must not depend on networks or caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ivg.errors import PromptError, reason
from ivg.models.chat_template import (
    SYSTEM_ROLES,
    chat_arguments,
    join_instruction,
    template_arguments,
    turn_fields,
    turns,
    with_known_roles,
)
from ivg.models.images import ImageReader
from ivg.models.prompt_template import CHAT, NO_CHAT_SETTINGS
from ivg.models.tool_prompts import Messages, check_tools_shown, with_readable_arguments
from ivg.settings.images import ImagesConfig
from ivg.types import Image, Message, Prompt

_KEPT = 4
"""Prompts whose tensors are kept; those of others are made again."""
_TOKENS = ("image_token", "boi_token", "video_token")
"""Attributes of processors and tokenizers: tokens that stand for a picture."""


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """What a network takes beside the token ids of a prompt.

    Attributes:
        ids: of the prompt, placeholders of the pictures included.
        aligned: tensors of one number for each token [1, tokens], by the network's name for them (``token_type_ids``).
        tensors: the others: pixels, sizes.
        digest: of all tensors: other pictures, another digest.
    """

    ids: tuple[int, ...]
    aligned: Mapping[str, Tensor] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    digest: str

    @property
    def length(self) -> int:
        """Leading tokens that are read in one pass, with the pictures: all but the last, behind which the answer begins."""
        return len(self.ids) - 1

    def for_pass(self, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors for a pass over the first ``length`` tokens; beyond the prompt there is text."""
        out = {}
        for name, tensor in self.aligned.items():
            out[name] = torch.nn.functional.pad(tensor, (0, max(0, length - tensor.shape[1])))[:, :length].to(device)
        for name, tensor in self.tensors.items():
            out[name] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        return out


class ImageEncoder:
    """The processor of one base model.

    Args:
        name: of the model, for errors.
        load: gives the processor; called when the first picture comes.
        limits: see :class:`~ivg.models.images.ImageReader`.
        template: of the base: None or ``"chat"``, since the processor's own places pictures.
        settings: of ``apply_chat_template``.
        system: an instruction that is read before every prompt (see ``models.chat_template.render``).
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Any],
        limits: ImagesConfig | None = None,
        *,
        template: str | None = None,
        settings: Mapping[str, Any] = NO_CHAT_SETTINGS,
        system: str | None = None,
    ) -> None:
        self.name, self._load = name, load
        self.template, self.settings, self.system = template, settings, system
        self.reader = ImageReader(limits)
        self.inputs = lru_cache(maxsize=_KEPT)(self._inputs)

    @cached_property
    def processor(self) -> Any:
        """Transformers' processor.

        Raises:
            PromptError: there is none.
        """
        try:
            return self._load()
        except Exception as e:  # whatever transformers raises
            raise PromptError(
                f"{self.name} has no processor that can be loaded, so it reads no pictures: {reason(e)}\n"
                "  expected processor_config.json or preprocessor_config.json beside the weights"
            ) from e

    def _inputs(self, prompt: Prompt) -> ImageInputs:
        """A prompt in the processor's chat template.

        Raises:
            PromptError: a picture that cannot be read, a template that leaves pictures out, text with the token of a picture.
        """
        if self.template not in (None, CHAT):
            raise PromptError(
                f"{self.name} has the template {self.template!r}\n  pictures are placed by its own chat template: leave it out"
            )
        pictures = [self.reader.decode(image) for image in prompt.images]
        processor = self.processor
        self._check_text(prompt)
        messages = self._messages(prompt, pictures)
        try:
            more = chat_arguments(prompt, self.settings)
            found = processor.apply_chat_template(self._known(messages), tokenize=True, return_dict=True, return_tensors="pt", **more)
        except Exception as e:  # templates and processors are code of the checkpoint
            raise PromptError(f"the processor of {self.name} refuses this prompt with pictures: {reason(e)}") from e
        inputs = _image_inputs(found, self.name)
        if inputs.ids[-1] in (getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]):
            raise PromptError(f"to {self.name} the prompt ends with a picture\n  put some text behind it")
        return inputs

    def _check_text(self, prompt: Prompt) -> None:
        """Raise where a text, a call or a tool holds the token of a picture, which would stand for a picture of its own."""
        tokens = {getattr(source, name, None) for source in (self.processor, self.processor.tokenizer) for name in _TOKENS}
        read = str((turns(prompt), template_arguments(prompt)))
        for token in sorted(str(token) for token in tokens if token):
            if token in read:
                raise PromptError(f"the text of the prompt holds {token}, which stands for a picture to {self.name}\n  take it out")

    def _messages(self, prompt: Prompt, pictures: Sequence[Any]) -> Messages:
        """The messages in the form that the chat template reads, with the pictures in their places.

        Raises:
            PromptError: the template leaves out pictures or text in every form.
        """
        assert not isinstance(prompt.content, str)
        given, arguments = self._behind_instruction(prompt.content), chat_arguments(prompt, self.settings)
        texts = [part.strip() for turn in given for part in turn.parts or (turn.content,) if isinstance(part, str)]
        problem: Exception | None = None
        attempt = partial(self._attempt, arguments=arguments)
        for as_parts in (True, False):
            waiting = iter(pictures)
            messages = with_readable_arguments([_message(turn, waiting, as_parts=as_parts) for turn in given], attempt)
            try:
                text = self._rendered(messages, arguments)
                bare = [_message(turn, None, as_parts=as_parts) for turn in given]
                without = self._rendered(with_readable_arguments(bare, attempt), arguments)
            except Exception as e:
                problem = problem or e
                continue
            if text != without and all(part in text for part in texts) and "{'type': 'image'" not in text:
                check_tools_shown(text, messages, arguments.get("tools") or (), self.name, attempt)
                return messages
        why = f": {reason(problem)}" if problem is not None else ": it leaves out pictures or text"
        raise PromptError(f"the chat template of {self.name} cannot read these messages with pictures{why}")

    def _behind_instruction(self, given: Sequence[Message]) -> list[Message]:
        if self.system is None:
            return list(given)
        first = given[0]
        if first.role not in SYSTEM_ROLES:
            return [Message("system", self.system), *given]
        if first.parts:
            raise PromptError(f"{self.name} has an instruction of its own, and the system turn has pictures\n  put them into a user turn")
        return [Message(first.role, join_instruction(self.system, first.content)), *given[1:]]

    def _known(self, messages: Messages) -> list[dict[str, Any]]:
        return with_known_roles(messages, self.processor, self.settings)

    def _attempt(self, messages: Messages, more: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
        try:
            return self._rendered(messages, {**arguments, **more})
        except Exception:  # the template is code of the checkpoint
            return None

    def _rendered(self, messages: Messages, arguments: Mapping[str, Any]) -> str:
        return str(self.processor.apply_chat_template(self._known(messages), tokenize=False, **arguments))


def _message(turn: Message, pictures: Any, *, as_parts: bool) -> dict[str, Any]:
    """A message for a processor; without ``pictures``, its text alone. ``as_parts``: messages of text alone are lists of parts, too."""
    if not turn.parts and not as_parts:
        return turn_fields(turn)
    parts: list[dict[str, Any]] = []
    for part in turn.parts or (turn.content,):
        if isinstance(part, Image):
            parts += [] if pictures is None else [{"type": "image", "image": next(pictures)}]
        else:
            parts.append({"type": "text", "text": part})
    return {**turn_fields(turn), "content": parts}


def _image_inputs(found: Mapping[str, Any], name: str) -> ImageInputs:
    """What the processor of ``name`` returned for one prompt."""
    ids: Tensor = found["input_ids"]
    rest = {key: value for key, value in found.items() if key not in ("input_ids", "attention_mask")}
    if others := [key for key, value in rest.items() if not isinstance(value, Tensor)]:
        raise PromptError(f"the processor of {name} returns {', '.join(others)}, which are no tensors\n  expected one tensor of each kind")
    aligned = {name: value for name, value in rest.items() if value.shape == ids.shape and not value.is_floating_point()}
    tensors = {name: value for name, value in rest.items() if name not in aligned}
    digest = hashlib.sha256()
    for name, value in sorted(rest.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return ImageInputs(tuple(ids[0].tolist()), aligned, tensors, digest.hexdigest())
