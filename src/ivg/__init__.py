"""ivg: align causal language models at inference time, with small value functions and without touching their weights.

Importing this imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from ivg.utils.version import VERSION

if TYPE_CHECKING:
    from ivg.engines.transformers.engine import TransformersEngine
    from ivg.integrations.transformers import GuidanceLogitsProcessor, GuidedGenerate
    from ivg.model import GuidedModel
    from ivg.models.cached_lm import CachedLM
    from ivg.models.loading import LoadOptions
    from ivg.models.runner import ModelRunner
    from ivg.search.methods import METHODS, Method, get_method
    from ivg.search.searcher import Request, Search, Searcher
    from ivg.search.text_stream import AsyncTextStream, TextStream
    from ivg.types import (
        AsyncEngine,
        Beam,
        Completion,
        Engine,
        Message,
        Posterior,
        Prompt,
        Reward,
        SamplingParams,
        Step,
        TokenGuidance,
        Usage,
        Value,
    )
    from ivg.values.base import CompositeValue, FunctionValue, NormalizedValue, WorstCaseValue, batched
    from ivg.values.explicit import ExplicitValue
    from ivg.values.implicit import AutoregressiveReward, ImplicitValue
    from ivg.values.process import ProcessReward
    from ivg.values.reward import RewardModel

__version__ = VERSION

_HOME = {
    "ivg.search.searcher": ("Request", "Search", "Searcher"),
    "ivg.search.text_stream": ("AsyncTextStream", "TextStream"),
    "ivg.search.methods": ("METHODS", "Method", "get_method"),
    "ivg.engines.transformers.engine": ("TransformersEngine",),
    "ivg.integrations.transformers": ("GuidanceLogitsProcessor", "GuidedGenerate"),
    "ivg.models.runner": ("ModelRunner",),
    "ivg.models.loading": ("LoadOptions",),
    "ivg.models.cached_lm": ("CachedLM",),
    "ivg.model": ("GuidedModel",),
    "ivg.types": (
        "AsyncEngine",
        "Beam",
        "Completion",
        "Engine",
        "Message",
        "Posterior",
        "Prompt",
        "Reward",
        "SamplingParams",
        "Step",
        "TokenGuidance",
        "Usage",
        "Value",
    ),
    "ivg.values.base": ("CompositeValue", "FunctionValue", "NormalizedValue", "WorstCaseValue", "batched"),
    "ivg.values.explicit": ("ExplicitValue",),
    "ivg.values.implicit": ("AutoregressiveReward", "ImplicitValue"),
    "ivg.values.process": ("ProcessReward",),
    "ivg.values.reward": ("RewardModel",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "AsyncEngine",
    "AsyncTextStream",
    "AutoregressiveReward",
    "Beam",
    "CachedLM",
    "Completion",
    "CompositeValue",
    "Engine",
    "ExplicitValue",
    "FunctionValue",
    "GuidanceLogitsProcessor",
    "GuidedGenerate",
    "GuidedModel",
    "ImplicitValue",
    "LoadOptions",
    "Message",
    "Method",
    "ModelRunner",
    "NormalizedValue",
    "Posterior",
    "ProcessReward",
    "Prompt",
    "Request",
    "Reward",
    "RewardModel",
    "SamplingParams",
    "Search",
    "Searcher",
    "Step",
    "TextStream",
    "TokenGuidance",
    "TransformersEngine",
    "Usage",
    "Value",
    "WorstCaseValue",
    "__version__",
    "batched",
    "get_method",
]


_RENAMED = {
    "CachedModel": "ModelRunner",
    "Reader": "CachedLM",
    "STRATEGIES": "METHODS",
    "SearchGenerate": "GuidedGenerate",
    "SteeredModel": "GuidedModel",
    "Strategy": "Method",
    "strategy": "get_method",
}
"""Names of version 0.1, which version 0.3 will not have."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"ivg.{name} is now ivg.{_RENAMED[name]}; the old name works until 0.3", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ivg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
