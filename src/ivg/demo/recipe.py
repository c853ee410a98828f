"""The one command that rebuilds the embedded models: ``python -m ivg.demo.recipe --data IMDB --work DIR``.

Stages in order, each skipped when its result lies in the work directory; an interrupted stage goes on from where it was, but for
`gold` and the tokenizers (minutes), which begin anew. Rollouts, pair and values are made by ``ivg.training``, as `ivg train` makes
them. Seeds are fixed; other machines round differently. Needs the
``demo`` extra. About an hour and a half on two cores with bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ivg.demo import gold, settings
from ivg.demo.corpus import EOS, Review, pack, read_reviews, train_tokenizer
from ivg.demo.package import HELD_OUT_TOKENS
from ivg.embedded import ASSETS
from ivg.evaluation.sentiment import opening_words
from ivg.training.data import RatedResponse, pair_up, read_rated
from ivg.training.rollout import rollout
from ivg.training.tune import dpo
from ivg.training.value import train_value
from ivg.types import Prompt

SOURCES = ("rollouts-pair.jsonl", "rollouts-value.jsonl")


@dataclass
class Build:
    """Where things are: ``data`` (IMDb as Parquet), ``work`` (everything that is made), ``out`` (the package's assets)."""

    data: Path
    work: Path
    out: Path

    def model(self, name: str) -> Path:
        """Finished float32 model of this build."""
        return self.work / "final" / name

    @cached_property
    def training_reviews(self) -> list[Review]:
        """Reviews that may be trained on; the test split never is."""
        return read_reviews(self.data, "train", "unsupervised")

    @cached_property
    def gold(self) -> Any:
        """The judge, as a reward model."""
        from ivg.values.reward import RewardModel

        return RewardModel.from_pretrained(self.model("gold"), name="gold")

    def steered(self, base: str) -> Any:
        """A model of this build that writes, without values."""
        from ivg.model import GuidedModel
        from ivg.models.loading import LoadOptions, load_causal

        return GuidedModel(load_causal(self.model(base), base, LoadOptions(device="cpu", dtype="float32")))


def wrap_tokenizer(path: Path) -> Any:
    """A transformers tokenizer around ``tokenizer.json``; puts :data:`EOS` before every text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=settings.CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizers(b: Build) -> None:
    """Byte-level BPE of 4096 entries for all but `value-other`, which gets one of 2048; and the packed corpus."""
    texts = [r.text for r in b.training_reviews]
    for name, size in (("tokenizer", settings.VOCABULARY), ("tokenizer-other", settings.OTHER_VOCABULARY)):
        train_tokenizer(texts, size).save(str(b.work / f"{name}.json"))
    np.save(b.work / "stream.npy", pack(wrap_tokenizer(b.work / "tokenizer.json").backend_tokenizer, texts))


def language_model(name: str, config: Any) -> Callable[[Build], None]:
    """The stage that pre-trains ``name``."""

    def stage(b: Build) -> None:
        from ivg.demo.pretrain import pretrain

        stream = np.load(b.work / "stream.npy")
        model = pretrain(stream[HELD_OUT_TOKENS:], stream[:HELD_OUT_TOKENS], config, b.work / name)
        save(model, b.work / "tokenizer.json", b.model(name))

    return stage


def save(model: Any, tokenizer: Path, folder: Path) -> None:
    """Weights, config and tokenizer as float32; the folder is whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    wrap_tokenizer(tokenizer).save_pretrained(partial)
    partial.rename(folder)


def publish(source: Path, folder: Path) -> None:
    """A finished run's model among the finished ones; the folder is whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.copytree(source, partial, dirs_exist_ok=True)
    partial.rename(folder)


def judge(b: Build) -> None:
    """`gold`; see ``demo.gold``."""
    labelled = read_reviews(b.data, "train")
    unlabelled = read_reviews(b.data, "unsupervised")
    guessed = gold.teacher_probabilities(labelled, [r.text for r in unlabelled])
    targets = np.concatenate([[float(r.label) for r in labelled], guessed])
    tokenizer = wrap_tokenizer(b.work / "tokenizer.json")
    backend = tokenizer.backend_tokenizer
    model = gold.train([*labelled, *unlabelled], targets, backend, settings.GOLD, b.work / "gold")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(b.work / "gold" / "finished")
    tokenizer.save_pretrained(b.work / "gold" / "finished")
    publish(b.work / "gold" / "finished", b.model("gold"))


def sample(b: Build, writer: str, count: int, name: str, seed: int, samples: int, temperature: float) -> None:
    """``samples`` responses of ``writer`` to the opening words of ``count`` reviews, scored by `gold`."""
    prompts = [Prompt(text) for text in opening_words([r.text for r in b.training_reviews], count, seed=seed)]
    rollout(
        b.steered(writer),
        prompts,
        b.work / f"rollouts-{name}.jsonl",
        b.gold,
        samples=samples,
        seed=seed,
        provenance={"base": writer, "reward": "gold"},
        temperature=temperature,
        max_new_tokens=50,
        ignore_eos=True,
    )


def pair_rollouts(b: Build) -> None:
    """Two samples of `untuned` at temperature 1 for each of the training prompts of the pair."""
    sample(b, "untuned", settings.PAIR_PROMPTS, "pair", seed=10, samples=2, temperature=1.0)


def tune(b: Build) -> None:
    """`tuned` = DPO of `untuned` on pairs labelled by Bradley and Terry; the last tenth of the prompts is held out."""
    made = pair_up(read_rated(b.work / "rollouts-pair.jsonl"), seed=11)
    dpo(b.model("untuned"), made, b.work / "tuned", settings.DPO, sources=["rollouts-pair.jsonl"])
    publish(b.work / "tuned", b.model("tuned"))


def value_rollouts(b: Build) -> None:
    """Several samples of `base` for each of the training prompts of the values, near the temperature of use."""
    sample(b, "base", settings.VALUE_PROMPTS, "value", seed=20, samples=4, temperature=0.85)


def value_rows(b: Build) -> list[RatedResponse]:
    """Rollouts that values are trained on; of either file, the last tenth of the rows is held out."""
    out: list[RatedResponse] = []
    for name in SOURCES:
        rows = read_rated(b.work / name)
        out += rows[: len(rows) * 9 // 10]
    return out


def value(b: Build) -> None:
    """`value`: vocabulary head on the body of `untuned`."""
    train_value(b.model("untuned"), value_rows(b), b.work / "value", settings.VALUE, sources=SOURCES)
    publish(b.work / "value", b.model("value"))


def value_other(b: Build) -> None:
    """`value-other`: scalar head, smaller, from nothing, with a tokenizer of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.VALUE_OTHER.seed)
    save(LlamaForCausalLM(LlamaConfig(**settings.OTHER_BODY)), b.work / "tokenizer-other.json", b.work / "value-other-start")
    train_value(b.work / "value-other-start", value_rows(b), b.work / "value-other", settings.VALUE_OTHER, settings.SCALAR, sources=SOURCES)
    publish(b.work / "value-other", b.model("value-other"))


