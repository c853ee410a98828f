"""Every method written straight from its formulas: no cache of a model, no batch, one beam and one full forward pass at a time, float32.

Draws come from ivg.utils.rng so that tokens can be compared; nothing else of ivg is used. At the end: rows of a cached model at random.
"""

import math
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import torch

from ivg.utils.rng import child_rng_path, mix, uniform

KNOWN = []
"""Of the search that runs, if any: its outputs by network and tokens."""


def outputs(network, ids):
    known, place = KNOWN[-1] if KNOWN else {}, (id(network), *ids)
    if place not in known:
        with torch.no_grad():
            known[place] = network(input_ids=torch.tensor([ids], device=device_of(network))).logits[0].float().cpu()
    return known[place]


def once_for_each_text(search):
    """Repeats no pass within one search, in which no network changes; forgets all when the search ends."""

    @wraps(search)
    def run(*args, **more):
        KNOWN.append(KNOWN[-1] if KNOWN else {})
        try:
            return search(*args, **more)
        finally:
            KNOWN.pop()

    return run


def device_of(network):
    return next((p.device for p in network.parameters()), None) if isinstance(network, torch.nn.Module) else None


class Implicit:
    def __init__(self, tuned, untuned):
        self.tuned, self.untuned = tuned, untuned

    def deltas(self, prompt, y):
        return outputs(self.tuned, prompt + y)[-1] - outputs(self.untuned, prompt + y)[-1]

    def draft(self, prompt, y, beta):
        untuned = outputs(self.untuned, prompt + y)[-1]
        return untuned + beta * self.deltas(prompt, y)

    def score(self, prompt, y):
        both = [outputs(m, prompt + y).log_softmax(-1) for m in (self.tuned, self.untuned)]
        return sum(float(both[0][len(prompt) + i - 1, t] - both[1][len(prompt) + i - 1, t]) for i, t in enumerate(y))


class Contrast(Implicit):
    """One network behind two prefixes."""

    def __init__(self, network, positive, negative):
        self.network, self.positive, self.negative = network, positive, negative

    def deltas(self, prompt, y):
        return outputs(self.network, self.positive + prompt + y)[-1] - outputs(self.network, self.negative + prompt + y)[-1]

    def draft(self, prompt, y, beta):
        return outputs(self.network, self.negative + prompt + y)[-1] + beta * self.deltas(prompt, y)

    def score(self, prompt, y):
        return sum(self._logp(self.positive + prompt, y)) - sum(self._logp(self.negative + prompt, y))

    def _logp(self, prompt, y):
        logps = outputs(self.network, prompt + y).log_softmax(-1)
        return [float(logps[len(prompt) + i - 1, t]) for i, t in enumerate(y)]


class QHead:
    def __init__(self, network):
        self.network = network

    def deltas(self, prompt, y):
        return outputs(self.network, prompt + y)[-1]

    def score(self, prompt, y):
        ids = prompt + y
        return float(outputs(self.network, ids[:-1])[-1, ids[-1]])


class VHead(QHead):
    deltas = None

    def score(self, prompt, y):
        return float(outputs(self.network, prompt + y)[-1, 0])


class ProcessReward(Implicit):
    """A classifier of tokens with two labels behind each step and its separator."""

    deltas = None

    def __init__(self, network, ids, text, how, separator):
        self.network, self.ids, self.text, self.how, self.separator = network, ids, text, how, separator

    def score(self, prompt, y):
        read, p = list(prompt), []
        for step in [x for x in self.text(y).split(self.separator) if x.strip()] or [self.text(y)]:
            read += [*self.ids(step), *self.ids(self.separator)]
            p.append(float(outputs(self.network, read)[-1].softmax(-1)[1]))
        return {"last": p[-1], "min": min(p), "mean": sum(p) / len(p), "product": math.log(math.prod(p))}[self.how]


class LogProb(Implicit):
    def __init__(self, arm):
        self.arm = arm

    def deltas(self, prompt, y):
        return outputs(self.arm, prompt + y)[-1].log_softmax(-1)


def entropy(z):
    return float(torch.distributions.Categorical(logits=z).entropy())


def guided(z, s, value, prompt, y):
    if entropy(z) < s.gate:
        return z
    if s.plausibility:
        share = z.softmax(-1) / z.softmax(-1).max()
        inner = guided(z, replace(s, plausibility=0.0), value, prompt, y)
        return torch.where(share >= s.plausibility, inner, -math.inf)
    if s.normalise:
        z = z.log_softmax(-1)
    if s.candidates == 0 and value.deltas is not None:
        return z + s.beta * value.deltas(prompt, y)
    top = z.topk(s.candidates or 20).indices.tolist()
    v = torch.tensor([value.score(prompt, [*y, t]) for t in top])
    v = {"identity": v, "log-sigmoid": torch.nn.functional.logsigmoid(v), "centered": v - v.mean()}[s.transform]
    out = torch.full_like(z, -math.inf)
    out[top] = z[top] + s.beta * v
    return out


def invert(weights, u):
    mass = weights.double().cumsum(-1)
    return int((mass <= u * mass[-1]).sum())


