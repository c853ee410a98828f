"""Let a Python function of yours choose among the model's answers, alone or together with a trained value.

    python examples/own_reward_function.py

A value turns (prompt, response so far) into a number; higher is better. In a chunk-level search it is called after every chunk, so it
should make sense for unfinished text. `ivg generate --reward examples/own_reward_function.py:variety` does the same from a terminal.
"""

from ivg import GuidedModel


def variety(prompt: str, response: str) -> float:
    """The share of words that the response has not used before, in [0, 1]."""
    words = response.lower().split()
    return len(set(words)) / len(words) if words else 1.0


def main() -> None:
    """Answer one prompt by three ways of choosing."""
    model = GuidedModel.embedded()

    # Any callable becomes a value by a name. What it raises fails that one answer, with the function's name in the error.
    model.add_value("variety", variety)

    # A weighted sum of values is a value too. Weights are in each value's own unit: the explicit value's is that of the reward it
    # was trained on (about -4 to 4 here), variety's runs from 0 to 1.
    model.add_value("praise and variety", {"explicit": 1.0, "variety": 3.0})

    for select in ("explicit", "variety", "praise and variety"):
        # "custom" is a free combination: `token` guides every token, `select` ranks hypotheses after every chunk.
        answer = model.generate("The movie was", "custom", token="implicit", select=select, width=4, successors=4, chunk_length=8, seed=1)
        praise = model.score("The movie was", [answer.text], "explicit")[0]
        print(f"\nselected by {select}: praise {praise:+.2f}, variety {variety('', answer.text):.2f}")
        print(f"  The movie was{answer.text}")


if __name__ == "__main__":
    main()
