"""Model runner V2, vLLM's own choice wherever Triton is: on a CPU by Triton's interpreter and a stand-in for its backend.

Slow, and in a process of its own, because the stand-in must be there when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
from making import models
from vllm.v1.worker.gpu import structured_outputs

class Masks:  # vLLM's kernel, which the interpreter cannot run
    def __getitem__(self, grid):
        return self.apply
    def apply(self, logits, _, indices, first, bitmask, __, size, MASK_STRIDE, BLOCK_SIZE):
        for index, bits in zip(indices.tolist(), bitmask):
            allowed = (bits[:, None] >> torch.arange(32)) & 1
            logits[int(first[index // MASK_STRIDE]) + index % MASK_STRIDE, allowed.flatten()[:size] == 0] = -torch.inf

structured_outputs._apply_grammar_bitmask_kernel = Masks()
given = json.loads(sys.argv[1])
with models("vllm", models=given["models"], search={"method": "eft"}, vllm=given["vllm"]) as model:
    engine = model.engine.client.llm_engine
    kinds = [kind.__module__ for kind in type(engine.model_executor.driver_worker.worker.model_runner).__mro__]
    requests = [model.request(text, **settings) for text, settings in given["requests"]]
    done = [c for _, c in sorted(model.run(requests))]
    names = [f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted")]
    drafts = [m.value for m in engine.get_metrics() if m.name in names] if engine.log_stats else []
    scores = []
    if "scored" in given:
        text, settings = given["scored"]
        scores = [[d.token, d.logprob, d.base_logprob] for d in model.generate(text, **settings).details]
found = {"kinds": kinds, "tokens": [c.token_ids for c in done], "errors": [c.error for c in done]}
print("RESULT", json.dumps({**found, "scores": scores, "drafts": drafts}))
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


def run(folder: Path, **given) -> dict:
    """What vLLM answers: its runner, tokens and errors of the requests, log-probabilities, counts of draft tokens and of those accepted.

    Args:
        folder: for the stand-in.
        given: ``models``: paths by role; ``vllm``: that table of the settings; ``requests``: pairs of text and settings; ``scored``: such a
            pair, whose answer is scored.
    """
    path = os.pathsep.join([str(stand_in(folder)), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(given), str(Path(__file__).parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-4000:]
    answer = json.loads(lines[0].removeprefix("RESULT"))
    assert "vllm.v1.worker.gpu.model_runner" in answer["kinds"], f"not model runner V2: {answer['kinds']}"
    return answer
