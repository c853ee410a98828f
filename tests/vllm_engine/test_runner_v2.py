"""Model runner V2, vLLM's own choice wherever Triton is: on a CPU by Triton's interpreter and a stand-in for its backend.

A functional check: slow, and in a process of its own, because the stand-in must be there when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from making import models, prompts, trio

COMPILER = """
from triton.backends.compiler import BaseBackend
class Stand(BaseBackend):
    @staticmethod
    def supports_target(target): return target.backend == "cpu"
    def hash(self): return "stand-in"
    def parse_options(self, options): raise NotImplementedError
    def add_stages(self, stages, options, language): raise NotImplementedError
    def load_dialects(self, context): pass
    def get_module_map(self): return {}
"""
DRIVER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
class Stand(DriverBase):
    def __init__(self): pass
    @classmethod
    def is_active(cls): return True
    def map_python_to_cpp_type(self, ty): return ty
    def get_current_target(self): return GPUTarget("cpu", 0, 1)
    def get_active_torch_device(self): return torch.device("cpu")
    def get_current_device(self): return 0
    def set_current_device(self, device): pass
    def get_current_stream(self, device): return 0
    def get_benchmarker(self): raise NotImplementedError
    def get_device_interface(self): return torch.cpu
    def get_empty_cache_for_benchmark(self): raise NotImplementedError
    def clear_cache(self, cache): pass
"""
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
from making import models, prompts
from vllm.v1.worker.gpu import structured_outputs

class Masks:  # vLLM's kernel, which the interpreter cannot run
    def __getitem__(self, grid):
        return self.apply
    def apply(self, logits, _, indices, first, bitmask, __, size, MASK_STRIDE, BLOCK_SIZE):
        for index, bits in zip(indices.tolist(), bitmask):
            allowed = (bits[:, None] >> torch.arange(32)) & 1
            logits[int(first[index // MASK_STRIDE]) + index % MASK_STRIDE, allowed.flatten()[:size] == 0] = -torch.inf

structured_outputs._apply_grammar_bitmask_kernel = Masks()
paths, betas = json.loads(sys.argv[1]), [0.0, 0.5, 1.0, 2.0, -1.0]
with models("vllm", models=paths, search={"method": "eft"}, vllm={"max_num_seqs": 8}) as model:
    runner = model.engine.client.llm_engine.model_executor.driver_worker.worker.model_runner
    settings = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    requests = [model.request(p, "eft", beta=b, **settings) for p, b in zip(prompts(5), betas)]
    requests += [model.request(prompts(1)[0], "custom", token="implicit", chunk_length=3, beta=1.0, regex="[ab]{7}", **settings)]
    for length in (3, None):
        looking = {"beta": 1.0, "bad_words": json.loads(sys.argv[3]), "frequency_penalty": 0.9, "repetition_penalty": 1.1, **settings}
        chunks = {"method": "eft"} if length is None else {"method": "custom", "token": "implicit", "chunk_length": length}
        requests.append(model.request(prompts(2)[1], **chunks, **looking))
    tokens = [c.token_ids for _, c in sorted(model.run(requests))]
    scored = model.generate(prompts(2)[1], "eft", beta=1.0, temperature=0.7, seed=1, max_new_tokens=3, alternatives=2)
    scores = [[d.token, d.logprob, d.base_logprob] for d in scored.details]
    print("RESULT", json.dumps([[kind.__module__ for kind in type(runner).__mro__], tokens, scores]))
"""


def stand_in(folder: Path) -> Path:
    """A distribution that says it is Triton's backend for CPUs."""
    package, info = folder / "triton_stand_in", folder / "triton_stand_in-1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "compiler.py").write_text(COMPILER)
    (package / "driver.py").write_text(DRIVER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-stand-in\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = triton_stand_in\n")
    return folder


def test_weights_reach_their_rows(folder, tmp_path):
    paths = trio(folder, "llama")
    path = os.pathsep.join([str(stand_in(tmp_path)), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    with models("transformers", models=paths) as slow:
        settings = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
        betas = [0.0, 0.5, 1.0, 2.0, -1.0]
        expected = [list(slow.generate(p, "eft", beta=b, **settings).token_ids) for p, b in zip(prompts(5), betas, strict=True)]
        expected += [list(slow.generate(prompts(1)[0], "eft", beta=1.0, regex="[ab]{7}", **settings).token_ids)]
        plain = slow.generate(prompts(2)[1], "eft", beta=1.0, **settings).token_ids
        words = [slow.base.tokenizer.decode(plain[2:4])]  # on both sides of the end of a chunk
        looking = {"bad_words": words, "frequency_penalty": 0.9, "repetition_penalty": 1.1, **settings}
        expected += [list(slow.generate(prompts(2)[1], "eft", beta=1.0, **looking).token_ids)] * 2
        assert expected[-1] != list(plain)
        command = [sys.executable, "-c", SCRIPT, json.dumps(paths), str(Path(__file__).parent), json.dumps(words)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, done.stderr[-4000:]
        modules, tokens, scores = json.loads(lines[0].removeprefix("RESULT"))
        given = slow.logprobs(prompts(2)[1], [token for token, _, _ in scores], "eft", beta=1.0, temperature=0.7)
    assert "vllm.v1.worker.gpu.model_runner" in modules, f"not model runner V2: {modules}"
    assert tokens == expected
    expected = [number for t in given.tokens for number in (t.logprob, t.base_logprob)]
    assert [number for _, *pair in scores for number in pair] == pytest.approx(expected, abs=2e-4)
