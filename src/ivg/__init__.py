"""ivg: align any causal language model at inference time, with small value functions and without touching its weights.

Importing this imports no torch; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivg.decoding.search import Request, Search, Searcher
    from ivg.decoding.strategies import STRATEGIES, Strategy, strategy
    from ivg.engine.transformers import TransformersEngine
    from ivg.hooks import GuidanceLogitsProcessor, SearchGenerate
    from ivg.models.cached import CachedModel
    from ivg.models.loading import LoadOptions
    from ivg.models.reader import Reader
    from ivg.steered import SteeredModel
    from ivg.types import Beam, Completion, Message, Prompt, SamplingParams, Step, TokenGuidance, Usage
    from ivg.values.base import CompositeValue, FunctionValue
    from ivg.values.explicit import ExplicitValue
    from ivg.values.implicit import AutoregressiveReward, ImplicitValue
    from ivg.values.reward import RewardModel

__version__ = "0.1.0"

_HOME = {
    "ivg.decoding.search": ("Request", "Search", "Searcher"),
    "ivg.decoding.strategies": ("STRATEGIES", "Strategy", "strategy"),
    "ivg.engine.transformers": ("TransformersEngine",),
    "ivg.hooks": ("GuidanceLogitsProcessor", "SearchGenerate"),
    "ivg.models.cached": ("CachedModel",),
    "ivg.models.loading": ("LoadOptions",),
    "ivg.models.reader": ("Reader",),
    "ivg.steered": ("SteeredModel",),
    "ivg.types": ("Beam", "Completion", "Message", "Prompt", "SamplingParams", "Step", "TokenGuidance", "Usage"),
    "ivg.values.base": ("CompositeValue", "FunctionValue"),
    "ivg.values.explicit": ("ExplicitValue",),
    "ivg.values.implicit": ("AutoregressiveReward", "ImplicitValue"),
    "ivg.values.reward": ("RewardModel",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "STRATEGIES",
    "AutoregressiveReward",
    "Beam",
    "CachedModel",
    "Completion",
    "CompositeValue",
    "ExplicitValue",
    "FunctionValue",
    "GuidanceLogitsProcessor",
    "ImplicitValue",
    "LoadOptions",
    "Message",
    "Prompt",
    "Reader",
    "Request",
    "RewardModel",
    "SamplingParams",
    "Search",
    "SearchGenerate",
    "Searcher",
    "SteeredModel",
    "Step",
    "Strategy",
    "TokenGuidance",
    "TransformersEngine",
    "Usage",
    "__version__",
    "strategy",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ivg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