def speculative(p, q, numbers):
    """Rejection with residual resampling: a draw from q, kept with probability min(1, p / q), else one from (p - q)+."""
    token = invert(q, numbers[0])
    return token if numbers[1] * q[token] < p[token] else invert((p - q).clamp(min=0), numbers[2])


def answer_start(y, marker):
    """Tokens of the response before its answer; None: it is still thinking."""
    ends = (i + len(marker) for i in range(len(y)) if y[i : i + len(marker)] == marker)
    return next(ends, None) if marker else 0


def answer(y, s, marker):
    return y if s.values_read == "all" else y[answer_start(y, marker) :]


def grow(base, values, s, prompt, y, rng_path, tokens, temperature, seed, limit, eos, marker=(), text=None):
    """Up to ``tokens`` more tokens of the answer, and the thinking before it; (response, finished). ``text``: decodes."""
    y, grown, state = list(y), 0, None
    while grown < tokens:
        z = outputs(base, prompt + y)[-1]
        start = answer_start(y, marker)
        grown += start is not None
        if s.token and s.beta and start is not None:
            moved = guided(z, s, values[s.token], prompt, answer(y, s, marker))
            if s.kl_budget is not None:
                left, rate = state or budget_state(base, values, s, prompt, y, temperature, limit)
                moved, cost, c = paced(z, moved, left, rate, len(y), limit, temperature or 1.0)
                state = left - cost, rate + c
            z = moved
        over = -1 if start is not None or s.thinking_budget is None else len(y) - s.thinking_budget
        if 0 <= over < len(marker):
            token = marker[over]
        elif temperature == 0:
            token = int(z.argmax())
        elif s.draft and s.token and s.beta:
            q = (values[s.token].draft(prompt, y, s.beta) / temperature).softmax(-1)
            numbers = [uniform(seed, rng_path, len(y), 0x5BEC, k) for k in range(3)]
            token = speculative((z / temperature).softmax(-1), q, numbers)
        else:
            token = invert((z / temperature).softmax(-1), uniform(seed, rng_path, len(y)))
        y.append(token)
        if token == eos or len(y) == limit:
            return y, True
        begun = answer_start(y, marker)
        if s.chunk_until and begun is not None:
            now, before = (steps_ended(text(ids[begun:]), s.chunk_until) for ids in (y, y[:-1]))
            if now > before:
                return y, False
    return y, False


def kl(z, moved, temperature):
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (moved, z))
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > -math.inf)


def within(z, moved, left, temperature):
    """(logits between base and guided whose divergence is at most ``left``, what of it they take), by bisection."""
    if left <= 0:
        return z, 0.0
    nats = kl(z, moved, temperature)
    if nats <= left:
        return moved, nats
    low, high = 0.0, 1.0
    for _ in range(50):
        s = (low + high) / 2
        between = torch.where(moved.isneginf(), -math.inf, z + s * (moved - z))
        low, high = (s, high) if kl(z, between, temperature) <= left else (low, s)
    return (torch.where(moved.isneginf(), -math.inf, z + low * (moved - z)) if low else z), left


def paced(z, moved, left, rate, before, limit, temperature):
    """(logits, cost, c) of the next token: the share s with which limit - before tokens like those so far take ``left``, c = cost / s^2."""
    if left <= 0:
        return z, 0.0, 0.0
    full = kl(z, moved, temperature)
    ratio = left * (before + 1) / ((rate + full) * (limit - before)) if rate + full else 1.0
    s = min(1.0, math.sqrt(ratio))
    between = moved if s == 1 else torch.where(moved.isneginf(), -math.inf, z + s * (moved - z))
    out, cost = within(z, between, left, temperature)
    return out, cost, full if (moved.isneginf() & ~z.isneginf()).any() else cost / s**2


def budget_state(base, values, s, prompt, y, temperature, limit):
    """(what is left of the budget, sum of c) behind a response, its tokens one after the other."""
    left, rate = s.kl_budget, 0.0
    for i in range(len(y)):
        z = outputs(base, prompt + y[:i])[-1]
        _, cost, c = paced(z, guided(z, s, values[s.token], prompt, y[:i]), left, rate, i, limit, temperature or 1.0)
        left, rate = left - cost, rate + c
    return left, rate


def steps_ended(text, separator):
    return sum(1 for piece in text.split(separator)[:-1] if piece.strip())


