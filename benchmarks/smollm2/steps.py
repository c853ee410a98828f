"""The steps of the three experiments, in order. Each is a command of ``ivg`` that resumes, or a function that writes one file."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.smollm2 import calibration
from ivg.training.data import RatedResponse
from ivg.training.length import length_controlled
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines, read_jsonl, write_text

REVIEW = "Here is a movie review from imdb: {prompt}"
"""How the base reads the beginning of a review (Liu et al. 2024, section 4)."""
SUBJECT = "<|im_start|>user\nWrite a short subject line for this e-mail.\n\n{prompt}<|im_end|>\n<|im_start|>assistant\nSubject:"
"""How base and guides read an e-mail: SmolLM2's chat format, with the beginning of the answer."""
MAIL = "{prompt}\n\nSubject:"
"""How the reward model reads an e-mail."""
SMALL = "hidden_size=96,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4,head_dim=24,intermediate_size=256"
"""A Llama of 5 M parameters with the base's vocabulary, 4.7 M of them embeddings."""


@dataclass(frozen=True)
class Scale:
    """How much, and how many rows at once.

    Attributes:
        rows: share of the rows; below 1 for a rehearsal.
        prompts: of a batch of rollouts; a GPU takes more.
        train: further options of each training; they override its own.
        trained: does a reward tell answers apart? Not in a rehearsal.
    """

    rows: float = 1.0
    prompts: int = 64
    train: str = ""
    trained: bool = True

    def count(self, rows: int) -> int:
        """That share of ``rows``."""
        return max(16, round(rows * self.rows))

    def clear_pairs(self, pairs: int, margin: float) -> str:
        """Options for ``pairs`` pairs of answers to a prompt, whose scores differ by ``margin`` or more, labelled by the score."""
        return f"--pairs-per-prompt {pairs} --min-margin {margin} --label higher" if self.trained else ""


