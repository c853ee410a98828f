"""A reward that is a Python function: recipes/embedded-pareto.toml uses it as a value and as a judge."""


def variety(prompt: str, response: str) -> float:
    """Share of the response's words that it does not repeat, in [0, 1]; an empty response is as varied as can be."""
    words = response.lower().split()
    return len(set(words)) / len(words) if words else 1.0
