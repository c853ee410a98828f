"""For tests, ours and yours: laws that every value and every engine obeys, fake engines, tiny models.

The laws are functions that raise AssertionError; docs/how-to/extending.md shows how to call them for a value or engine of your own.

=============  ====================================================================
``values``     :func:`check_value` and the laws of which it is made
``engines``    :func:`check_engine` and the laws of which it is made
``fakes``      :class:`FakeEngine`, :class:`AsyncFakeEngine`: letters for tokens
``models``     a byte tokenizer, tiny random language models and values
=============  ====================================================================
"""

from ivg.testing.engines import (
    check_children,
    check_chunks,
    check_engine,
    check_engine_batch,
    check_engine_life_cycle,
    check_outputs_are_kept,
    check_unsupported,
)
from ivg.testing.fakes import AsyncFakeEngine, FakeEngine, sample_from_weights
from ivg.testing.models import ARCHITECTURES, EOS, byte_tokenizer, hypothesis, tiny_lm, tiny_model, tiny_value
from ivg.testing.values import (
    check_batch_invariance,
    check_cache,
    check_candidates,
    check_drafter,
    check_inherit_cache,
    check_linearity,
    check_recent_deltas,
    check_token_sum,
    check_value,
    check_value_life_cycle,
    check_vocabulary,
)

__all__ = [
    "ARCHITECTURES",
    "EOS",
    "AsyncFakeEngine",
    "FakeEngine",
    "byte_tokenizer",
    "check_batch_invariance",
    "check_cache",
    "check_candidates",
    "check_children",
    "check_chunks",
    "check_drafter",
    "check_engine",
    "check_engine_batch",
    "check_engine_life_cycle",
    "check_inherit_cache",
    "check_linearity",
    "check_outputs_are_kept",
    "check_recent_deltas",
    "check_token_sum",
    "check_unsupported",
    "check_value",
    "check_value_life_cycle",
    "check_vocabulary",
    "hypothesis",
    "sample_from_weights",
    "tiny_lm",
    "tiny_model",
    "tiny_value",
]
