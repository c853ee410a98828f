"""Models with the chat template of a real family: one that writes what a function says, by real guidance; one whose answers are random."""

import torch
from typing_extensions import override

from ivg.model import GuidedModel
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_lm
from ivg.types import SamplingParams, Value
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue
from tool_chats import template

RECIPE = Recipe.model_validate({"search": {"method": "custom", "token": "script"}})


class Script(Value):
    """Prefers the tokens of a script, and the end behind it.

    Args:
        script: the response to a prompt.
        vocabulary: of the base.
    """

    name = "script"

    def __init__(self, script, vocabulary):
        self.script, self._vocabulary = script, vocabulary

    @property
    @override
    def vocabulary(self):
        return self._vocabulary

    @override
    def full_vocabulary(self):
        return True

    @override
    def score(self, hypotheses):
        return [0.0 for _ in hypotheses]

    @override
    def deltas(self, hypotheses):
        out = torch.zeros(len(hypotheses), self.vocabulary.size)
        for row, h in zip(out, hypotheses, strict=True):
            ids = [*self.vocabulary.tokenizer(self.script(h.prompt), add_special_tokens=False).input_ids, min(self.vocabulary.eos_ids)]
            row[ids[len(h.token_ids)]] = 1000.0
        return out


def _tokenizer(family, special):
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template(family)
    return tokenizer


def random_chat(family="qwen2_5", special=()):
    """A model with random weights, guided by others with random weights and searched for shortness: ``eft``, ``ivg`` …"""
    tokenizer = _tokenizer(family, special)
    base, tuned, untuned = (
        tiny_lm(name, seed=seed, tokenizer=tokenizer, context=8192) for seed, name in enumerate(("base", "tuned", "not"))
    )
    values = {"implicit": ImplicitValue(tuned, untuned), "explicit": FunctionValue(lambda prompt, response: -len(response), "explicit")}
    return GuidedModel(base, values, SamplingParams(temperature=1.0, max_new_tokens=400))


def scripted(script, family="qwen2_5", special=()):
    """The model; ``special`` are further special tokens of its tokenizer."""
    tokenizer = _tokenizer(family, special)
    base = tiny_lm("base", tokenizer=tokenizer, context=8192)
    return GuidedModel(base, {"script": Script(script, base.vocabulary)}, SamplingParams(temperature=1.0, max_new_tokens=400))
