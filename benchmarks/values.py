"""Ablation of value targets: FUDGE, TD(λ), CD-Q, refinement rounds; vocabulary and scalar head. Every step resumes.

    .venv/bin/python -m benchmarks.values --rollouts build/embedded_models/rollouts-value.jsonl --work build/values
    .venv/bin/ivg eval sentiment --recipe recipes/local-values.toml --data ../shared/data/imdb --out build/values/eval

The rollouts are those of the embedded models' recipe (`python -m recipes.embedded_models.build --data ../shared/data/imdb`, stage
value-rollouts): samples of `base`, scored by `gold`. All values start from `untuned` and are measured on the same responses of the base to
held-out prompts. Each round of refinement adds its own rollouts and trains for two more epochs; `longer` is the control: FUDGE for the
six epochs of two rounds.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.docs_page import markdown_table
from ivg.training.data import RatedResponse, read_rated
from ivg.training.split import held_out
from ivg.training.value import measure
from ivg.training.value_loss import PARTS

MAX_ROWS = 16_000
TRAINING = f"--lr 1.5e-3 --batch-size 64 --accumulate 1 --max-length 80 --limit {MAX_ROWS} --seed 4"
GUIDED = (
    "--base embedded:base --reward embedded:gold --method token-explicit --samples 1 --temperature 0.85 --max-new-tokens 50 --ignore-eos"
)
VALUES = {
    "refined": f"--rounds 2 {GUIDED}",
    "longer": "",
    "td": "--target td",
    "td-0.5": "--target td --lambda 0.5",
    "cd-q": "--target cd-q --base embedded:base",
    "scalar": "--head scalar",
    "scalar-td": "--head scalar --target td",
    "plain": "--plain",
}
"""Name -> options that differ. ``refined`` holds FUDGE (round-0), one round (round-1) and two rounds (round-2)."""


def folders(work: Path) -> dict[str, Path]:
    """Folder of each trained value."""
    rounds = {"fudge": "refined/round-0", "round 1": "refined/round-1", "round 2": "refined/round-2"}
    return {name: work / folder for name, folder in (rounds | {n: n for n in VALUES if n != "refined"}).items()}


def table(work: Path, rows: Sequence[RatedResponse]) -> tuple[str, dict[str, dict[str, float]]]:
    """Metrics of every trained value on the responses ``rows``, as Markdown and as a dictionary."""
    found = {n: measure(f, rows) for n, f in folders(work).items() if (f / "metrics.json").exists()}
    metrics = {"pair_accuracy": "pair accuracy", "rmse": "RMSE"}
    figures = {f"{key}_{part}": f"{title} after {part} %" for key, title in metrics.items() for part in PARTS}
    body = [[name, *(f"{m[key]:.3f}" for key in figures)] for name, m in found.items()]
    return markdown_table(["value", *figures.values()], body), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/values"))
    parser.add_argument("--only", nargs="+", choices=VALUES, default=list(VALUES))
    args = parser.parse_args()
    for name in args.only:
        epochs = 6 if name == "longer" else 2
        command = f"train value --model embedded:untuned --data {args.rollouts} --out {args.work / name} {TRAINING} --epochs {epochs}"
        command = f"{command} {VALUES[name]}"
        print(f"ivg {command}", flush=True)
        subprocess.run([sys.executable, "-m", "ivg", *shlex.split(command)], check=True)
    rows = held_out(read_rated(args.rollouts)[:MAX_ROWS], 0.1)[1]
    markdown, figures = table(args.work, rows)
    (args.work / "held-out.json").write_text(json.dumps({"responses": len(rows), "values": figures}, indent=2) + "\n")
    print(markdown)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
