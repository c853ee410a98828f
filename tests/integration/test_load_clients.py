"""Clients that measure a server, over a real socket: guidellm. Run by ``make test-clients``; vLLM's own is in tests/vllm_engine."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ivg import GuidedModel
from ivg.embedded import path
from serving_tools import Running

GUIDELLM = os.environ.get("IVG_GUIDELLM", str(Path(__file__).parents[2] / ".venv" / "guidellm" / "bin" / "guidellm"))
"""In an environment of its own: it wants an older click than typer brings."""
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which(GUIDELLM) is None, reason=f"needs guidellm at {GUIDELLM} (make test-clients)"),
]
PROMPT, OUTPUT, REQUESTS = 12, 6, 4


@pytest.mark.parametrize("form", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures_what_was_written(form, tmp_path):
    with Running(GuidedModel.embedded(), name="films") as running:
        arguments = [
            f"--backend=kind=openai_http,target={running.url},request_format={form}",
            f"--tokenizer=kind=huggingface_auto,model={path('base')}",
            f"--data=kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
            "--profile=kind=concurrent,streams=2",
            f"--constraint=kind=max_requests,count={REQUESTS}",
            f"--output=kind=json,path={tmp_path / 'report.json'}",
            "--disable-console",
        ]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([GUIDELLM, "run", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert found["metrics"]["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    for request in found["requests"]["successful"]:
        assert (request["prompt_tokens"], request["output_tokens"]) == (PROMPT, OUTPUT)
        assert 0 < request["time_to_first_token_ms"] < 1000 * request["request_latency"] and request["output"]