def package(b: Build) -> None:
    """Float16 copies with model cards, and what was measured, into the package."""
    from ivg.demo.package import package as run

    run(b.work, b.data, b.out)


STAGES: dict[str, tuple[Callable[[Build], None], str]] = {
    "tokenizers": (tokenizers, "stream.npy"),
    "untuned": (language_model("untuned", settings.GUIDE), "final/untuned"),
    "gold": (judge, "final/gold"),
    "pair-rollouts": (pair_rollouts, "rollouts-pair.done"),
    "tuned": (tune, "final/tuned"),
    "base": (language_model("base", settings.BASE), "final/base"),
    "value-rollouts": (value_rollouts, "rollouts-value.done"),
    "value": (value, "final/value"),
    "value-other": (value_other, "final/value-other"),
    "package": (package, "package.done"),
}
"""Name -> (what makes it, what lies in the work directory when it is made)."""


def run(b: Build, names: Sequence[str]) -> None:
    """Run the named stages in order, skipping those whose result is there."""
    (b.work / "final").mkdir(parents=True, exist_ok=True)
    for name in names:
        stage, result = STAGES[name]
        if (b.work / result).exists():
            print(f"{name}: done already", flush=True)
            continue
        print(f"{name}: …", flush=True)
        stage(b)
        if result.endswith(".done"):
            (b.work / result).write_text(json.dumps({"stage": name}) + "\n")
    (b.work / "settings.json").write_text(json.dumps({"base": asdict(settings.BASE), "guide": asdict(settings.GUIDE)}, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m ivg.demo.recipe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/test/unsupervised.parquet")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where everything is made (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the finished models go (default: the package)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    given = parser.parse_args(arguments)
    run(Build(given.data, given.work, given.out), given.stages)


if __name__ == "__main__":
    main()
