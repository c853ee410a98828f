"""Summarization on real text: e-mail -> subject line (AESLC), with every model trained by commands of ivg.

    .venv/bin/python -m benchmarks.summarization --data ../shared/data/aeslc --work build/summarization

Steps, each a command that resumes: `base` and `untuned` (SFT of the embedded language models on e-mails with their subjects),
`gold` (reward model: human subjects against sampled and foreign ones), rollouts scored by `gold`, `tuned` (DPO), `value`
(FUDGE). Then:

    .venv/bin/ivg eval summarization --recipe recipes/local-summarization.toml --out build/summarization/eval

`gold` is used for evaluation and rollouts, never for guidance.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from ivg.jobs.formats import read_rows
from ivg.models.loading import LoadOptions
from ivg.types import Prompt
from ivg.utils.jsonl import as_lines, read_jsonl, write_json, write_text
from ivg.values.reward import RewardModel
from recipes.grounded import grounded

WORDS = 80
"""Words kept of an e-mail: the models read 512 tokens."""
CHARACTERS = 700
"""Longer beginnings are tables and addresses; they are not used as prompts. (In SFT, rows over 320 tokens are left out.)"""


def prompt_of(email: str) -> str:
    """The beginning of the e-mail, followed by ``Subject:``."""
    return " ".join(email.split()[:WORDS]) + "\n\nSubject:"


def prepare(data: Path, work: Path) -> None:
    """train.jsonl, dev.jsonl, test.jsonl: prompt, response (the sender's subject), references (annotators' subjects too)."""
    for split in ("train", "dev", "test"):
        rows = [
            {"id": r["id"], "prompt": prompt_of(r["email"]), "response": " " + r["subject"].strip(), "references": r["annotated_subjects"]}
            for r in read_rows(data, split)
            if r["subject"].strip() and r["email"].strip() and (split == "train" or len(prompt_of(r["email"])) <= CHARACTERS)
        ]
        write_text(work / f"{split}.jsonl", as_lines(rows))
    prompts = [r for r in read_jsonl(work / "train.jsonl") if len(r["prompt"]) <= CHARACTERS]
    random.Random(1).shuffle(prompts)
    write_text(work / "rollout-prompts.jsonl", as_lines({"id": r["id"], "prompt": r["prompt"]} for r in prompts))
    write_text(work / "gold-prompts.jsonl", as_lines({"id": r["id"], "prompt": r["prompt"]} for r in prompts[-5000:]))


def preferences(work: Path) -> None:
    """gold.jsonl: the human subject against a sampled one, and against the subject of another e-mail."""
    human = {r["id"]: r for r in read_jsonl(work / "train.jsonl")}
    ids = [r["id"] for r in read_jsonl(work / "gold-prompts.jsonl")]
    position = {name: i for i, name in enumerate(ids)}
    rows = []
    for sample in read_jsonl(work / "gold-samples.jsonl"):
        mine = human[sample["id"]]
        foreign = human[ids[(position[sample["id"]] + 1) % len(ids)]]
        for other in (sample["text"], foreign["response"]):
            if other.strip().lower() != mine["response"].strip().lower():
                rows.append({"prompt": mine["prompt"], "chosen": mine["response"], "rejected": other.rstrip()})
    write_text(work / "gold.jsonl", as_lines(rows))


def judges(work: Path, count: int = 600) -> None:
    """judges.json: scores by gold and grounded of human subjects of test e-mails, and of the subjects of the next e-mail."""
    gold = RewardModel.from_pretrained(work / "gold", options=LoadOptions(device="cpu", dtype="float32"))
    rows = list(read_jsonl(work / "test.jsonl"))[:count]
    own = [(Prompt(r["prompt"]), r["response"]) for r in rows]
    foreign = [(p, rows[(i + 1) % len(rows)]["response"]) for i, (p, _) in enumerate(own)]
    found: dict[str, Any] = {"e-mails": len(rows)}
    scores = {}
    for name, pairs in (("own", own), ("foreign", foreign)):
        scores[name] = gold.judge(pairs)
        found[name] = {"gold": fmean(scores[name]), "grounded": fmean(grounded(str(p.content), r) for p, r in pairs)}
    found["gold_prefers_own"] = fmean(a > b for a, b in zip(scores["own"], scores["foreign"], strict=True))
    write_json(work / "judges.json", found)
    print(json.dumps(found))


def commands(work: Path) -> list[tuple[str, str | Callable[[], None]]]:
    """(step, command of ivg or function) in order; each resumes."""
    how = "--max-length 320 --weight-decay 0.02 --batch-size 32 --accumulate 1"
    write = "--max-new-tokens 20 --stop '\n' --dtype float32"
    sft = f"train sft --loss all --lr 1e-3 --eval-share 0.02 --data {work}/train.jsonl {how}"
    sft += " --set train_sampling_strategy=group_by_length"
    sample = f"train rollout --reward {work}/gold --prompts {work}/rollout-prompts.jsonl {write}"
    return [
        ("untuned", f"{sft} --model embedded:untuned --out {work}/untuned --epochs 2"),
        ("base", f"{sft} --model embedded:base --out {work}/base --epochs 1"),
        (
            "gold-samples",
            f"generate --method base --base {work}/untuned --input {work}/gold-prompts.jsonl --output {work}/gold-samples.jsonl"
            f" --temperature 1 --seed 7 --batch-size 256 {write}",
        ),
        ("gold-pairs", lambda: preferences(work)),
        ("gold", f"train reward --model {work}/untuned --data {work}/gold.jsonl --out {work}/gold --epochs 1 --lr 5e-4 {how}"),
        (
            "pair-rollouts",
            f"{sample} --base {work}/untuned --out {work}/rollouts-pair.jsonl --limit 5000 --samples 2 --temperature 1 --seed 2",
        ),
        (
            "tuned",
            f"train dpo --model {work}/untuned --data {work}/rollouts-pair.jsonl --out {work}/tuned --epochs 1 --lr 5e-4 --warmup 0.25"
            " --max-length 320 --weight-decay 0.05 --seed 3 --batch-size 32 --accumulate 1",
        ),
        (
            "value-rollouts",
            f"{sample} --base {work}/base --out {work}/rollouts-value.jsonl --limit 3000 --samples 4 --temperature 0.85 --seed 4",
        ),
        (
            "value",
            f"train value --model {work}/untuned --data {work}/rollouts-value.jsonl --data {work}/rollouts-pair.jsonl --out {work}/value"
            f" --epochs 1.5 --lr 1.5e-3 {how} --batch-size 64",
        ),
        ("judges", lambda: judges(work)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with AESLC's train, dev and test.parquet")
    parser.add_argument("--work", type=Path, default=Path("build/summarization"))
    parser.add_argument("--steps", nargs="+", help="only these")
    args = parser.parse_args()
    if not (args.work / "gold-prompts.jsonl").exists():
        prepare(args.data, args.work)
    for name, command in commands(args.work):
        if args.steps and name not in args.steps:
            continue
        if callable(command):
            command()
        else:
            print(f"{name}: ivg {command}", flush=True)
            subprocess.run([sys.executable, "-m", "ivg", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
