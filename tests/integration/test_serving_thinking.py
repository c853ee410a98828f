"""The server with models that think: ``reasoning_content``, streamed and whole, as vLLM's reasoning parsers give it."""

import json

import httpx
import pytest

from ivg.model import GuidedModel
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Prompt
from ivg.values.implicit import ImplicitValue
from serving_tools import Running, well_formed

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Film"}]
BODY = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 1, "temperature": 1.0}
PATH = "/v1/chat/completions"


def model():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base, tuned, untuned = (tiny_lm(name, seed=seed, tokenizer=tokenizer) for seed, name in enumerate(("base", "tuned", "untuned")))
    return GuidedModel(base, {"implicit": ImplicitValue(tuned, untuned), "explicit": tiny_value(seed=3, tokenizer=tokenizer)})


@pytest.fixture(scope="module")
def library():
    return model()


@pytest.fixture(scope="module")
def running():
    search = {"method": "eft", "guide_after": "</t>", "thinking_budget": 6}
    with Running(model(), Recipe.model_validate({"search": search})) as server:
        yield server


def streamed(running, body):
    """(thinking, answer) of the first choice, joined from its pieces."""
    parts = {"reasoning_content": "", "content": ""}
    order = []
    with httpx.stream("POST", running.url + PATH, json=body | {"stream": True}, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    for name in parts:
                        if piece := choice["delta"].get(name):
                            parts[name] += piece
                            order.append(name)
    assert order == sorted(order, reverse=True)  # all of the thinking comes first
    return parts["reasoning_content"], parts["content"]


@pytest.mark.parametrize("guidance", [{}, {"method": "ivg", "W": 2, "K": 2, "L": 3, "guide_after": "</t>", "thinking_budget": 6}])
def test_thinking_and_answer(running, library, guidance):
    body = BODY | ({"guidance": guidance} if guidance else {})
    message = running.post(body, PATH).json()["choices"][0]["message"]
    settings = {"guide_after": "</t>", "thinking_budget": 6, **{k: v for k, v in guidance.items() if len(k) == 1}}
    settings = {{"W": "width", "K": "successors", "L": "chunk_length"}.get(k, k): v for k, v in settings.items()}
    same = library.generate(MESSAGES, guidance.get("method", "eft"), seed=1, temperature=1.0, max_new_tokens=20, **settings)
    assert (message["reasoning_content"], message["content"]) == (same.reasoning_content, same.answer)
    assert same.text == same.reasoning_content + "</t>" + same.answer
    assert streamed(running, body) == (same.reasoning_content, same.answer)


def test_where_nothing_is_thought(running, library):
    quiet = BODY | {"chat_template_kwargs": {"enable_thinking": False}, "guidance": {"guide_after": "</think>"}}
    message = running.post(quiet, PATH).json()["choices"][0]["message"]
    assert "reasoning_content" not in message and message["content"] == streamed(running, quiet)[1] != ""
    never = BODY | {"guidance": {"guide_after": "no such text", "thinking_token_budget": 1000}}
    message = running.post(never, PATH).json()["choices"][0]["message"]
    plain = library.generate(Prompt.of(MESSAGES), "base", seed=1, temperature=1.0, max_new_tokens=20).text
    assert message["content"] is None and message["reasoning_content"] == plain
    assert streamed(running, never) == (plain, "")


def test_text_completions_have_all_in_one(running):
    choice = running.post({"model": "tiny", "prompt": "Film", "max_tokens": 20, "seed": 1}).json()["choices"][0]
    assert "</t>" in choice["text"]


def test_settings_that_do_not_go_together(running):
    error = well_formed(running.post(BODY | {"guidance": {"draft": 2}}, PATH), 400, None, "invalid_value")
    assert "draft must be 0 with guide_after" in error["message"]
