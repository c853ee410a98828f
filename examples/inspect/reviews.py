"""An Inspect task for the guided model: does the answer praise the film?

pip install 'ivg[inspect]'
inspect eval examples/inspect/reviews.py --model ivg/base
inspect eval examples/inspect/reviews.py --model ivg/eft -M beta=1.0
"""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, accuracy, scorer, stderr
from inspect_ai.solver import generate

OPENINGS = ["The movie was", "The acting is", "I left the cinema and", "The plot of this film"]
PRAISE = {"good", "great", "excellent", "best", "wonderful", "perfect", "beautiful", "brilliant", "amazing", "love", "superb"}


@scorer(metrics=[accuracy(), stderr()])
def praises():
    """1 where a word of praise is in the answer."""

    async def score(state, target):
        found = PRAISE & set(state.output.completion.lower().replace(",", " ").replace(".", " ").split())
        return Score(value=1 if found else 0, answer=state.output.completion, explanation=", ".join(sorted(found)))

    return score


@task
def reviews():
    """The openings of four reviews."""
    samples = [Sample(input=opening, target="praise") for opening in OPENINGS]
    return Task(dataset=samples, solver=generate(), scorer=praises(), config=GenerateConfig(max_tokens=30, temperature=0.7, seed=1))
