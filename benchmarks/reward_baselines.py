"""What orders judged answers without a language model: their length, and a ridge regression on their words.

    .venv/bin/python -m benchmarks.reward_baselines --data ../shared/data/alpaca_eval/judged.parquet --out build/reward-baselines.json

A reward that was trained on these judgements is worth its name if it beats all of them, above all among clear pairs of like length. They
are measured on the prompts that ``ivg train reward --pairs-per-prompt N`` holds out of the same file for the same ``--eval-share``:
the last ones. ``--reward DIR`` adds the row of such a reward.

The ridge regression fits the score over log(1 + count) of the most frequent words of the training answers, all less their means over the
answers to the same instruction; its penalty is the best one on the last fifth of the training instructions. "word shares" fits the score
without what length explains of it (:mod:`ivg.training.length`) over log(1 + percent of the answer's words) instead: a judge
that hardly follows length, to be asked beside a reward whose scores have length regressed out.
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivg.errors import PromptError
from ivg.jobs.formats import read_rows
from ivg.models.chat_template import prompt_text
from ivg.models.loading import LoadOptions
from ivg.settings.train import PairSettings
from ivg.training.data import ColumnMapping, RatedResponse, ReadOptions, read_rated
from ivg.training.length import length_controlled, word_count
from ivg.training.pairing import compare
from ivg.training.ranking import Scores, ranking
from ivg.training.split import last_share
from ivg.types import Prompt
from ivg.utils.jsonl import write_json
from ivg.values.reward import RewardModel

COLUMNS = {"prompt": "instruction", "response": "output"}
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
INNER_SHARE = 0.2
"""Share of the training instructions on which the penalty is chosen."""
KINDS = {"pairs": "all pairs", "clear_pairs": "clear pairs", "clear_pairs_of_like_length": "of like length"}


def is_test(instruction: str) -> bool:
    """Is this an instruction of the test split? (shared/data/README.md)"""
    return int(hashlib.sha256(instruction.encode()).hexdigest(), 16) % 4 == 0


def tokens(text: str) -> list[str]:
    """Words in lower case, and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Features:
    """log(1 + count) of the most frequent words of some answers, and log(1 + words of the answer) as the last column.

    ``shares``: log(1 + percent) in place of counts; percent of the words and marks of an answer.
    """

    def __init__(self, rows: Sequence[RatedResponse], words: int, *, shares: bool = False) -> None:
        self.shares = shares
        counts = Counter(word for row in rows for word in set(tokens(row.response)))
        self.columns = {word: i for i, (word, _) in enumerate(counts.most_common(words))}

    def __call__(self, rows: Sequence[RatedResponse]) -> np.ndarray:
        """[rows, words + 1], less the means over the answers to the same prompt."""
        return centred(self.plain(rows), rows)

    def plain(self, rows: Sequence[RatedResponse]) -> np.ndarray:
        """[rows, words + 1]."""
        out = np.zeros((len(rows), len(self.columns) + 1), dtype=np.float32)
        for i, row in enumerate(rows):
            found = Counter(tokens(row.response))
            unit = found.total() / 100 if self.shares else 1.0
            for word, count in found.items():
                if word in self.columns:
                    out[i, self.columns[word]] = np.log1p(count / unit)
            out[i, -1] = np.log1p(word_count(row.response))
        return out


