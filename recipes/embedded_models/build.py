"""Rebuild the embedded models from IMDb reviews: ``python -m recipes.embedded_models.build --data IMDB --work DIR``.

Run it from the root of a checkout, with the extra ``train`` and scikit-learn installed. A stage whose result is in the work directory
is skipped. An interrupted stage resumes, except `gold` and the tokenizers, which take minutes and start again. Rollouts, the tuned
guide and the values are made by ``ivg.training``, as `ivg train` makes them. Seeds are fixed, but results differ by rounding between
machines. Takes about an hour and a half on two cores with bfloat16 instructions.
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

from ivg.embedded import ASSETS
from ivg.evaluation.sentiment import opening_words
from ivg.training.data import RatedResponse, pair_up, read_rated
from ivg.training.rollout import rollout
from ivg.training.tune import dpo
from ivg.training.value import train_value
from ivg.types import Prompt
from recipes.embedded_models import config, gold
from recipes.embedded_models.corpus import EOS, Review, pack, read_reviews, train_tokenizer
from recipes.embedded_models.export import HELD_OUT_TOKENS, export
from recipes.embedded_models.pretrain import PretrainConfig, pretrain

SOURCES = ("rollouts-pair.jsonl", "rollouts-value.jsonl")


@dataclass
class Build:
    """Folders of a build: ``data`` (IMDb as Parquet), ``work`` (intermediate results), ``out`` (the finished models)."""

    data: Path
    work: Path
    out: Path

    def model(self, name: str) -> Path:
        """Folder of a finished float32 model."""
        return self.work / "final" / name

    @cached_property
    def training_reviews(self) -> list[Review]:
        """The splits train and unsupervised; the test split is never trained on."""
        return read_reviews(self.data, "train", "unsupervised")

    @cached_property
    def gold(self) -> Any:
        """The sentiment classifier as a reward model."""
        from ivg.values.reward import RewardModel

        return RewardModel.from_pretrained(self.model("gold"), name="gold")

    def sampler(self, base: str) -> Any:
        """A language model of this build, without guidance."""
        from ivg.model import GuidedModel
        from ivg.models.loading import LoadOptions, load_causal

        return GuidedModel(load_causal(self.model(base), base, LoadOptions(device="cpu", dtype="float32")))


def wrap_tokenizer(path: Path) -> Any:
    """A transformers tokenizer from ``tokenizer.json``; it puts :data:`EOS` before every text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=config.CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizers(b: Build) -> None:
    """A byte-level BPE of 4096 entries, one of 2048 for `value-other`, and the packed corpus."""
    texts = [r.text for r in b.training_reviews]
    for name, size in (("tokenizer", config.VOCABULARY), ("tokenizer-other", config.OTHER_VOCABULARY)):
        train_tokenizer(texts, size).save(str(b.work / f"{name}.json"))
    np.save(b.work / "stream.npy", pack(wrap_tokenizer(b.work / "tokenizer.json").backend_tokenizer, texts))


def language_model(name: str, how: PretrainConfig) -> Callable[[Build], None]:
    """The stage that pre-trains ``name``."""

    def stage(b: Build) -> None:
        stream = np.load(b.work / "stream.npy")
        model = pretrain(stream[HELD_OUT_TOKENS:], stream[:HELD_OUT_TOKENS], how, b.work / name)
        save(model, b.work / "tokenizer.json", b.model(name))

    return stage


def save(model: Any, tokenizer: Path, folder: Path) -> None:
    """Save weights, config and tokenizer as float32. Atomic: the folder is complete or absent."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    wrap_tokenizer(tokenizer).save_pretrained(partial)
    partial.rename(folder)


def publish(source: Path, folder: Path) -> None:
    """Copy the model of a finished run to the finished ones. Atomic: the folder is complete or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.copytree(source, partial, dirs_exist_ok=True)
    partial.rename(folder)


def reward_model(b: Build) -> None:
    """`gold`; see :mod:`recipes.embedded_models.gold`."""
    labelled = read_reviews(b.data, "train")
    unlabelled = read_reviews(b.data, "unsupervised")
    predicted = gold.teacher_probabilities(labelled, [r.text for r in unlabelled])
    targets = np.concatenate([[float(r.label) for r in labelled], predicted])
    tokenizer = wrap_tokenizer(b.work / "tokenizer.json")
    backend = tokenizer.backend_tokenizer
    model = gold.train([*labelled, *unlabelled], targets, backend, config.GOLD, b.work / "gold")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(b.work / "gold" / "finished")
    tokenizer.save_pretrained(b.work / "gold" / "finished")
    publish(b.work / "gold" / "finished", b.model("gold"))


