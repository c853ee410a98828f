"""The texts of a grammar as tokens, their probabilities by enumeration without caches, and a test of answers against these."""

from collections import Counter

from naive import outputs

PROMPT = "Film"


def spellings(model, texts):
    """Every sequence of tokens that writes one of ``texts``."""
    pieces = {i: model.base.vocabulary.decode([i]) for i in model.base.vocabulary.pieces if i not in model.base.vocabulary.special}
    out = []

    def spell(left, ids):
        if not left:
            out.append(ids)
        for i, piece in pieces.items():
            if piece and left.startswith(piece):
                spell(left[len(piece) :], (*ids, i))

    for text in texts:
        spell(text, ())
    return out


def enumerated(model, texts, logits, temperature=1.0):
    """Probability of every sequence of tokens that writes a text: softmaxes over the tokens from which some text can still be reached."""
    eos = model.base.vocabulary.tokenizer.eos_token_id
    paths = {(*ids, eos) for ids in spellings(model, texts)}
    prefixes = {p[:n] for p in paths for n in range(len(p) + 1)}

    def total(y):
        if y in paths:
            return {y[:-1]: 1.0}
        following = sorted({p[len(y)] for p in prefixes if len(p) > len(y) and p[: len(y)] == y})
        shares = (logits(list(y))[following] / temperature).softmax(-1).tolist()
        out = Counter()
        for token, share in zip(following, shares, strict=True):
            for ids, p in total((*y, token)).items():
                out[ids] += share * p
        return out

    return total(())


def mixed(model, beta=0.0):
    """Logits of base and guide behind a response, without caches."""
    prompt = list(model.base.tokenizer(PROMPT).input_ids)
    base, pair = model.base.network, model.values.get("implicit")

    def logits(y):
        z = outputs(base, prompt + y)[-1]
        if beta:
            z = z + beta * (outputs(pair.tuned.network, prompt + y)[-1] - outputs(pair.untuned.network, prompt + y)[-1])
        return z

    return logits


def close(answers, expected):
    """Chi-square of the tokens of ``answers`` against their probabilities."""
    n, counts = len(answers), Counter(tuple(i for i in c.token_ids if i) for c in answers)
    assert set(counts) <= set(expected), set(counts) - set(expected)
    likely = {t: p * n for t, p in expected.items() if p * n > 5}
    rare = n - sum(likely.values())
    pairs = [(counts[t], e) for t, e in likely.items()] + ([(n - sum(counts[t] for t in likely), rare)] if rare > 1 else [])
    freedom = max(1, len(pairs) - 1)
    assert sum((c - e) ** 2 / e for c, e in pairs) < freedom + 4 * (2 * freedom) ** 0.5 + 4
    return counts
