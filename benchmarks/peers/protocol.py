"""How a program talks to the benchmark: JSON lines, requests on standard input, replies on a pipe. Imports nothing but Python.

A program is a program that ends with ``serve(versions, answer)``. It writes ``{"ready": versions}``, then for every line
``{"prompts": [...], "seed": 1, "tokens": 50}`` one line ``{"answers": [texts], "seconds": ...}``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

REPLIES = "IVG_PEERS_REPLIES"
"""Environment variable: the file descriptor for replies. Libraries print on standard output."""
SAMPLES = 16
"""Answers, or particles, of every program for each prompt."""
TEMPERATURE = 0.7

Answer = Callable[[list[str], int, int], list[str]]
"""(prompts, seed, tokens) -> one text for each prompt, as it follows the prompt."""


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of these packages."""
    return {name: version(name) for name in packages}


def serve(found: dict[str, str], answer: Answer) -> None:
    """Answer the requests on standard input until it ends."""
    replies = os.fdopen(int(os.environ[REPLIES]), "w", buffering=1)
    print(json.dumps({"ready": found}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        answers = answer(request["prompts"], request["seed"], request["tokens"])
        result = {"answers": answers, "seconds": time.perf_counter() - start}
        print(json.dumps(result), file=replies)