@dataclass(frozen=True)
class Step:
    """One step: ``command`` is what follows ``ivg``; ``after`` are the steps whose results it reads."""

    name: str
    command: str | Callable[[], None]
    after: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command as arguments."""
        assert isinstance(self.command, str)
        return shlex.split(self.command)


def steps(experiment: str, base: str, work: Path, scale: Scale) -> list[Step]:
    """The steps of ``sentiment``, ``summarization`` or ``instructions``."""
    return {"sentiment": _sentiment, "summarization": _summarization, "instructions": _instructions}[experiment](base, work, scale)


def _sentiment(base: str, work: Path, scale: Scale) -> list[Step]:
    train = f"--accumulate 1 --evaluations 1 {scale.train}"
    write = f"--max-new-tokens 50 --ignore-eos --temperature 1 --batch-size {scale.prompts}"
    pair, values = _sentiment_pair(base, work, scale, train, write), _sentiment_values(base, work, scale, train, write)
    return [*pair, *values, Step("calibration", lambda: calibration.report(work), ("gold",))]


def _sentiment_pair(base: str, work: Path, scale: Scale, train: str, write: str) -> list[Step]:
    """The gold reward, the pair, and the answers that it learns from."""
    out = work / "sentiment"
    return [
        Step(
            "gold",
            f"train value --model {base} --mode lora --lora-r 8 --keep-adapter --head scalar --target binary"
            f" --data {work}/imdb-labels.jsonl --out {out}/gold --epochs 2 --lr 2e-4 --batch-size 64 --max-length 160 {train}",
        ),
        Step(
            "untuned",
            f"train sft --model {base} --config-overrides {SMALL} --data {work}/imdb-reviews.jsonl --out {out}/untuned --loss all"
            f" --epochs 2 --lr 3e-3 --batch-size 128 --max-length 224 --eval-share 0.01 --weight-decay 0.02 {train}",
        ),
        Step(
            "pair-rollouts",
            f"train rollout --base {out}/untuned --reward {out}/gold --prompts {work}/imdb-prompts.jsonl"
            f" --limit {scale.count(4096)} --samples 2 {write} --seed 2"
            f" --out {out}/rollouts-pair.jsonl",
            ("gold", "untuned"),
        ),
        Step(
            "value-rollouts",
            f"train rollout --base {base} --template {shlex.quote('base=' + REVIEW)} --reward {out}/gold"
            f" --prompts {work}/imdb-prompts.jsonl --limit {scale.count(1024)} --samples 4 {write} --seed 3"
            f" --out {out}/rollouts-value.jsonl",
            ("gold",),
        ),
        # DPO of so few answers teaches so small a network nothing that holds; it starts from one that has read praise
        Step(
            "praise",
            f"train sft --model {out}/untuned --data {work}/imdb-praise.jsonl --out {out}/praise --loss all"
            f" --epochs 1 --lr 1e-3 --batch-size 64 --max-length 224 --eval-share 0.02 --weight-decay 0.02 {train}",
            ("untuned",),
        ),
        Step(
            "tuned",
            f"train dpo --model {out}/praise --data {out}/rollouts-pair.jsonl --data {out}/rollouts-value.jsonl"
            f" {scale.clear_pairs(2, 2)} --out {out}/tuned --epochs 1 --lr 1e-4 --warmup 0.25 --batch-size 64"
            f" --weight-decay 0.05 --max-length 224 {train}",
            ("praise", "pair-rollouts", "value-rollouts"),
        ),
    ]


def _sentiment_values(base: str, work: Path, scale: Scale, train: str, write: str) -> list[Step]:
    """The value, and the value refined by one round."""
    out = work / "sentiment"
    value = f"--compact-head --epochs 1 --lr 1e-3 --batch-size 64 --max-length 224 --weight-decay 0.1 {train}"
    return [
        # first the labels of real reviews, then the scores of what the base writes; one map for all tokens, since rows are few
        Step(
            "value-labels",
            f"train value --model {out}/untuned --data {work}/imdb-labels.jsonl --target binary --out {out}/value-labels {value}",
            ("untuned",),
        ),
        Step(
            "value",
            f"train value --model {out}/value-labels --data {out}/rollouts-value.jsonl --data {out}/rollouts-pair.jsonl"
            f" --out {out}/value {value}",
            ("value-labels", "pair-rollouts", "value-rollouts"),
        ),
        # refinement: the value learns from what a small search by itself writes, among which the large search chooses
        Step(
            "guided-rollouts",
            f"train rollout --base {base} --template {shlex.quote('base=' + REVIEW)} --tuned {out}/tuned --untuned {out}/untuned"
            f" --value {out}/value --method ivg --width 2 --successors 2 --chunk-length 5 --reward {out}/gold"
            f" --prompts {work}/imdb-prompts.jsonl --limit {scale.count(768)} --samples 1 {write} --seed 4"
            f" --out {out}/rollouts-guided.jsonl",
            ("tuned", "value"),
        ),
        Step(
            "refined",
            f"train value --model {out}/value --data {out}/rollouts-guided.jsonl --data {out}/rollouts-value.jsonl"
            f" --out {out}/refined {value}",
            ("guided-rollouts",),
        ),
    ]


def _summarization(base: str, work: Path, scale: Scale) -> list[Step]:
    out = work / "summarization"
    subject, mail = shlex.quote(SUBJECT), shlex.quote(MAIL)
    write = f"--template {shlex.quote('base=' + SUBJECT)} --max-new-tokens 24 --stop '\\n' --temperature 1 --batch-size {scale.prompts}"
    rest = f"--accumulate 1 --max-length 448 --evaluations 1 {scale.train}"
    train = f"--mode lora --lora-r 8 --keep-adapter {rest}"
    return [
        Step(
            "samples",
            f"generate --method base --base {base} --input {work}/aeslc-reward.jsonl --output {out}/samples.jsonl {write} --seed 7",
        ),
        Step("labels", lambda: subject_labels(work / "aeslc-reward.jsonl", out / "samples.jsonl", out / "labels.jsonl"), ("samples",)),
        Step(
            "gold",
            f"train value --model {base} --head scalar --target binary --data {out}/labels.jsonl --out {out}/gold --template {mail}"
            f" --share-prompts --lr 5e-4 --batch-size 16 --epochs 1 {train}",
            ("labels",),
        ),
        Step(
            "rollouts",
            f"train rollout --base {base} --reward {out}/gold --prompts {work}/aeslc-prompts.jsonl --limit {scale.count(5000)}"
            f" --samples 4 {write} --seed 2 --out {out}/rollouts.jsonl",
            ("gold",),
        ),
        # DPO of so few answers moves the network by nothing (dev/LOG.md); this one reads the best answer to each e-mail
        Step("best", lambda: best_responses(out / "rollouts.jsonl", out / "best.jsonl"), ("rollouts",)),
        Step(
            "expert",
            f"train sft --model {base} --data {out}/best.jsonl --out {out}/expert --template {subject} --lr 5e-4 --batch-size 32 {train}",
            ("best",),
        ),
        Step(
            "value",
            f"train value --model {base} --data {out}/rollouts.jsonl --out {out}/value --mode head --compact-head --keep-adapter"
            f" --template {subject} --share-prompts --lr 1e-3 --batch-size 16 {rest}",
            ("rollouts",),
        ),
    ]


def _instructions(base: str, work: Path, scale: Scale) -> list[Step]:
    out = work / "instructions"
    adapter, train = "--mode lora --lora-r 8 --keep-adapter", "--template chat --evaluations 1"
    judged = f"--data {work}/alpaca-judged.jsonl --pairs-per-prompt 16 --label higher --min-margin 0.5 --like-length 0.3 --eval-share 0.2"
    long = "--max-length 1024 --set gradient_checkpointing=true --set train_sampling_strategy=group_by_length"
    reward = f"train reward --model {base} {judged} --batch-size 8 --accumulate 2 --lr 5e-4 {adapter} {train} {long} {scale.train}"
    train += f" --accumulate 1 --max-length 640 {scale.train}"
    return [
        Step("gold", f"{reward} --out {out}/gold"),  # for comparison (docs/how-to/training.md); the recipe does not read it
        # below this margin the line of length over-corrects: half of the answers have the lowest score (docs/how-to/training.md)
        Step("gold-length", f"{reward} --out {out}/gold-length --control-length --min-margin 3"),
        Step(
            "rollouts",  # of the instructions that are not in alpaca-dev.jsonl
            f"train rollout --base {base} --template base=chat --reward {out}/gold-length --prompts {work}/alpaca-prompts.jsonl"
            f" --limit {scale.count(485)} --samples 16 --max-new-tokens 128 --temperature 1 --top-k 50"
            f" --batch-size {scale.prompts // 4} --seed 2 --out {out}/rollouts.jsonl",
            ("gold-length",),
        ),
        # among answers of at most 128 tokens the reward prefers short ones: what length explains of it is subtracted again
        Step("best", lambda: best_responses(out / "rollouts.jsonl", out / "best.jsonl", control_length=True), ("rollouts",)),
        Step(
            "expert",
            f"train sft --model {base} --data {out}/best.jsonl --out {out}/expert --lr 5e-4 --batch-size 16 {adapter} {train}",
            ("best",),
        ),
        Step(
            "value",
            f"train value --model {base} --data {out}/rollouts.jsonl --out {out}/value --mode head --compact-head --keep-adapter"
            f" --control-length --lr 1e-3 --batch-size 64 {train}",
            ("rollouts",),
        ),
    ]


def subject_labels(mails: Path, samples: Path, out: Path) -> None:
    """The sender's subject (score 1); those of the next two e-mails (the reward must read the e-mail), and a sampled one (score 0).

    Sampled subjects are longer than senders': those of another length are left out, and every fourth e-mail has an empty one.
    So neither brevity nor silence pays.
    """
    rows = list(read_jsonl(mails))
    sampled = {row["id"]: row["text"] for row in read_jsonl(samples) if not row.get("error")}
    labelled = []
    for place, row in enumerate(rows):
        own, text = row["response"], sampled.get(row["id"], "")
        others = [rows[(place + step) % len(rows)]["response"] for step in (1, 2)]
        others += [text] if text.strip() and abs(len(text.split()) - len(own.split())) <= 2 else []
        others = [other.rstrip() for other in others if other.strip().lower() != own.strip().lower()]
        labelled.append({"prompt": row["prompt"], "response": own, "score": 1.0})
        labelled += [{"prompt": row["prompt"], "response": other, "score": 0.0} for other in [*others, *([""] if place % 4 == 0 else [])]]
    write_text(out, as_lines(labelled))


def best_responses(rollouts: Path, out: Path, *, control_length: bool = False) -> None:
    """The sampled response to each prompt with the highest reward, but for empty ones and those cut at the limit of tokens.

    With ``control_length`` what length explains of the rewards of all responses is subtracted first, as ``--control-length`` does.
    """
    rows = [row for row in read_jsonl(rollouts) if not row.get("error")]
    rated = [RatedResponse(row["prompt"], row["response"], row["score"]) for row in rows]
    if control_length:
        rated, _ = length_controlled(rated)
    best: dict[Prompt, RatedResponse] = {}
    for row, response in zip(rows, rated, strict=True):
        complete = row["finish_reason"] == "stop" and response.response.strip()
        if complete and (response.prompt not in best or response.score > best[response.prompt].score):
            best[response.prompt] = response
    write_text(out, as_lines({"prompt": r.prompt, "response": r.response.rstrip()} for r in best.values()))
