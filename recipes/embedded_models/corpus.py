"""IMDb reviews as training material for the embedded models.

Reads the Parquet files, cleans the reviews, trains the tokenizers and packs texts into one token stream. Needs pyarrow. The data is not
shipped with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ivg.errors import ConfigError
from ivg.evaluation.sentiment import clean

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<|endoftext|>"
"""Begin and end of every text: the embedded tokenizers use one token for both, as GPT-2 does."""


@dataclass(frozen=True)
class Review:
    """One review: its text and its label (1 positive, 0 negative, -1 not labelled)."""

    text: str
    label: int


def read_reviews(folder: Path, *splits: str) -> list[Review]:
    """Read the named splits (``train``, ``test``, ``unsupervised``) in file order.

    Raises:
        ConfigError: when ``folder`` lacks one of the Parquet files.
    """
    import pyarrow.parquet as pq

    out: list[Review] = []
    for split in splits:
        path = folder / f"{split}.parquet"
        if not path.exists():
            raise ConfigError(f"no such file: {path}\n  expected: the IMDb reviews as Parquet (columns text, label)")
        table = pq.read_table(path, columns=["text", "label"])
        out += [Review(clean(row["text"]), row["label"]) for row in table.to_pylist()]
    return out


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of ``size`` entries; it puts :data:`EOS` before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, tok.token_to_id(EOS))]
    )
    return tok


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of token ids, each text after an :data:`EOS`; shape [tokens], uint16."""

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), 2000):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + 2000]):
                yield np.asarray(encoding.ids, dtype=np.uint16)

    return np.concatenate(list(chunks()))
