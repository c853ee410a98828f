"""Training rows as tokens: prompts as at inference, followed by responses; rows that are too long are left out, never truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ivg.errors import ConfigError
from ivg.models.chat_template import encode
from ivg.models.prompt_template import PromptTemplate
from ivg.models.shared_prompts import shared_length
from ivg.models.vocabulary import Vocabulary
from ivg.training.data import RatedResponse, SFTExample
from ivg.types import Preference, Prompt
from ivg.values.reward import RewardModel


@dataclass(frozen=True)
class Encoded:
    """A tokenised row for value training.

    Attributes:
        ids: tokens of prompt and response.
        prompt_length: tokens of the prompt.
        score: reward of the response.
        group: index of the prompt.
        policy_prompt: the prompt in the tokens and the template of CD-Q's policy.
    """

    ids: list[int]
    prompt_length: int
    score: float = 0.0
    group: int = 0
    policy_prompt: tuple[int, ...] = ()


PromptRows = tuple[Encoded, ...]
"""Responses to one prompt that are read in one pass (``models.shared_prompts``)."""


def prompt_rows(rows: Sequence[Encoded], max_length: int) -> list[PromptRows]:
    """Rows of one prompt together, in the order of the first of each; no more than ``max_length`` tokens in one pass."""
    found: list[list[Encoded]] = []
    open_at: dict[int, int] = {}
    for row in rows:
        at = open_at.get(row.group)
        if at is None or shared_length(as_texts([*found[at], row])) > max_length:
            at = open_at[row.group] = len(found)
            found.append([])
        found[at].append(row)
    return [tuple(group) for group in found]


def as_texts(rows: Sequence[Encoded]) -> list[tuple[list[int], int]]:
    """A group of ``models.shared_prompts``."""
    return [(row.ids, row.prompt_length) for row in rows]


def read_template(template: str | None, tokenizer: Any, *, judges: bool = False) -> str | None:
    """``template`` as a trained model keeps it: of a file its text; a chat template in a file becomes that of ``tokenizer``: ``chat``.

    Args:
        template: a text with ``{prompt}``, ``chat``, a file, or None.
        tokenizer: of the model.
        judges: the model is a reward, whose template may say where the response goes; others read the response behind the prompt.

    Raises:
        ConfigError: the file cannot be read, is no template, or has ``{response}`` where the model does not judge.
    """
    found, settings = PromptTemplate(template).resolved
    if not judges and "{response}" in (found or ""):
        raise ConfigError(
            f"the template {template!r} has {{response}}, which templates of rewards alone may have\n"
            "  give the part before the response, with {prompt}; the response follows it"
        )
    if settings:
        tokenizer.chat_template = settings["chat_template"]
    return found


def response_ids(
    prompt: Prompt | None, response: str, vocabulary: Vocabulary, template: str | None, *, ends: bool
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids), tokenised separately, as in generation. ``ends``: append the end-of-sequence token."""
    tokenizer = vocabulary.tokenizer
    before = encode(prompt, tokenizer, template) if prompt is not None else tokenizer("").input_ids
    after = vocabulary.response_ids(before, response)
    if ends and tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    return list(before), list(after)


def encode_sft(rows: Sequence[SFTExample], tokenizer: Any, template: str | None, max_length: int) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``completion_mask`` for TRL's SFT; rows longer than ``max_length`` are left out."""
    out, vocabulary = [], Vocabulary(tokenizer)
    for row in rows:
        before, after = response_ids(row.prompt, row.response, vocabulary, template, ends=row.ends)
        if len(before) + len(after) <= max_length:
            out.append({"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)})
    return out


def encode_preferences(rows: Sequence[Preference], tokenizer: Any, template: str | None, max_length: int) -> list[dict[str, list[int]]]:
    """``prompt_ids``, ``chosen_ids``, ``rejected_ids`` for TRL's DPO; rows longer than ``max_length`` are left out."""
    vocabulary = Vocabulary(tokenizer)

    @cache
    def read(prompt: Prompt, response: str, ends: bool) -> tuple[list[int], list[int]]:  # a response may be in many pairs
        return response_ids(prompt, response, vocabulary, template, ends=ends)

    out = []
    for row in rows:
        before, chosen = read(row.prompt, row.chosen, row.chosen_ends)
        _, rejected = read(row.prompt, row.rejected, row.rejected_ends)
        if chosen and rejected and len(before) + max(len(chosen), len(rejected)) <= max_length:
            out.append({"prompt_ids": before, "chosen_ids": chosen, "rejected_ids": rejected})
    return out


def encode_rated(
    rows: Sequence[RatedResponse], tokenizer: Any, template: str | None, max_length: int, policy: tuple[Any, str | None] | None = None
) -> list[Encoded]:
    """Rows for value training: with their own ``token_ids`` if these are this tokenizer's, else tokenised again as text.

    ``policy``: tokenizer and template of CD-Q's policy.
    """
    out: list[Encoded] = []
    vocabulary = Vocabulary(tokenizer)
    groups: dict[Prompt, int] = {}
    for row in rows:
        before, after = response_ids(row.prompt, row.response, vocabulary, template, ends=row.ends)
        if row.token_ids and row.response and vocabulary.response_text(before, row.token_ids).startswith(row.response):
            after = list(row.token_ids)
        group = groups.setdefault(row.prompt, len(groups))
        if after and len(before) + len(after) <= max_length:
            for_policy = tuple(encode(row.prompt, *policy)) if policy is not None else ()
            out.append(Encoded(before + after, len(before), row.score, group, for_policy))
    return out


def encode_for_reward(rows: Sequence[Preference], reader: RewardModel, max_length: int) -> list[dict[str, list[int]]]:
    """``chosen_ids`` and ``rejected_ids`` for TRL's reward trainer: the texts that ``reader`` scores at inference."""

    @cache
    def read(prompt: Prompt, response: str) -> list[int]:  # a response may be in many pairs
        return reader.ids(reader.text(prompt, response))

    out = []
    for row in rows:
        chosen, rejected = read(row.prompt, row.chosen), read(row.prompt, row.rejected)
        if max(len(chosen), len(rejected)) <= max_length:
            out.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return out
