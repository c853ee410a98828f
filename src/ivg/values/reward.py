"""Reward models: any sequence classifier, on text, with its own tokenizer.

Encoders read the whole text at once and have no cache, so each call reads everything again: use them at the end of responses
(best-of-N) or for few, long chunks; for prefixes an explicit value is cheaper and better.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ivg.embedded import PREFIX
from ivg.errors import ConfigError, ModelError, PromptError, ScoreFault
from ivg.models.chat_template import apply_chat_template, is_chat, render, template_arguments, text_ids, turns
from ivg.models.loading import LoadOptions, load_config, load_network, load_tokenizer
from ivg.models.prompt_template import NO_CHAT_SETTINGS, PromptTemplate
from ivg.models.weights import WeightsError
from ivg.types import Hypothesis, Prompt, Reward, Steps
from ivg.types.scores import finite_score, require_scores
from ivg.types.steps import DEFAULT_SEPARATOR
from ivg.values.base import FunctionValue
from ivg.values.classifier import SequenceClassifier, check_ids, check_label, token_limit
from ivg.values.process import ProcessReward, StepLogProbs, StepReward
from ivg.values.truncation import truncate_prompt

if TYPE_CHECKING:
    from ivg.settings.search import StepAggregation


@dataclass(frozen=True)
class Reading:
    """Token ids of one text, and a note if they do not cover all of it."""

    ids: list[int]
    note: str | None = None


class RewardModel(Reward):
    """A sequence classifier as a value of prompt + response.

    One label: its logit. Two labels: logit of label 1 minus logit of label 0 (positive - negative sentiment). More: name
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

    chat_settings: Mapping[str, Any] = NO_CHAT_SETTINGS
    """Of ``apply_chat_template``."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        template: str | PromptTemplate | None = None,
        label: int | None = None,
        name: str = "reward",
        batch_size: int = 64,
    ) -> None:
        check_label(network, label, name, "is the reward")
        self.network, self.tokenizer = network.eval(), tokenizer
        self.template, self.chat_settings = _reward_template(template)
        if self.template is None:
            trained = getattr(network.config, "ivg_value", None) or {}  # of a scalar value, which is a classifier of one label
            self.template = getattr(network.config, "ivg_template", None) or trained.get("template")  # as it was trained
        self.label, self.name, self.batch_size = label, name, batch_size
        self._stepwise: StepwiseReward | None = None
        self.limit = token_limit(network, tokenizer)
        """Tokens that the classifier reads at most; None: no limit."""
        self._classifier = SequenceClassifier(self.network, batch_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        template: str | PromptTemplate | None = None,
        label: int | None = None,
        options: LoadOptions | None = None,
        name: str = "reward",
    ) -> RewardModel:
        """Load from a directory or the hub.

        Raises:
            ModelError: no sequence classifier: a language model, a value network, a classifier of tokens; says what to use instead.
        """
        from transformers import AutoModelForSequenceClassification

        options = options or LoadOptions()
        config = load_config(path, options, name)
        written = ", ".join(getattr(config, "architectures", None) or ())
        if "TokenClassification" in written:
            raise ModelError(
                f"{name} {str(path)!r} is a {written}: it scores every token or step (a process reward), not a whole response\n"
                "  expected a sequence classifier; ivg.ProcessReward and --reward read process rewards"
            )
        tokenizer = load_tokenizer(path, options, name)
        try:
            network = load_network(path, AutoModelForSequenceClassification, options, name)
        except WeightsError as e:
            if (getattr(config, "ivg_value", None) or {}).get("head") is not None:
                raise ModelError(f"{name} {str(path)!r} is a value network, not a sequence classifier\n  give it as --value") from e
            if any(kind in written for kind in ("CausalLM", "LMHead", "ConditionalGeneration")):
                raise ModelError(
                    f"{name} {str(path)!r} is a language model ({written}), not a sequence classifier: its scores would be random\n"
                    "  a language model whose log-probability is the reward: --arm; a tuned one beside its start: --tuned and --untuned"
                ) from e
            raise
        return cls(network, tokenizer, template, label, name)

    def text(self, prompt: Prompt, response: str) -> str:
        """What the classifier reads."""
        begun = prompt.continued
        if is_chat(prompt, self.template):
            given = turns(prompt)
            last = {"role": "assistant", "content": response} if begun is None else {**given.pop(), "content": begun + response}
            settings = {**self.chat_settings, **template_arguments(prompt)}
            return apply_chat_template([*given, last], self.tokenizer, self.name, **settings)
        if "{response}" not in (self.template or ""):
            return render(prompt, self.tokenizer, self.template, self.name) + response
        if begun is not None:
            prompt, response = replace(prompt, content=prompt.content[:-1]), begun + response
        return render(prompt, self.tokenizer, self.template, self.name).replace("{response}", response)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of :meth:`text`, with one beginning-of-sequence token.

        Raises:
            PromptError: the classifier has no embedding for one.
        """
        return self._ids(text)

    def _ids(self, text: str, **cut: Any) -> list[int]:
        ids = text_ids(text, self.tokenizer, verbose=False, **cut)
        check_ids(ids, self.network, self.tokenizer, self.name)
        return ids

    def read(self, prompt: Prompt, response: str) -> Reading:
        """The token ids of prompt and response; if they are too long, the prompt loses its beginning.

        Raises:
            PromptError: the response alone is too long.
        """
        ids = self.ids(self.text(prompt, response))
        limit = self.limit
        if limit is None or len(ids) <= limit:
            return Reading(ids)
        short = truncate_prompt(prompt, lambda shorter: len(self.ids(self.text(shorter, response))) <= limit)
        if short is None:
            alone = len(self.ids(response))
            raise PromptError(
                f"{self.name} reads at most {limit} tokens, and the response alone has {alone}\n"
                "  ask for fewer new tokens, or use a reward model with a longer context"
            )
        note = f"{self.name} reads at most {limit} tokens: the beginning of the prompt was left out"
        return Reading(self.ids(self.text(short, response)), note)

    def note(self, prompt: Prompt, response: str) -> str | None:
        """What is left out when this is scored; None: nothing."""
        try:
            return self.read(prompt, response).note
        except PromptError:
            return None

    def rewards(self, texts: Sequence[str], *, truncate: bool = False) -> tuple[list[float], list[int]]:
        """(reward, number of tokens read) of every text, as :meth:`text` gives them.

        Args:
            texts: prompt and response together.
            truncate: read the beginning of texts that are too long: right for documents, wrong for a prompt with its response.

        Raises:
            PromptError: a token of :meth:`ids`, or too long a text (:meth:`judge` knows where the response begins and cuts the prompt).
        """
        cut: dict[str, Any] = {"truncation": True, "max_length": self.limit} if truncate and self.limit is not None else {}
        ids = [self._ids(text, **cut) for text in texts]
        if self.limit is not None and (longest := max(map(len, ids), default=0)) > self.limit:
            raise PromptError(f"{self.name} reads at most {self.limit} tokens, got {longest}\n  call judge() with prompt and response")
        return self.logits(ids), [len(i) for i in ids]

    def logits(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """The reward of every text, given as token ids."""
        logits = self._classifier.logits(ids)
        if self.label is None and logits.shape[1] == 2:
            return (logits[:, 1] - logits[:, 0]).tolist()  # type: ignore[no-any-return]
        return logits[:, self.label or 0].tolist()  # type: ignore[no-any-return]

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each (prompt, response).

        Raises:
            ScoreError: some cannot be read; has the scores of all others.
        """
        return require_scores([score for score, _ in self.read_all(pairs)])

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The reward of prompt + response for each hypothesis; raises as :meth:`judge`."""
        found = self.read_all([(h.prompt, h.text) for h in hypotheses])
        for h, (_, reading) in zip(hypotheses, found, strict=True):
            if reading is not None:
                h.token_counter.add(self.name, len(reading.ids))
                if reading.note:
                    h.token_counter.note(reading.note)
        return require_scores([score for score, _ in found])

    def read_all(self, pairs: Sequence[tuple[Prompt, str]]) -> list[tuple[float | ScoreFault, Reading | None]]:
        """The reward of each (prompt, response) with what was read for it, or why there is none."""
        readings: list[Reading | ScoreFault] = []
        for prompt, response in pairs:
            try:
                readings.append(self.read(prompt, response))
            except PromptError as e:
                readings.append(ScoreFault(str(e), prompt=True))
        rewards = iter(self.logits([r.ids for r in readings if isinstance(r, Reading)]))
        name = f"the value {self.name}"
        return [(finite_score(name, next(rewards)), r) if isinstance(r, Reading) else (r, None) for r in readings]

    def with_steps(self, steps: Steps) -> StepwiseReward | None:
        """This classifier read at the end of each step, where ``steps`` say how the steps make one number.

        Raises:
            ConfigError: it is read by one label of several.
        """
        if steps.step_aggregation is None:
            return None
        if self._stepwise is None:
            self._stepwise = StepwiseReward(self)
        return self._stepwise.with_steps(steps)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where the template refuses the prompt, or :meth:`ids` a token; any length is accepted, see :meth:`read`."""
        self.ids(self.text(prompt, "x"))

    def networks(self) -> list[tuple[str, Any]]:
        """The classifier."""
        return [(self.name, self.network)]


class StepwiseReward(StepReward):
    """A classifier of texts, read at the end of each step: p = sigmoid(reward of prompt and response up to there).

    Args:
        reward: a reward model whose number is a log-odds: of one label, or of two (label 1 minus label 0).
        aggregation: see :class:`StepReward`.
        separator: ends a step.
    """

    def __init__(self, reward: RewardModel, aggregation: StepAggregation = "last", separator: str = DEFAULT_SEPARATOR) -> None:
        super().__init__(reward.name, aggregation, separator)
        if reward.label is not None and reward.network.config.num_labels > 1:
            raise ConfigError(
                f"{reward.name} is read by label {reward.label}, whose logit is no log-odds\n"
                "  for step_aggregation use a classifier of one label or two, without label"
            )
        self.reward = reward

    def log_probabilities(self, pairs: Sequence[tuple[Prompt, str]]) -> list[StepLogProbs | ScoreFault]:
        """Log p of each step, from one text for each."""
        texts = [[(prompt, text) for text in _up_to_each_step(response, self.separator)] for prompt, response in pairs]
        found = iter(self.reward.read_all([pair for some in texts for pair in some]))
        out: list[StepLogProbs | ScoreFault] = []
        for some in texts:
            read = [next(found) for _ in some]
            fault = next((score for score, _ in read if isinstance(score, ScoreFault)), None)
            if fault is not None:
                out.append(fault)
                continue
            readings = [reading for _, reading in read if reading is not None]
            logits = torch.tensor([score for score, _ in read], dtype=torch.float64)
            note = next((r.note for r in readings if r.note), None)
            out.append(StepLogProbs(torch.nn.functional.logsigmoid(logits).tolist(), sum(len(r.ids) for r in readings), note))
        return out

    def note(self, prompt: Prompt, response: str) -> str | None:
        """What is left out when the longest text is scored; None: nothing."""
        return self.reward.note(prompt, response)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """As the reward model."""
        self.reward.check(prompt, new_tokens)

    def networks(self) -> list[tuple[str, Any]]:
        """The classifier."""
        return self.reward.networks()


def _up_to_each_step(response: str, separator: str) -> list[str]:
    """The response up to the end of each of its steps, separators between them as they are, none at the end."""
    ends, place = [], 0
    for piece in response.split(separator):
        if piece.strip():
            ends.append(place + len(piece))
        place += len(piece) + len(separator)
    return [response[:end] for end in ends] or [response]


def _reward_template(template: str | PromptTemplate | None) -> tuple[str | None, Mapping[str, Any]]:
    """As :attr:`PromptTemplate.resolved`; a format string may have ``{response}`` in place of ``{prompt}``."""
    if isinstance(template, str) and "{response}" in template:
        return template, NO_CHAT_SETTINGS
    return PromptTemplate.of(template).resolved


def load_reward(
    path: str | Path,
    *,
    template: str | PromptTemplate | None = None,
    label: int | None = None,
    options: LoadOptions | None = None,
    name: str = "reward",
) -> RewardModel | ProcessReward | FunctionValue:
    """A reward from a directory or the hub, or a Python function: ``module:function``, ``path/to/file.py:function``.

    A classifier of texts is a reward model, a classifier of tokens a process reward.

    The function takes prompt and response as texts and returns a number, higher is better.

    Raises:
        ConfigError: no such function, or a function with an adapter.
        ModelError: no such model.
    """
    if is_function(path):
        if options is not None and options.adapter is not None:
            raise ConfigError(f"{name} {str(path)!r} is a Python function, which has no adapter\n  leave adapter out")
        return FunctionValue(load_function(str(path)), name)
    options = options or LoadOptions()
    written = getattr(load_config(path, options, name), "architectures", None) or ()
    kind = ProcessReward if any("TokenClassification" in architecture for architecture in written) else RewardModel
    return kind.from_pretrained(path, template=template, label=label, options=options, name=name)


def is_function(path: str | Path) -> bool:
    """Does ``path`` name a Python function rather than a model?"""
    text = str(path)
    return ":" in text and not text.startswith(PREFIX) and not Path(text).exists()


def load_function(name: str) -> Callable[[str, str], float]:
    """The function ``module:function`` or ``path/to/file.py:function``.

    Raises:
        ConfigError: no such module or function, or an error in it.
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
        raise ConfigError(f"{name!r} is not a function\n  expected one of (prompt text, response text) that returns a number")
    return found
