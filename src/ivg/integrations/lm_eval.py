"""The guided model in EleutherAI's lm-evaluation-harness (``lm-eval`` 0.4), as the model ``ivg``.

lm-eval loads no models of other packages by itself, so its command line is started here, where ``ivg`` is registered::

    python -m ivg.integrations.lm_eval --model ivg --model_args method=eft,beta=0.5,recipe=recipe.toml --tasks …

Log-likelihoods are those of the token-guided distribution at temperature 1 (:meth:`ivg.GuidedModel.logprobs`), so they need a method that
guides tokens alone; ``generate_until`` works with any method.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ivg.errors import ConfigError, IVGError, MissingDependencyError, ModelError
from ivg.factory.recipe import load_models
from ivg.integrations.flat_settings import REQUEST_SETTINGS, recipe_from
from ivg.integrations.generate_args import NEUTRAL_VALUES, is_neutral
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.search.given import NEUTRAL, given_logprobs, require_same_tokens
from ivg.search.request import Request
from ivg.types import Prompt

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as e:
    missing = MissingDependencyError(f"ivg.integrations.lm_eval needs lm-eval ({e})\n  pip install 'ivg[lm-eval]'")
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise missing from e

log = logging.getLogger("ivg")
SLICE = 64
"""Responses between two movements of the progress bar."""
UNLIMITED = 2048
"""Context where no model has a limit: lm-eval's own."""
_HARNESS_SETTINGS = frozenset({"until", "do_sample", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"})
"""What the harness itself reads in a task's ``generation_kwargs``."""


class ChatContext(str):
    """A chat as text, as the base's template renders it; every model reads its messages in its own template.

    Attributes:
        messages: the turns.
    """

    messages: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, text: str, messages: Sequence[dict[str, str]]) -> ChatContext:
        """``text`` with the messages that it was made of."""
        out = cls(text)
        out.messages = tuple(messages)
        return out


@register_model("ivg")
class IVGModel(TemplateLM):
    """A guided model for lm-eval.

    Args:
        recipe: TOML file with models, method and settings; others override it. Without models: the embedded ones.
        model: a loaded model in place of the recipe's.
        max_length: tokens that the models read of a text, whose last one is only predicted; default: as many as they can.
        max_gen_toks: of an answer, where the task says nothing.
        batch_size, max_batch_size: taken and not used: given texts are read 32 at a time, answers share batches as the search does.
        settings: of models (``base``, ``tuned`` …), search (``method``, ``beta`` …), sampling and run (``device``, ``dtype``, ``seed`` …).
            Those of sampling are for ``generate_until``, in place of the task's own; log-likelihoods are at temperature 1 without filters.

    Raises:
        ConfigError: an unknown setting; no method.
    """

    backend = "causal"

    def __init__(
        self,
        recipe: str | None = None,
        *,
        model: GuidedModel | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if str(settings.get("device")).startswith("cuda") and not torch.cuda.is_available():
            log.warning("no CUDA here: %s, which lm-eval also says where no device is given, is not used", settings.pop("device"))
        self.recipe = recipe_from({"recipe": recipe, **settings})
        self.model = load_models(self.recipe) if model is None else model
        self.base, self.tokenizer = self.model.base, self.model.base.tokenizer
        chosen = self.model.get_method(self.recipe.search.method, **self.recipe.search.settings())
        self.given = self.model.request("x", chosen, sampling=NEUTRAL)
        """The request whose prompt is replaced, for texts that are given."""
        self.method, self.max_gen_toks = chosen, max_gen_toks
        guidance = self.given.search.guidance
        self.value = None if guidance is None else guidance.value
        engine, selecting = self.model.engine, self.given.search.value
        guides = [] if self.value is None else self.value.cached_lms()
        selectors = [] if selecting is None else selecting.cached_lms()
        last = [(self.base, engine.reads_last_token(None)), *((lm, engine.reads_last_token(guidance)) for lm in guides)]
        self.max_length = max_length or _shortest((lm, int(read)) for lm, read in last)
        """Tokens that are read before the last one of a given text."""
        self.context = max_length or _shortest((lm, 0) for lm in (self.base, *guides, *selectors))
        """Tokens of a prompt and its answer."""

    # What lm-eval asks of a tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: beginning of sequence, else its end."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, as lm-eval's model ``hf`` encodes it."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=special))

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text that remembers its messages, so that every model reads them in its own template."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(chat_history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except ValueError:  # no template of its own: the recipe may have one
            text = json.dumps(chat_history, ensure_ascii=False)
        return ChatContext.of(text, chat_history)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"ivg_method": self.method.name, "ivg_search": self.recipe.search.settings()}

    # Log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it greedy) of each continuation under the guided distribution."""
        pairs = [self._pair(*request.args[:2]) for request in requests]
        out = self._score(pairs, "loglikelihood", disable_tqdm)
        for request, result in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return out

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(self._token_prompt(context, context_ids, ids), tuple(ids)) for (context, _), context_ids, ids in requests]
        return self._score(pairs, "loglikelihood", disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the context."""
        pairs: list[tuple[Prompt, tuple[int, ...]]] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            tokens, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
            for window in get_rolling_token_windows(tokens, prefix, self.max_length, 1):
                context, ids = make_disjoint_window(window)
                pairs.append((self._plain_prompt(context), tuple(ids)))
                owner.append(i)
        out = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._score(pairs, "loglikelihood_rolling", disable_tqdm), strict=True):
            out[i] += logprob
        for request, total in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def _score(self, pairs: Sequence[tuple[Prompt, tuple[int, ...]]], name: str, quiet: bool) -> list[tuple[float, bool]]:
        out: list[tuple[float, bool]] = []
        with tqdm(total=len(pairs), disable=quiet, desc=f"Running {name} requests") as bar:
            for start in range(0, len(pairs), SLICE):
                some = pairs[start : start + SLICE]
                requests = [self.given.with_prompt(prompt) for prompt, _ in some]
                found = given_logprobs(self.model.engine, self.model.lock, requests, [ids for _, ids in some])
                out += [(result.logprob, result.is_greedy) for result in found]
                bar.update(len(some))
        if name == "loglikelihood" and (zero := sum(logprob == -math.inf for logprob, _ in out)):
            log.warning(
                "%d of %d continuations have probability 0: %s never draws a token of theirs. Choices that are all 0 cannot be compared, "
                "and lm-eval takes the first. Give more candidates, or a guide with the base's vocabulary.",
                zero, len(out), self.method.name,
            )  # fmt: skip
        return out

    # Texts

    def _pair(self, context: str, continuation: str) -> tuple[Prompt, tuple[int, ...]]:
        """Prompt and response of a continuation."""
        if isinstance(context, ChatContext) or (context and self.base.template is not None):
            prompt = self._prompt(context)
            return prompt, self.base.response_tokens(prompt, continuation)
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
        else:
            context_ids, ids = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == context_ids:
                ids = ids[1:]
        return self._token_prompt(context, context_ids, ids), tuple(ids)

    def _prompt(self, context: str) -> Prompt:
        """What is answered, for models that read it in a template."""
        return Prompt.of(list(context.messages)) if isinstance(context, ChatContext) else Prompt(context)

    def _token_prompt(self, context: str, context_ids: Sequence[int], ids: Sequence[int]) -> Prompt:
        """The context as lm-eval's tokens, its beginning cut off where it is too long; guides with templates read its text.

        As in ``hf``, the last token of the continuation takes no room: nothing is predicted behind it.
        """
        kept = tuple(context_ids[-max(1, self.max_length + 1 - len(ids)) :])
        text = context.rstrip() if len(kept) == len(context_ids) else self.base.vocabulary.prompt_text(kept)
        return Prompt(text, kept)

    def _plain_prompt(self, ids: Sequence[int]) -> Prompt:
        """Tokens that all models read as they are: a text has no prompt.

        Raises:
            PromptError: a model reads prompts in a template, or has another vocabulary.
        """
        prompt = self.base.own(Prompt(self.base.vocabulary.prompt_text(ids), tuple(ids)))
        require_same_tokens(prompt, self.base, self.value)
        return prompt

    # Answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers by the method: greedy unless the task or the settings say otherwise."""
        seen: Counter[str] = Counter()
        made = []
        for request in requests:
            context, settings = request.args[:2]
            key = json.dumps([context, settings], default=str)
            made.append(self._answer_request(context, _settings_of_task(settings, request.task_name), seen[key]))
            seen[key] += 1
        out = [""] * len(requests)
        with tqdm(total=len(made), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for i, completion in self.model.run(made):
                if completion.error is not None:
                    raise ModelError(f"answer {i + 1} of {len(made)}: {completion.error}")
                out[i] = completion.text
                self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
                bar.update()
        return out

    def _answer_request(self, context: str, settings: dict[str, Any], index: int) -> Request:
        """The search request of an answer; ``index`` counts equal ones, which are other samples."""
        found = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        found.pop("do_sample", None)
        until = [text for text in _texts(found.pop("until")) if text]
        length = int(found.pop("max_gen_toks"))
        sampling = {"temperature": 0.0, **found, **self.recipe.sampling.settings()}
        sampling = {"max_new_tokens": length, "stop": tuple(until), **sampling}
        if isinstance(context, ChatContext) or self.base.template is not None:
            prompt = self._prompt(context)
        else:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            kept = tuple(ids[-max(1, self.context - int(sampling["max_new_tokens"])) :])
            prompt = Prompt(context if len(kept) == len(ids) else self.base.vocabulary.prompt_text(kept), kept)
        request = self.model.request(prompt, self.method, seed=self.recipe.run.seed, index=index, **sampling)
        return replace(request, from_checkpoint={})


def _settings_of_task(given: dict[str, Any], task: str | None) -> dict[str, Any]:
    """A task's ``generation_kwargs`` without arguments of ``generate`` that change nothing.

    Raises:
        ConfigError: an argument that changes answers and is no setting here; names it.
    """
    out = {}
    for name, value in given.items():
        if name in REQUEST_SETTINGS or name in _HARNESS_SETTINGS:
            out[name] = value
        elif not is_neutral(name, value):
            whose = f"the task {task}" if task else "the task"
            neutral = next(iter(NEUTRAL_VALUES.get(name, ())), None)
            advice = "give max_gen_toks in its place, or " if name == "max_length" else ""
            advice = advice if neutral is None else f"give --gen_kwargs {name}={neutral}, or "
            raise ConfigError(
                f"{name}={value!r} in generation_kwargs of {whose} is no setting of ivg and may change answers\n"
                f"  {advice}remove it from the task, or leave the task out"
            )
    return out


def _shortest(models: Iterable[tuple[CachedLM, int]]) -> int:
    """The shortest context of ``models``, each less so many tokens."""
    return min((lm.max_positions - less for lm, less in models if lm.max_positions is not None), default=UNLIMITED)


def _texts(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


if __name__ == "__main__":
    try:
        cli_evaluate()
    except IVGError as e:
        sys.exit(f"error: {e}")
