"""A judge that is a Python function: recipes/local-summarization.toml uses it beside the learned one, which cannot see relevance."""

import re


def grounded(prompt: str, response: str) -> float:
    """Share of a subject's words that stand in the e-mail, in [0, 1]; 0 for a subject without words."""
    words = re.findall(r"[a-z0-9]+", response.lower())
    mail = set(re.findall(r"[a-z0-9]+", prompt.lower().removesuffix("subject:")))
    return sum(word in mail for word in words) / len(words) if words else 0.0
