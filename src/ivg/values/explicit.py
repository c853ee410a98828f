"""Explicit values: a small network that was trained to predict the final reward from any prefix
(IVG: Liu et al. 2024, arXiv 2409.17819; FUDGE: Yang and Klein 2021; controlled decoding: Mudgal et al. 2024).

Vocabulary head: head(h_{t-1})[y_t] = Q(s_t, y_t) = V(x, y_<=t), read at the position before the last token; one pass
gives the value of every next token, so it can shift the whole vocabulary. Scalar head: V(x, y_<=t) at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ivg.models.added import locate
from ivg.models.cached_lm import CachedLM
from ivg.models.loading import LoadOptions, Template
from ivg.models.shared import SharedNetworks
from ivg.models.training_rows import copy_training_rows, source_of
from ivg.models.value_head import HeadKind, ValueModel
from ivg.types import Hypothesis
from ivg.values.base import CachedLMValue

if TYPE_CHECKING:
    from torch import Tensor


class ExplicitValue(CachedLMValue):
    """A trained value network.

    Args:
        model: reads hypotheses with a :class:`~ivg.models.value_head.ValueModel`.
        name: in traces.
        card: the model card (README.md) that goes with it.
    """

    def __init__(self, model: CachedLM, name: str = "explicit", card: str | None = None) -> None:
        self.model, self.name, self.card = model, name, card

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        template: Template = None,
        options: LoadOptions | None = None,
        tokenizer: Any = None,
        name: str = "explicit",
        networks: SharedNetworks | None = None,
    ) -> ExplicitValue:
        """Load any layout that ``models.value_head`` names, from a directory or the hub.

        Args:
            path: directory or hub id.
            template: how this model reads the prompt.
            options: device, dtype and the like.
            tokenizer: where the checkpoint has none beside it.
            name: in usage and traces.
            networks: read with one that was loaded there, where the value is a head on it.
        """
        readme = Path(locate(path if options is None or options.adapter is None else options.adapter)) / "README.md"
        card = readme.read_text(encoding="utf-8") if readme.is_file() else None
        return cls((networks or SharedNetworks()).load_value(path, name, options, template, tokenizer), name, card)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config, tokenizer, card and fingerprints of the training rows; :meth:`from_pretrained` reads them back."""
        self.network.save_pretrained(folder)
        self.model.tokenizer.save_pretrained(folder)
        if (source := source_of(self.network)) is not None:
            copy_training_rows(source, folder)
        if self.card is not None:
            (Path(folder) / "README.md").write_text(self.card, encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> None:
        """Upload what :meth:`save_pretrained` writes."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

    @property
    def network(self) -> ValueModel:
        """The value network."""
        return cast("ValueModel", self.model.network)

    @property
    def head(self) -> HeadKind:
        """``vocabulary`` or ``scalar``."""
        return self.network.kind

    def cached_lms(self) -> list[CachedLM]:
        """The network with its cache."""
        return [self.model]

    def full_vocabulary(self) -> bool:
        """Only a vocabulary head knows all next tokens at once."""
        return self.head == "vocabulary"

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """Q(s_t, .), float32 [hypotheses, vocabulary]; of a vocabulary head only."""
        if self.head == "scalar":
            return super().deltas(hypotheses)
        return self.model.outputs(hypotheses)

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor] | None:
        """See :meth:`ivg.types.Value.recent_deltas`; None for a scalar head."""
        return None if self.head == "scalar" else self.model.recent_outputs(hypotheses, counts, drop=1)

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """V(x, y_<=t) for each hypothesis, in units of the reward that the network was trained on."""
        if not hypotheses:
            return []
        if self.head == "vocabulary":
            return self.model.last_token_outputs(hypotheses).tolist()
        return self.model.outputs(hypotheses)[:, 0].tolist()

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """As :meth:`score` of ``candidates``; what they share is read once."""
        if not candidates:
            return []
        if self.head == "vocabulary":
            return self.model.candidate_last_token_outputs(hypotheses, candidates).tolist()
        return self.model.candidate_outputs(hypotheses, candidates)[:, 0].tolist()
