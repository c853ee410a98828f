"""The paper's three experiments on SmolLM2: data, rewards, guides, values, each by a command of ivg that resumes.

Needs the extras train, eval and gguf. What `instructions` trains is for the task alpaca of `ivg eval`.

ivg models add smollm2
python -m benchmarks.smollm2 sentiment --data ../shared/data
ivg eval sentiment --recipe recipes/smollm2/sentiment.toml --out build/smollm2/sentiment/eval
"""

import argparse
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.smollm2.data import prepare
from benchmarks.smollm2.steps import Scale, Step, steps

WORK = Path("build/smollm2")


def run(step: Step, needed: list[Future[None]], free: threading.Semaphore) -> None:
    """Wait for the steps that ``step`` needs, then for a free place, and run it."""
    for other in needed:
        other.result()
    with free:
        start = time.monotonic()
        if callable(step.command):
            step.command()
        else:
            print(f"{step.name}: ivg {step.command}", flush=True)
            subprocess.run([sys.executable, "-m", "ivg", *step.words], check=True)
        print(f"{step.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["data", "sentiment", "summarization", "instructions"])
    parser.add_argument("--data", type=Path, help="folder with imdb, aeslc and alpaca_eval; needed where the rows are not made yet")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of what is made; default: build/smollm2, where the recipes look for it"
    )
    parser.add_argument("--base", default="smollm2", help="another base, for a rehearsal")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows, for a rehearsal")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a batch of rollouts; a GPU takes 512")
    parser.add_argument("--train", default="", help="further options of each training, such as '--set gradient_checkpointing=false'")
    parser.add_argument("--jobs", type=int, default=1, help="steps at the same time")
    parser.add_argument("--steps", nargs="+", help="only these; a step's name is printed when it begins")
    args = parser.parse_args()
    if not all((args.work / name).exists() for name in ("judgement-words.json", "alpaca-test.jsonl")):
        if args.data is None:
            parser.error("the rows are not made yet: give --data FOLDER")
        prepare(args.data, args.work, args.scale)
    if args.experiment == "data":
        return
    found = steps(args.experiment, args.base, args.work, Scale(args.scale, args.prompts, args.train))
    found = [step for step in found if not args.steps or step.name in args.steps]
    free, running = threading.Semaphore(args.jobs), dict[str, Future[None]]()
    with ThreadPoolExecutor(max(1, len(found))) as pool:
        for step in found:  # each after those that it needs
            needed = [running[name] for name in step.after if name in running]
            running[step.name] = pool.submit(run, step, needed, free)
    for future in running.values():
        future.result()


if __name__ == "__main__":
    main()
