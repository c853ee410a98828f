"""Choose in your own way which hypotheses survive a chunk: no two that end with the same word.

    python examples/own_selection_rule.py

A search repeats three steps: the engine makes every kept beam longer, a value scores the children, a selection rule keeps some of
them. `BeamRule` keeps the W best. In late chunks these often differ in a word or two; this subclass of it asks for variety.
"""

from dataclasses import replace

from ivg import GuidedModel
from ivg.search.selection import BeamRule, Selection


class DistinctEndings(BeamRule):
    """Beam search in which the kept hypotheses end with different words.

    The searcher makes one object for each request, so a rule may remember what it likes from chunk to chunk.
    """

    def choose(self, held, grown) -> Selection:
        """Choose among (beam, score) pairs: `held` were finished before this chunk, `grown` are the new children."""
        best = {}
        for beam, score in sorted(grown, key=lambda pair: -pair[1]):
            ending = beam.text.split()[-1:]
            best.setdefault(tuple(ending), (beam, score))
        selection = super().choose(held, list(best.values()))
        # Whatever is not kept must be named: `released` frees its cache, `dropped` shows it in traces.
        distinct = {beam.key for beam, _ in best.values()}
        duplicates = [(beam, score) for beam, score in grown if beam.key not in distinct]
        return replace(selection, dropped=selection.dropped + duplicates, released=selection.released + [beam for beam, _ in duplicates])


def main() -> None:
    """Compare the rule with plain beam search: same model, same seed, same number of tokens."""
    model = GuidedModel.embedded()
    plain = model.request("The movie was", "cbs-explicit", seed=1, trace=True)
    distinct = replace(plain, search=replace(plain.search, make_rule=DistinctEndings))
    for name, request in (("plain", plain), ("distinct endings", distinct)):
        _, completion = next(model.run([request]))
        print(f"\n{name}: score {completion.score:+.2f}\n  The movie was{completion.text}")
        # With trace=True every step of the search is kept: here are the hypotheses after the last chunk.
        for node in completion.trace[-1].kept:
            print(f"  {node.score:+.2f}  …{node.text[-60:]!r}")


if __name__ == "__main__":
    main()
