"""The nouns of ivg: prompts, beams, values, engines, completions. Standard library only.

An engine makes beams longer, a value turns beams into numbers, a selection rule makes beams fewer (docs/explanation/concepts.md).

==============  =========================================================
``messages``    prompts and chat messages
``images``      pictures in messages
``tool_calls``  calls of functions in messages
``beam``        hypotheses of a response
``value``       :class:`Value`, the base class, and sums of values
``reward``      :class:`Reward`, base class of values of whole texts
``engine``      :class:`Engine` and :class:`AsyncEngine`, base classes
``completion``  what comes back
``scores``      what values return, checked
``steps``       steps of a response
``thinking``    responses that begin with thinking
``preference``  pairs of responses
==============  =========================================================
"""

from ivg.settings.sampling import SamplingParams
from ivg.types.beam import Beam, DecodeState, FinishReason, Hypothesis, TokenCounter, TokenLogprobs, new_key
from ivg.types.completion import (
    Completion,
    Particle,
    Posterior,
    ResponseLogprobs,
    Step,
    TraceNode,
    Usage,
    by_likelihood,
    likeliest,
    note_failed,
)
from ivg.types.engine import AsyncEngine, Engine, EntropyStop, ExpandOutput, ExpandRequest, LogprobsRequest, TokenGuidance
from ivg.types.images import Image
from ivg.types.messages import Message, Prompt
from ivg.types.preference import Preference
from ivg.types.reward import Reward
from ivg.types.steps import Steps
from ivg.types.thinking import Thinking
from ivg.types.tool_calls import ToolCall
from ivg.types.value import Drafter, Value

__all__ = [
    "AsyncEngine",
    "Beam",
    "Completion",
    "DecodeState",
    "Drafter",
    "Engine",
    "EntropyStop",
    "ExpandOutput",
    "ExpandRequest",
    "FinishReason",
    "Hypothesis",
    "Image",
    "LogprobsRequest",
    "Message",
    "Particle",
    "Posterior",
    "Preference",
    "Prompt",
    "ResponseLogprobs",
    "Reward",
    "SamplingParams",
    "Step",
    "Steps",
    "Thinking",
    "TokenCounter",
    "TokenGuidance",
    "TokenLogprobs",
    "ToolCall",
    "TraceNode",
    "Usage",
    "Value",
    "by_likelihood",
    "likeliest",
    "new_key",
    "note_failed",
]
