"""The last hidden states of a network's body, beside the outputs of a forward pass: heads that were trained on them need no other pass.

A hook on the body keeps them, so that whoever calls the network (``models.slot_forward``, ``models.state_cache``) need not know. Which
networks can be read so is tried (:func:`gives_states`). Must not depend on rows or hypotheses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ivg.errors import reason
from ivg.models.placement import compute_dtype, input_device
from ivg.models.trial import output_error

log = logging.getLogger(__name__)
_TRIAL = ((5, 3, 2), (2, 6, 4))
"""Tokens of two rows."""


class PassOutputs(NamedTuple):
    """What a forward pass gives: outputs [rows, positions, vocabulary or 1]; where they are kept, states [rows, positions, hidden]."""

    outputs: Tensor
    states: Tensor | None

    def of(self, head: nn.Module | None) -> Tensor:
        """The outputs; with ``head``: its outputs on the states."""
        if head is None:
            return self.outputs
        assert self.states is not None
        return cast("Tensor", head(self.states))


class HiddenStates:
    """Keeps what ``body`` gives while :meth:`kept` is open.

    Args:
        body: of the network whose passes are run.
    """

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self._thread = threading.local()  # passes of the user's own, in other threads, are not ours
        body.register_forward_hook(self._keep)

    def _keep(self, body: nn.Module, args: Any, output: Any) -> None:
        if (pieces := getattr(self._thread, "pieces", None)) is not None:
            pieces.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """States [rows, columns, hidden] of all calls that are made meanwhile, in order: those of one pass, or its columns in pieces."""
        pieces: list[Tensor] = []
        self._thread.pieces = pieces
        try:
            yield pieces
        finally:
            self._thread.pieces = None


def last_columns(pieces: list[Tensor], keep: int) -> Tensor:
    """The states of the last ``keep`` columns of a pass, which may have been called in pieces (or again, from the beginning)."""
    if len(pieces) == 1 or pieces[-1].shape[1] >= keep:
        return pieces[-1][:, -keep:]
    return torch.cat(pieces, 1)[:, -keep:]


@torch.no_grad()
def gives_states(network: Any) -> bool:
    """Does ``network``, a language model, give in each of its passes what transformers' ``AutoModel`` of its checkpoint gives?

    Its body has to be of the class that ``AutoModel`` makes, and what it gives inside of a pass of the network what it gives alone.
    """
    from transformers import MODEL_MAPPING

    body = getattr(network, "base_model", network)
    wanted = MODEL_MAPPING.get(type(network.config), None)
    if body is network or type(body) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
        return False
    size = int(network.config.get_text_config().vocab_size)
    ids = torch.tensor([[token % size for token in row] for row in _TRIAL], device=input_device(network))
    found: list[Any] = []
    hook = body.register_forward_hook(lambda _, args, output: found.append(output))
    try:
        network(input_ids=ids, use_cache=False)
        body(input_ids=ids, use_cache=False)
        inside, alone = (out.last_hidden_state.float() for out in found)
    except Exception as e:  # the network's code may raise anything; a value is then loaded as a network of its own
        log.debug("the hidden states of %s cannot be had: %s", type(network).__name__, reason(e))
        return False
    finally:
        hook.remove()
    exact = compute_dtype(network) == torch.float32
    return inside.shape == alone.shape and output_error(inside, alone) <= (1e-3 if exact else 0.03)
