"""Reward models: any sequence classifier, on text, with its own tokenizer.

Encoders see the whole text at once and cannot keep a cache, so each call reads the whole text: use them at the end of
responses (best-of-N) or for few, long chunks; for every prefix an explicit value is cheaper and better.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ivg.embedded import PREFIX
from ivg.errors import ConfigError
from ivg.models.chat import apply_chat_template, is_chat, render, turns
from ivg.models.loading import LoadOptions, load_network, load_tokenizer
from ivg.types import Hypothesis, Prompt
from ivg.values.base import FunctionValue


class Reward(Protocol):
    """What scores whole responses: a :class:`RewardModel`, a :class:`~ivg.values.base.FunctionValue`, or your own."""

    name: str

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each (prompt, response)."""
        ...


class RewardModel:
    """A sequence classifier as a value of prompt + response.

    One label: its logit. Two labels: logit of label 1 minus logit of label 0 (METHOD, section 5: POS - NEG). More: name
    the label.

    Args:
        network: a transformers ``*ForSequenceClassification``.
        tokenizer: its own.
        template: ``"chat"``: prompt and response as a conversation in the tokenizer's chat template; a format string with
            ``{prompt}`` and optionally ``{response}`` (else the response follows); None: ``"{prompt}{response}"``.
        label: index of the label whose logit is the reward.
        name: in usage and traces.
        batch_size: texts for each forward pass.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        template: str | None = None,
        label: int | None = None,
        name: str = "reward",
        batch_size: int = 64,
    ) -> None:
        labels = network.config.num_labels
        if label is None and labels > 2:
            raise ConfigError(f"{name} has {labels} labels\n  say which one is the reward: label=0…{labels - 1}")
        self.network, self.tokenizer, self.template = network.eval(), tokenizer, template
        if template is None:
            self.template = getattr(network.config, "ivg_template", None)  # as it was trained
        self.label, self.name, self.batch_size = label, name, batch_size
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if network.config.pad_token_id is None:
            network.config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        template: str | None = None,
        label: int | None = None,
        options: LoadOptions | None = None,
        name: str = "reward",
    ) -> RewardModel:
        """Load from a directory or the hub."""
        from transformers import AutoModelForSequenceClassification

        options = options or LoadOptions()
        tokenizer = load_tokenizer(path, options, name)
        return cls(load_network(path, AutoModelForSequenceClassification, options, name), tokenizer, template, label, name)

    def text(self, prompt: Prompt, response: str) -> str:
        """What the classifier reads."""
        if is_chat(prompt, self.template):
            answer = {"role": "assistant", "content": response}
            return apply_chat_template([*turns(prompt), answer], self.tokenizer, self.name)
        text = render(prompt, self.tokenizer, self.template, self.name)
        return text.replace("{response}", response) if "{response}" in (self.template or "") else text + response

    def ids(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of what :meth:`text` gave; a chat template has written its own first token already."""
        first = self.tokenizer.bos_token
        special = not (first and text.startswith(first))
        return self.tokenizer(text, add_special_tokens=special, truncation=limit is not None, max_length=limit).input_ids

    def rewards(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """(reward, number of tokens read) of every text; texts of like length share a pass."""
        known = (getattr(self.network.config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        limit = min((n for n in known if n and n < 1 << 30), default=None)
        ids = [self.ids(t, limit) for t in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, padding_side="right", return_tensors="pt")
            with torch.no_grad():
                logits = self.network(**batch.to(self.network.device)).logits.float()
            if self.label is not None:
                reward = logits[:, self.label]
            else:
                reward = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            for i, r in zip(chosen, reward.tolist(), strict=True):
                out[i] = r
        return out, [len(i) for i in ids]

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each (prompt, response)."""
        return self.rewards([self.text(prompt, response) for prompt, response in pairs])[0] if pairs else []

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The reward of prompt + response for each hypothesis."""
        rewards, tokens = self.rewards([self.text(h.prompt, h.text) for h in hypotheses])
        for h, n in zip(hypotheses, tokens, strict=True):
            h.meter.add(self.name, n)
        return rewards

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where the template refuses the prompt. Longer texts are cut at the classifier's limit."""
        self.text(prompt, "x")

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept."""


def load_reward(
    path: str | Path, *, template: str | None = None, label: int | None = None, options: LoadOptions | None = None, name: str = "reward"
) -> RewardModel | FunctionValue:
    """A reward model from a directory or the hub, or a Python function: ``module:function``, ``path/to/file.py:function``.

    The function takes prompt and response as texts and returns a number, higher is better.

    Raises:
        ConfigError: no such function.
        ModelError: no such model.
    """
    if is_function(path):
        return FunctionValue(load_function(str(path)), name)
    return RewardModel.from_pretrained(path, template=template, label=label, options=options, name=name)


def is_function(path: str | Path) -> bool:
    """Does ``path`` name a Python function rather than a model?"""
    text = str(path)
    return ":" in text and not text.startswith(PREFIX) and not Path(text).exists()


def load_function(name: str) -> Callable[[str, str], float]:
    """The function ``module:function`` or ``path/to/file.py:function``.

    Raises:
        ConfigError: no such module or function; what went wrong in it.
    """
    module, _, function = name.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise ImportError(f"no module {module}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            loaded = importlib.import_module(module)
        found = getattr(loaded, function)
    except Exception as e:  # whatever a user's module raises
        raise ConfigError(
            f"cannot load the function {name!r}: {type(e).__name__}: {e}\n  expected module:function or file.py:function"
        ) from e
    if not callable(found):
        raise ConfigError(f"{name!r} is no function\n  expected one of (prompt text, response text) that returns a number")
    return found