@once_for_each_text
def search(base, values, s, prompt, seed, temperature, limit, eos=0, marker=(), text=None):
    """CBS(W, K, L): (tokens, score). ``marker``: the tokens behind which the answer begins."""
    seed, chunk = mix(seed, 0), s.chunk_length or limit

    def score(y):
        if answer_start(y, marker) is None:
            return -math.inf
        return selection_score(values, s, prompt, answer(y, s, marker))

    kept = [([], 0, False, 0.0)]
    plan = budgets(-(-limit // chunk), s.width * s.successors, s.decay, s.width)
    budget, chunks = plan.pop(0), 0
    counts = [budget]
    while not all(done for _, _, done, _ in kept):
        pool = [hypothesis for hypothesis in kept if hypothesis[2] for _ in range(s.successors if s.original else 1)]
        for (y, rng_path, done, _), count in zip(kept, counts, strict=False):
            for k in range(0 if done else count):
                line = child_rng_path(rng_path, len(y), k)
                new, end = grow(base, values, s, prompt, y, line, chunk, temperature, seed, limit, eos, marker, text)
                pool.append((new, line, end, score(new)))
        if s.rule == "top" and not s.original:
            pool = list({tuple(p[0]): p for p in reversed(pool)}.values())[::-1]
        if s.rule == "soft":
            chunks, kept = chunks + 1, []
            while pool and len(kept) < s.width:
                best = max(p[3] for p in pool)
                weights = [math.exp((p[3] - best) / s.soft_scale) if best > -math.inf else 1.0 for p in pool]
                kept.append(pool.pop(weighted_draw(weights, uniform(seed, chunks, len(kept), 0x50F7))))
        else:
            kept = sorted(pool, key=lambda p: -p[3])[: s.width]
        budget = plan.pop(0) if plan else budget  # chunks that end early are more than planned
        counts = [budget // s.width + (i < budget % s.width) for i in range(s.width)]
    return kept[0][0], kept[0][3]


def selection_score(values, s, prompt, y):
    """What a response is selected by: one value, or several by their weighted sum or the worst of them."""
    levels = dict(s.select_reference)
    each = [w * (values[name].score(prompt, y) - levels.get(name, 0.0)) for name, w in s.select_weights]
    if each:
        return min(each) if s.select_combine == "min" else sum(each)
    return values[s.select].score(prompt, y) if s.select else 0.0


def weighted_draw(weights, u):
    total, at = 0.0, u * sum(weights)
    for i, w in enumerate(weights):
        total += w
        if total > at:
            return i
    return len(weights) - 1


def budgets(chunks, each, decay, least):
    """Whole numbers in proportion to decay^i, none below ``least``, by taking one at a time from where there is too much."""
    total, fixed = chunks * each, 0
    while True:
        weights = [decay**i for i in range(chunks - fixed)]
        ideal = [(total - fixed * least) * w / sum(weights) for w in weights]
        if ideal[-1] >= least or len(ideal) == 1:
            break
        fixed += 1
    out = [math.floor(x + 1e-9) for x in ideal]
    while sum(out) + fixed * least < total:
        out[max(range(len(out)), key=lambda i: (ideal[i] - out[i], -i))] += 1
    return out + [least] * fixed


class PrefixByPrefix:
    """A network whose every output comes from a pass over the tokens before it alone: where those depend on the length (LongRoPE)."""

    def __init__(self, network):
        self.network, self.known = network, {}

    def __call__(self, input_ids):
        ids = input_ids[0].tolist()
        return SimpleNamespace(logits=torch.stack([self.last(ids[: n + 1]) for n in range(len(ids))])[None])

    def last(self, ids):
        if tuple(ids) not in self.known:
            inputs = torch.tensor([ids], device=device_of(self.network))
            self.known[tuple(ids)] = self.network(input_ids=inputs, use_cache=False).logits[0, -1]
        return self.known[tuple(ids)]


def outputs_of(model, ids):
    return outputs(model.network, ids)[-1]


def compare(got, expected, tolerance):
    assert (got.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def wander(model, rng, tokens, tolerance):
    rows, prompts = [], [[rng.randrange(1, tokens + 1) for _ in range(24)] for _ in range(2)]

    def some(least, most):
        return [rng.randrange(1, tokens + 1) for _ in range(rng.randrange(least, most))]

    for _ in range(40):
        action = rng.choice(["open", "open unread", "fork", "fork", "feed", "feed", "cut", "cut all", "free", "free", "release memory"])
        if action.startswith("open") or not rows:
            ids = rng.choice(prompts)[: rng.randrange(1, 25)] + some(0, 4)
            row = model.open(ids)
            assert row.ids == ids[: len(row.ids)]
            assert len(row.ids) < len(ids)
            rows.append(row)
            if action == "open":
                compare(model.last_outputs([row], [ids[len(row.ids) :]])[0], outputs_of(model, row.ids), tolerance)
        elif action == "fork":
            rows.append(model.fork(rng.choice(rows)))
        elif action == "cut":
            row = rng.choice(rows)
            model.truncate(row, rng.randrange(0, len(row.ids) + 1))
        elif action == "cut all":
            group, length = rng.choice(rows).group, rng.randrange(0, 24)
            for row in (r for r in rows if r.group is group):
                model.truncate(row, length)
        elif action == "release memory":
            model.release_memory()
        elif action == "free" and len(rows) > 1:
            model.free(rows.pop(rng.randrange(len(rows))))
        else:
            chosen, piece = rng.sample(rows, rng.randrange(1, len(rows) + 1)), some(1, 7)
            new = [piece if rng.random() < 0.4 else some(1, 7) for _ in chosen]
            for row, out in zip(chosen, model.last_outputs(chosen, new), strict=True):
                compare(out, outputs_of(model, row.ids), tolerance)
        assert model.live_rows == len(rows)