def centred(table: np.ndarray, rows: Sequence[RatedResponse]) -> np.ndarray:
    """The table [rows, …] less its means over the rows of the same prompt."""
    groups: dict[Prompt, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(i)
    out = table.copy()
    for members in groups.values():
        out[members] -= out[members].mean(0)
    return out


def solutions(features: np.ndarray, rows: Sequence[RatedResponse], penalties: Sequence[float]) -> list[np.ndarray]:
    """The weights of ridge regression for each penalty [columns]."""
    scores = centred(np.array([row.score for row in rows], dtype=np.float32), rows)
    square, product = features.T @ features, features.T @ scores
    return [np.linalg.solve(square + penalty * np.eye(len(square), dtype=np.float32), product) for penalty in penalties]


def keyed(rows: Sequence[RatedResponse], values: Sequence[float]) -> Scores:
    """Values of rows by prompt and response."""
    return {(row.prompt, row.response): float(value) for row, value in zip(rows, values, strict=True)}


def fit(train: Sequence[RatedResponse], words: int, *, length: bool, shares: bool = False) -> tuple[Features, np.ndarray, float]:
    """(features, their weights, penalty); without ``length`` the weight of that column is 0."""
    inner = last_share([row.prompt for row in train], INNER_SHARE)
    first, last = [row for row in train if row.prompt not in inner], [row for row in train if row.prompt in inner]
    columns = slice(None) if length else slice(-1)
    features = Features(first, words, shares=shares)
    x, y = features(first)[:, columns], features(last)[:, columns]
    found = ranking(last, {str(p): keyed(last, y @ w) for p, w in zip(PENALTIES, solutions(x, first, PENALTIES), strict=True)})
    kind = "clear_pairs" if found["clear_pairs"]["count"] else "pairs"
    best = max(PENALTIES, key=lambda p: found[kind][str(p)]["rate"])
    features = Features(train, words, shares=shares)
    (weights,) = solutions(features(train)[:, columns], train, [best])
    return features, weights if length else np.append(weights, 0.0), best


def fit_word_shares(train: Sequence[RatedResponse], words: int) -> tuple[Features, np.ndarray, float]:
    """:func:`fit` of scores without what length explains of them, over shares of words."""
    return fit(length_controlled(train)[0], words, length=False, shares=True)


def by_reward(reward: RewardModel, rows: Sequence[RatedResponse]) -> Scores:
    """Rewards of all responses that the model can read whole or with the beginning of the prompt left out."""
    read: dict[tuple[Prompt, str], list[int]] = {}
    for row in rows:
        try:
            read[row.prompt, row.response] = reward.read(row.prompt, row.response).ids
        except PromptError:
            continue
    return dict(zip(read, reward.logits(list(read.values())), strict=True))


def measure(
    data: Path, share: float, words: int, reward: RewardModel | None = None, max_length: int | None = None, scored: bool = True
) -> dict[str, Any]:
    """All figures.

    Args:
        data: judgements.
        share: of the instructions, held out.
        words: of the ridge regression.
        reward: to compare.
        max_length: held-out answers of more tokens, as ``reward`` reads them behind their prompts, are left out.
        scored: False: ``reward`` only counts tokens.
    """
    columns = COLUMNS if "instruction" in next(iter(read_rows(data))) else {}
    everything = read_rated(data, ReadOptions(mapping=ColumnMapping(columns)))
    rows = [row for row in everything if not is_test(prompt_text(row.prompt))]
    held_out = compare([rows], PairSettings(pairs_per_prompt=1), eval_share=share).held_out
    train, test = [r for r in rows if r.prompt not in held_out], [r for r in rows if r.prompt in held_out]
    rewards: dict[str, Scores] = {}
    if reward is not None and max_length is not None:
        test = [row for row in test if len(reward.ids(reward.text(row.prompt, row.response))) <= max_length]
    if reward is not None and scored:
        rewards["reward"] = by_reward(reward, test)
        test = [row for row in test if (row.prompt, row.response) in rewards["reward"]]
    penalties = {}
    fitted = {"words": fit(train, words, length=False), "words and length": fit(train, words, length=True)}
    for name, (features, weights, penalty) in (fitted | {"word shares": fit_word_shares(train, words)}).items():
        rewards[name], penalties[name] = keyed(test, features(test) @ weights), penalty
    return {
        "answers": len(rows),
        "answers_of_test_instructions_left_out": len(everything) - len(rows),
        "instructions_held_out": len(held_out),
        "answers_held_out": len(test),
        "penalties": penalties,
        **ranking(test, rewards),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    head = [f"{title} ({found[kind]['count']})" for kind, title in KINDS.items()]
    lines = [f"| accuracy on | {' | '.join(head)} | Spearman |", "|---|" + (len(KINDS) + 1) * "---:|"]
    for name in ("length", "words", "words and length", "word shares", "reward"):
        if name in found["pairs"]:
            cells = [f"{found[kind][name]['rate']:.3f}" if name in found[kind] else "" for kind in KINDS]
            lines.append(f"| {name} | {' | '.join(cells)} | {found['spearman_within_prompts'][name]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="judgements: instruction, output, score; or prompt, response, score")
    parser.add_argument("--eval-share", type=float, default=0.2, help="share of the instructions that is held out")
    parser.add_argument("--words", type=int, default=2000, help="most frequent words that the ridge regression uses")
    parser.add_argument("--reward", help="a reward trained on the other instructions of the same file")
    parser.add_argument("--template", help="of that reward; default: as it was trained")
    parser.add_argument("--max-length", type=int, help="leave out held-out answers of more tokens, as --reward reads them")
    parser.add_argument("--count-only", action="store_true", help="--reward counts tokens alone; its row is in its metrics.json")
    parser.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file for all figures, with intervals")
    given = parser.parse_args()
    reward = None
    if given.reward is not None:
        reward = RewardModel.from_pretrained(given.reward, template=given.template, options=LoadOptions(device=given.device))
        reward.batch_size = given.batch_size
    found = {"data": str(given.data), "eval_share": given.eval_share, "words": given.words, "reward": given.reward}
    found |= measure(given.data, given.eval_share, given.words, reward, given.max_length, not given.count_only)
    if found["answers_of_test_instructions_left_out"]:
        print(f"{found['answers_of_test_instructions_left_out']} answers to instructions of the test split were left out")
    print(table(found))
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    main()
