"""The rows that the steps read, made of the data sets of this project's research (``../shared/data``; not shipped).

Every file is JSON lines, gzipped where it is large. Prompts that measure (``*-dev``, ``*-test``) share no text with those that train.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.reward_baselines import is_test
from benchmarks.smollm2.words import fit_judgements, fit_words
from ivg.evaluation.sentiment import clean, opening_words
from ivg.evaluation.summarization import Summarization
from ivg.jobs.formats import read_rows
from ivg.settings.eval import EvalConfig
from ivg.training.data import RatedResponse
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines, write_json, write_text

REVIEW_WORDS = 96
"""Words of a review that a language model is trained on: prompts are beginnings of reviews, and answers have 50 tokens."""
LABEL_WORDS = 48
"""Words of a response that the judges of sentiment are trained on: as many as an answer has."""
EMAIL_WORDS = 80
SEED = 1


def prepare(data: Path, work: Path, scale: float = 1.0) -> None:
    """Write the rows of all three experiments into ``work``; ``scale`` below 1 makes fewer (for a rehearsal)."""
    work.mkdir(parents=True, exist_ok=True)
    sentiment(data / "imdb", work, scale)
    summarization(data / "aeslc", work, scale)
    instructions(data / "alpaca_eval", work, scale)


def sentiment(data: Path, work: Path, scale: float) -> None:
    """Reviews for the guides, labelled reviews for two judges (one half each), beginnings of reviews as prompts."""
    train = [(clean(r["text"]), int(r["label"])) for r in read_rows(data, "train")]
    random.Random(SEED).shuffle(train)
    plain = [clean(r["text"]) for r in read_rows(data, "unsupervised")]
    texts = ([text for text, _ in train] + plain)[: _count(50_000, scale)]
    _write(work / "imdb-reviews.jsonl", ({"text": _first_words(text, REVIEW_WORDS)} for text in texts))
    half = len(train) // 2
    for name, rows in (("imdb-labels.jsonl", train[:half]), ("imdb-labels-2.jsonl", train[half:])):
        _write(work / name, _labelled(rows[: _count(half, scale)]))
    praise = [text for text, label in train[:half] if label == 1][: _count(half, scale)]
    _write(work / "imdb-praise.jsonl", ({"text": _first_words(text, REVIEW_WORDS)} for text in praise))
    write_json(work / "words.json", fit_words([(text, label) for text, label in train[half:]]))
    count = _count(10_000, scale)
    _write(work / "imdb-prompts.jsonl", _prompts(opening_words([text for text, _ in train], count, seed=SEED)))
    held = [clean(r["text"]) for r in read_rows(data, "test")]
    found = opening_words(held, 600, seed=SEED)
    _write(work / "imdb-dev.jsonl", _prompts(found[:200]))
    _write(work / "imdb-test.jsonl", _prompts(found[200:]))
    _write(work / "imdb-beyond.jsonl", _prompts(found[264:]))  # the first 64 were looked at when variants were chosen


def _labelled(reviews: Iterable[tuple[str, int]]) -> Iterable[dict[str, Any]]:
    """The first words as prompt, the next ones as a response that goes on, and the label as score."""
    rng = random.Random(SEED)
    for text, label in reviews:
        words = text.split()
        start = rng.randint(4, 8)
        response = " ".join(words[start : start + rng.randint(LABEL_WORDS // 2, LABEL_WORDS)])
        if response:
            yield {"prompt": " ".join(words[:start]), "response": " " + response, "score": label, "ended": False}


def summarization(data: Path, work: Path, scale: float) -> None:
    """E-mails with their subjects; one half for the reward model, the other for guides."""
    rows = {split: list(_mails(data, split)) for split in ("train", "dev", "test")}
    random.Random(SEED).shuffle(rows["train"])
    half, count = len(rows["train"]) // 2, _count(5_000, scale)
    reward = rows["train"][:half][:count]
    _write(work / "aeslc-reward.jsonl", reward)
    _write(work / "aeslc-prompts.jsonl", ({"id": r["id"], "prompt": r["prompt"]} for r in rows["train"][half:][:count]))
    for split in ("dev", "test"):
        random.Random(SEED).shuffle(rows[split])
        _write(work / f"aeslc-{split}.jsonl", rows[split])
    left = _unseen(rows["test"], work / "aeslc-test.jsonl", 64)  # a variant was chosen on 64
    _write(work / "aeslc-beyond.jsonl", left)
    _write(work / "aeslc-fresh.jsonl", _unseen(left, work / "aeslc-beyond.jsonl", 48))  # and another one named on the next 48


def _unseen(rows: list[dict[str, Any]], asked: Path, prompts: int) -> list[dict[str, Any]]:
    """The rows that an evaluation of the first prompts (at most half of all) did not ask for."""
    examples = Summarization().examples(EvalConfig(data=str(asked), prompts=min(prompts, len(rows) // 2)))
    seen = {example.id for example in examples}
    return [row for row in rows if str(row["id"]) not in seen]


def _mails(data: Path, split: str) -> Iterable[dict[str, Any]]:
    for row in read_rows(data, split):
        text, subject = _first_words(row["email"], EMAIL_WORDS), row["subject"].strip()
        if text and subject and len(text) <= 700:  # longer beginnings are tables and addresses
            references = [subject, *(s.strip() for s in row["annotated_subjects"] if s.strip())]
            yield {"id": row["id"], "prompt": text, "response": " " + subject, "references": references}


def instructions(data: Path, work: Path, scale: float) -> None:
    """The judged answers, a judge of words, their instructions, and the instructions of the test (which nothing was judged on)."""
    judged = sorted(read_rows(data / "judged.parquet"), key=lambda r: hashlib.sha256(f"x{r['instruction']}".encode()).digest())
    seen = list(dict.fromkeys(r["instruction"] for r in judged))[: _count(585, scale)]  # sorted: the file goes by data set
    if leaked := [text for text in seen if is_test(text)]:
        raise ValueError(f"{len(leaked)} instructions of the test are among the judged ones")
    kept = set(seen)
    rows = [{"prompt": r["instruction"], "response": r["output"], "score": r["score"]} for r in judged if r["instruction"] in kept]
    _write(work / "alpaca-judged.jsonl", rows)
    write_json(work / "judgement-words.json", fit_judgements([RatedResponse(Prompt(r["prompt"]), r["response"], r["score"]) for r in rows]))
    _write(work / "alpaca-prompts.jsonl", _prompts(seen))
    _write(work / "alpaca-dev.jsonl", ({"instruction": text} for text in seen[485:] or seen))  # rewards hold out the last of them
    test = [r for r in read_rows(data / "reference_outputs_gpt4_1106_preview.json.gz") if is_test(r["instruction"])]
    _write(work / "alpaca-test.jsonl", test)


def _prompts(texts: Iterable[str]) -> Iterable[dict[str, Any]]:
    return ({"id": str(number), "prompt": text} for number, text in enumerate(texts))


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def _count(count: int, scale: float) -> int:
    return max(16, round(count * scale))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, as_lines(rows))
