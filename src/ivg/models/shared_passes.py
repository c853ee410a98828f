"""Lets two models whose networks have one shape read in the same passes (``models.stacked``), after a trial.

Must not depend on how models are loaded, nor what their outputs mean.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from ivg.errors import reason
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.models.stacked import StackedNetworks, find_difference
from ivg.models.trial import output_error

log = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-3}
"""Of ``models.trial.output_error``."""
_LOW_PRECISION_TOLERANCE = 0.1
_TEXTS = ((1, 4, 2, 5, 3, 7), (6, 2, 9, 1, 5, 5), (4, 3, 8, 2, 7, 6))
_OF_SECOND = (False, True, True)
"""Which network reads them."""
_STEPS = ((0, 1), (0, 1), (0, 1, 2), (0, 1, 2))
_COUNTS = ((3, 3, 0), (1, 1, 0), (1, 1, 4), (1, 1, 1))
"""How many tokens of each text the passes of the trial read: as many of each network and not, of one length and not."""


def share_passes(first: CachedLM, second: CachedLM, others: Iterable[CachedLM] = ()) -> bool:
    """Let both read in the same passes from now on, where their networks agree; False: they do not, and nothing changes.

    What either has read is forgotten. Their networks must not be changed any more, nor get adapters.

    Args:
        first: whose cache serves both.
        second: has weights of its own.
        others: of them, those that read with the network of ``second`` go on with it there.
    """
    if isinstance(second.model.row_weights, StackedNetworks):
        first, second = second, first
    host, member = first.model, second.model
    why = _fault(host, member)
    if why is None:
        name = _add(host, member)
        why = "a trial failed, or gave other outputs" if name is None else None
    if why is not None:
        log.debug("%s and %s are read in separate passes: %s", first.name, second.name, why)
        return False
    for reader in {second: None, **dict.fromkeys(others)}:
        if reader.model is member:
            reader.read_with(host, name)
    return True


def _fault(host: ModelRunner, member: ModelRunner) -> str | None:
    """Why the two cannot share passes; None: a trial will tell."""
    if host is member:
        return "they are one network"
    if not (host.cache.mixes_weights and member.cache.mixes_weights):
        return "a cache that holds rows of one network only"
    if host.before_pass is not None or member.before_pass is not None or member.row_weights is not None:
        return "adapters"
    if host.states is not None or member.states is not None:
        return "heads on their hidden states"
    if host.live_rows or member.live_rows:
        return "they have begun to read"
    if (host.support, host.limits) != (member.support, member.limits):
        return "they are read in other ways"
    return find_difference(host.network, member.network)


def _add(host: ModelRunner, member: ModelRunner) -> str | None:
    """The name under which ``host`` reads with the network of ``member``; None: it gives other outputs than ``member`` does."""
    before = host.row_weights
    stack = before if isinstance(before, StackedNetworks) else StackedNetworks(host.network)
    name, host.row_weights = stack.add(member.network), stack
    try:
        agree = _agree(stack, host, member, name)
    except Exception as e:  # the network's code may raise anything; what is wrong in separate passes, too, is said by those
        log.debug("the trial of shared passes failed: %s", reason(e))
        agree = False
    finally:
        host.reset_cache()
        member.reset_cache()
    if agree:
        return name
    stack.remove(name)
    host.row_weights = before
    return None


def _agree(stack: StackedNetworks, host: ModelRunner, member: ModelRunner, name: str) -> bool:
    """Does every row give in shared passes what it gives in passes of its own network, by its own weights in each module?"""
    size = int(host.config.vocab_size)
    texts = [[token % size for token in text] for text in _TEXTS]
    together = [host.open(text, weights=name if second else None) for text, second in zip(texts, _OF_SECOND, strict=True)]
    apart = [(member if second else host).open(text) for text, second in zip(texts, _OF_SECOND, strict=True)]
    calls: Counter[object] = Counter()
    hooks = [module.register_forward_hook(lambda module, *_: calls.update([module])) for module in stack.modules]
    try:
        for step, counts in zip(_STEPS, _COUNTS, strict=True):
            new = [texts[i][len(together[i].ids) :][: counts[i]] for i in step]
            calls.clear()
            got = host.last_outputs([together[i] for i in step], new)
            if any(calls[module] == 0 for module in stack.modules):
                return False  # its weights are read otherwise than by calling it
            alone = [(member if _OF_SECOND[i] else host).last_outputs([apart[i]], [n]) for i, n in zip(step, new, strict=True)]
            expected = torch.cat(alone)
            allowed = _TOLERANCE.get(expected.dtype, _LOW_PRECISION_TOLERANCE)
            if not output_error(got.float(), expected.float()) <= allowed:  # NaN is not
                return False
    finally:
        for hook in hooks:
            hook.remove()
    return True
