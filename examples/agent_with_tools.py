"""An agent under guidance: the model calls a Python function through the server, and answers with what it gave.

    pip install 'ivg[serve]' openai
    ivg serve --base Qwen/Qwen3-1.7B --tuned … --untuned … --name qwen --port 8000
    python examples/agent_with_tools.py http://127.0.0.1:8000 qwen "How is the weather in Zürich?"

The base must have a chat template that reads tools (docs/how-to/serving.md#tools).
"""

import json
import sys

import openai


def get_weather(city: str, days: list[int] | None = None) -> str:
    """What a real program would look up."""
    return f"sunny in {city}, 21 degrees"


FUNCTIONS = {"get_weather": get_weather}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": PARAMETERS}}]


def answer(client: openai.OpenAI, model: str, question: str, rounds: int = 5) -> str:
    """Let the model call functions until it answers in words."""
    messages: list = [{"role": "user", "content": question}]
    for _ in range(rounds):
        choice = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, seed=1).choices[0]
        messages.append(choice.message.model_dump(exclude_none=True))
        if not choice.message.tool_calls:
            return choice.message.content or ""
        for call in choice.message.tool_calls:
            result = call_function(call.function.name, call.function.arguments)
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return "no answer yet"


def call_function(name: str, arguments: str) -> str:
    """The model may be wrong: it is told what was."""
    try:
        return FUNCTIONS[name](**json.loads(arguments))
    except (KeyError, TypeError, ValueError) as e:
        return f"error: {type(e).__name__}: {e}"


if __name__ == "__main__":
    url, model, question = sys.argv[1:]
    print(answer(openai.OpenAI(base_url=f"{url}/v1", api_key="unused"), model, question))
