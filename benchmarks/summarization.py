"""Summarization on real text, offline: e-mail -> subject line (AESLC), every model made by the commands that users type.

    .venv/bin/python benchmarks/summarization.py --data ../shared/data/aeslc --work build/summarization

Steps, each a command that resumes: `base` and `untuned` (SFT of the embedded language models on e-mails with their subjects),
`gold` (reward model: human subjects against sampled and foreign ones), rollouts labelled by `gold`, `tuned` (DPO), `value`
(FUDGE), then `ivg eval`. Nothing here knows sentiment; `gold` guides nothing.
"""

import argparse
import random
import shlex
import subprocess
import sys
from pathlib import Path

from ivg.records import as_lines, read_jsonl, write_text
from ivg.training.data import read_rows

WORDS = 80
"""Words of an e-mail that are kept: the models read 512 tokens."""


def prompt_of(email):
    """The beginning of the e-mail, and the cue."""
    return " ".join(email.split()[:WORDS]) + "\n\nSubject:"


def prepare(data, work):
    """train.jsonl, dev.jsonl, test.jsonl: prompt, response (the sender's subject), references (annotators' subjects too)."""
    for split in ("train", "dev", "test"):
        rows = [
            {"id": r["id"], "prompt": prompt_of(r["email"]), "response": " " + r["subject"].strip(), "references": r["annotated_subjects"]}
            for r in read_rows(data, split)
            if r["subject"].strip() and r["email"].strip()
        ]
        write_text(work / f"{split}.jsonl", as_lines(rows))
    prompts = list(read_jsonl(work / "train.jsonl"))
    random.Random(1).shuffle(prompts)
    write_text(work / "rollout-prompts.jsonl", as_lines({"id": r["id"], "prompt": r["prompt"]} for r in prompts))
    write_text(work / "gold-prompts.jsonl", as_lines({"id": r["id"], "prompt": r["prompt"]} for r in prompts[:8000]))


def preferences(work):
    """gold.jsonl: the human subject against a sampled one, and against the subject of another e-mail."""
    human = {r["id"]: r for r in read_jsonl(work / "train.jsonl")}
    ids = [r["id"] for r in read_jsonl(work / "gold-prompts.jsonl")]
    rows = []
    for sample in read_jsonl(work / "gold-samples.jsonl"):
        mine = human[sample["id"]]
        foreign = human[ids[(ids.index(sample["id"]) + 1 + sample["index"]) % len(ids)]]
        for other in (sample["text"], foreign["response"]):
            if other.strip().lower() != mine["response"].strip().lower():
                rows.append({"prompt": mine["prompt"], "chosen": mine["response"], "rejected": other.rstrip()})
    write_text(work / "gold.jsonl", as_lines(rows))


def commands(work):
    """(step, command or function) in order."""
    small = "--set train_sampling_strategy=group_by_length --max-length 320 --warmup 0.1 --weight-decay 0.02 --eval-share 0.02"
    sample = "--max-new-tokens 20 --stop '\\n' --seed 7"
    return [
        ("base", f"train sft --model embedded:base --data {work}/train.jsonl --out {work}/base --loss all --epochs 1 --lr 1e-3 {small}"),
        (
            "untuned",
            f"train sft --model embedded:untuned --data {work}/train.jsonl --out {work}/untuned --loss all --epochs 2 --lr 1e-3 {small}",
        ),
    ]


def main():
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
            continue
        print(f"{name}: ivg {command}", flush=True)
        subprocess.run([sys.executable, "-m", "ivg", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
