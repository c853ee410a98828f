"""Texts that begin alike, read in one pass: their common beginning once, behind it what each has of its own.

A mask keeps the texts apart, and positions count from the common beginning, so each text is read as if it were alone. For prompts of
100 tokens with four responses of ten tokens, a pass over 140 tokens replaces one over 440. Values are trained so (``share_prompts``), and
rewards score so; answers are generated with ``models.slot_cache``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.cache import common_length
from ivg.models.placement import input_device
from ivg.models.support import body_of, check_support
from ivg.models.trial import output_error

TRIAL = ([1, 4, 2, 5, 3], [1, 4, 2, 7, 6, 5], [1, 4, 2, 2])
"""Texts on which a network is tried; the first two are read together."""
TOLERANCE = 0.01
"""Of ``models.trial.output_error``."""


@dataclass(frozen=True)
class SharedRows:
    """Groups of texts as one batch; each group is one row of the network's inputs.

    Attributes:
        input_ids: [groups, width].
        position_ids: [groups, width]; the texts of a group count on from their common beginning.
        attention_mask: True where a token (third axis) sees another (fourth axis), [groups, 1, width, width].
        places: of token t of text i among all ``groups`` × ``width`` places, [texts, longest text]; 0 behind a text's end.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    places: Tensor

    def to(self, device: torch.device) -> SharedRows:
        """The same on ``device``."""
        return SharedRows(*(t.to(device) for t in (self.input_ids, self.position_ids, self.attention_mask, self.places)))


def share_prompts(groups: Sequence[Sequence[tuple[Sequence[int], int]]], pad: int, longest: int | None = None) -> SharedRows:
    """The inputs of one pass.

    Args:
        groups: for each group its texts, as (token ids, length of the beginning that all texts of the group have in common).
        pad: fills rows that are shorter than others.
        longest: width of ``places``; None: the tokens of the longest text.
    """
    longest = longest or max(len(text) for group in groups for text, _ in group)
    width = max(shared_length(group) for group in groups)
    ids = torch.full((len(groups), width), pad)
    positions = torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)  # of each token: 0: all texts, k: the k-th text, -1: padding
    places = torch.zeros((sum(map(len, groups)), longest), dtype=torch.long)
    row = 0
    for g, group in enumerate(groups):
        text, shared = group[0]
        ids[g, :shared] = torch.tensor(text[:shared])
        positions[g, :shared] = torch.arange(shared)
        owner[g, :shared] = 0
        end = shared
        for k, (text, _) in enumerate(group, 1):
            begin, end = end, end + len(text) - shared
            ids[g, begin:end] = torch.tensor(text[shared:], dtype=ids.dtype)
            positions[g, begin:end] = torch.arange(shared, len(text))
            owner[g, begin:end] = k
            places[row, : len(text)] = g * width + torch.cat([torch.arange(shared), torch.arange(begin, end)])
            row += 1
    sees = (owner[:, None] == owner[:, :, None]) | (owner[:, None] == 0)  # padding sees padding: a row of nothing would be nan
    mask = sees & torch.ones(width, width, dtype=torch.bool).tril()
    return SharedRows(ids, positions, mask[:, None], places)


def shared_length(group: Sequence[tuple[Sequence[int], int]]) -> int:
    """Tokens that the network reads for a group of :func:`share_prompts`."""
    return group[0][1] + sum(len(text) - shared for text, shared in group)


def group_by_beginning(texts: Sequence[Sequence[int]], most: int) -> list[tuple[list[int], int]]:
    """Texts that are cheaper to read together, as (their indices, length of their common beginning); a text alone has a group of its own.

    Args:
        texts: token ids.
        most: tokens of a group, unless one text is longer.
    """
    groups: list[tuple[list[int], int]] = []
    own = 0  # tokens of the last group's texts together
    for i in sorted(range(len(texts)), key=lambda i: list(texts[i])):  # neighbours have the longest beginnings in common
        size = len(texts[i])
        if groups:
            members, shared = groups[-1]
            common = common_length(texts[members[0]], texts[i])
            joined = common + own + size - (len(members) + 1) * common
            before = shared + own - len(members) * shared
            if joined < before + size and joined <= most:
                groups[-1] = ([*members, i], common)
                own += size
                continue
        groups.append(([i], size))
        own = size
    return groups


def read_shared(body: Any, rows: SharedRows) -> Tensor:
    """The last hidden states of each text, [texts, longest text, hidden]; meaningless behind a text's end.

    Args:
        body: a network without a head, as ``AutoModel`` gives it.
        rows: on its device.
    """
    mask = rows.attention_mask
    if getattr(body.config.get_text_config(), "_attn_implementation", None) != "sdpa":  # others add it to the scores
        dtype = body.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    out = body(input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden.flatten(0, 1)[rows.places]


def sharing_fault(network: nn.Module, longest: int) -> str | None:
    """Why texts that begin alike cannot be read in one pass; None: they can.

    What is known of the network decides, and a trial beside separate passes.

    Args:
        network: a value, or a network without a head; with an adapter or not.
        longest: tokens of the longest text.
    """
    body: Any = body_of(network)
    if hasattr(body, "get_base_model"):  # peft's
        body = body.get_base_model()
    try:
        support = check_support(body, "model")
    except ModelError as e:
        return str(e).splitlines()[0].removeprefix("model: ")
    if support.state_reason is not None:
        return support.state_reason
    if support.pad is not None:
        return "counts positions from its padding token on"
    if any(window is not None and window < longest for window in support.windows.values()):
        return f"attends to a window of {min(w for w in support.windows.values() if w is not None)} tokens"
    training = body.training
    body.eval()
    try:
        error = _trial_error(body)
    except Exception as e:  # the network's code may raise anything
        return f"cannot read with a mask of its own for each token: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}"
    finally:
        body.train(training)
    return None if error <= TOLERANCE else f"gives other outputs then (error {error:.1g} standard deviations)"


@torch.no_grad()
def _trial_error(body: Any) -> float:
    """Of texts in one pass, beside a pass for each, in units of the outputs' standard deviation."""
    device, size = input_device(body), int(body.config.get_text_config().vocab_size)
    texts = [[token % size for token in text] for text in TRIAL]
    rows = share_prompts([[(text, 3) for text in texts[:2]], [(texts[2], 3)]], 0)
    together = read_shared(body, rows.to(device)).float()
    alone = [body(input_ids=torch.tensor([text], device=device), use_cache=False).last_hidden_state[0].float() for text in texts]
    got = torch.cat([together[i, : len(text)] for i, text in enumerate(texts)])
    wanted = torch.cat(alone)
    return output_error(got, wanted)
