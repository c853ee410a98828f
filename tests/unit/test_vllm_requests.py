"""What the engine over vLLM does with its requests, over a client without vLLM that answers one token a step."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from ivg.engines.vllm.client import EngineOutput
from ivg.engines.vllm.engine import VLLMEngine
from ivg.models.prompt_encoder import PromptEncoder
from ivg.testing import byte_tokenizer, check_children, check_outputs_are_kept
from ivg.types import Prompt

PROMPTS = [Prompt("The movie was"), Prompt("A long film")]


@dataclass
class OneTokenAStep:
    """Of an :class:`~ivg.engines.vllm.client.EngineClient`."""

    requests: dict[str, list] = field(default_factory=dict)
    added: int = 0

    def add(self, token_ids, params):
        self.added += 1
        self.requests[str(self.added)] = [params, 0]
        return str(self.added)

    def step(self):
        found = []
        for number, request in list(self.requests.items()):
            params, drawn = request[0], request[1] + 1
            request[1] = drawn
            children, done = params.n, drawn == params.max_tokens
            outputs = [
                SimpleNamespace(index=i, token_ids=[65 + i] * drawn, finish_reason="length" if done else None) for i in range(children)
            ]
            found.append(EngineOutput(SimpleNamespace(request_id=number, outputs=outputs, finished=done), (0,) * children if done else ()))
            if done:
                del self.requests[number]
        return found

    def abort(self, numbers):
        for number in numbers:
            self.requests.pop(number, None)


@pytest.fixture
def engine(monkeypatch):
    tokenizer = byte_tokenizer()
    base = PromptEncoder("base", tokenizer, vocab_size=len(tokenizer))
    settings = SimpleNamespace(RequestOutputKind=SimpleNamespace(CUMULATIVE=0, FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", settings)
    return VLLMEngine(OneTokenAStep(), base, ["base"], {})


def test_laws_of_engines(engine):
    check_children(engine, PROMPTS)
    check_outputs_are_kept(engine, PROMPTS)
    assert not engine.running and not engine.client.requests