def sample(b: Build, model: str, count: int, name: str, seed: int, samples: int, temperature: float) -> None:
    """``samples`` responses of ``model`` to the opening words of ``count`` reviews, scored by `gold`."""
    prompts = [Prompt(text) for text in opening_words([r.text for r in b.training_reviews], count, seed=seed)]
    rollout(
        b.sampler(model),
        prompts,
        b.work / f"rollouts-{name}.jsonl",
        b.gold,
        samples=samples,
        seed=seed,
        provenance={"base": model, "reward": "gold"},
        temperature=temperature,
        max_new_tokens=50,
        ignore_eos=True,
    )


def pair_rollouts(b: Build) -> None:
    """Two samples of `untuned` at temperature 1 for each training prompt of `tuned`."""
    sample(b, "untuned", config.PAIR_PROMPTS, "pair", seed=10, samples=2, temperature=1.0)


def tuned_guide(b: Build) -> None:
    """`tuned`: DPO of `untuned` on pairs labelled by the Bradley-Terry model; the last tenth of the prompts is held out."""
    pairs = pair_up(read_rated(b.work / "rollouts-pair.jsonl"), seed=11)
    dpo(b.model("untuned"), pairs, b.work / "tuned", config.DPO, sources=["rollouts-pair.jsonl"])
    publish(b.work / "tuned", b.model("tuned"))


def value_rollouts(b: Build) -> None:
    """Four samples of `base` for each training prompt of the values, near the temperature of use."""
    sample(b, "base", config.VALUE_PROMPTS, "value", seed=20, samples=4, temperature=0.85)


def value_rows(b: Build) -> list[RatedResponse]:
    """Rollouts for training the values; the last tenth of each file is held out."""
    out: list[RatedResponse] = []
    for name in SOURCES:
        rows = read_rated(b.work / name)
        out += rows[: len(rows) * 9 // 10]
    return out


def value(b: Build) -> None:
    """`value`: vocabulary head on the body of `untuned`."""
    train_value(b.model("untuned"), value_rows(b), b.work / "value", config.VALUE, sources=SOURCES)
    publish(b.work / "value", b.model("value"))


def value_other(b: Build) -> None:
    """`value-other`: scalar head on a smaller body, trained from scratch, with its own tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.VALUE_OTHER.seed)
    save(LlamaForCausalLM(LlamaConfig(**config.OTHER_BODY)), b.work / "tokenizer-other.json", b.work / "value-other-start")
    train_value(b.work / "value-other-start", value_rows(b), b.work / "value-other", config.VALUE_OTHER, config.SCALAR, sources=SOURCES)
    publish(b.work / "value-other", b.model("value-other"))


def export_models(b: Build) -> None:
    """Float16 copies with model cards and metrics.json in the output folder."""
    export(b.work, b.data, b.out)


STAGES: dict[str, tuple[Callable[[Build], None], str]] = {
    "tokenizers": (tokenizers, "stream.npy"),
    "untuned": (language_model("untuned", config.GUIDE), "final/untuned"),
    "gold": (reward_model, "final/gold"),
    "pair-rollouts": (pair_rollouts, "rollouts-pair.done"),
    "tuned": (tuned_guide, "final/tuned"),
    "base": (language_model("base", config.BASE), "final/base"),
    "value-rollouts": (value_rollouts, "rollouts-value.done"),
    "value": (value, "final/value"),
    "value-other": (value_other, "final/value-other"),
    "export": (export_models, "export.done"),
}
"""Name -> (function, path in the work directory that exists when the stage is done)."""


def run(b: Build, names: Sequence[str]) -> None:
    """Run the named stages in order; skip those whose result exists."""
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
    (b.work / "settings.json").write_text(json.dumps({"base": asdict(config.BASE), "guide": asdict(config.GUIDE)}, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.embedded_models.build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/test/unsupervised.parquet")
    parser.add_argument(
        "--work", type=Path, default=Path("build/embedded_models"), help="folder for intermediate results (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the finished models (default: src/ivg/embedded)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    given = parser.parse_args(arguments)
    run(Build(given.data, given.work, given.out), given.stages)


if __name__ == "__main__":
    main()
