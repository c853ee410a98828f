"""CARDS (arXiv 2406.16306) and the particle filter written straight from their formulas, on the pieces of ``naive``: no cache, no batch."""

import math

import torch

from ivg.utils.rng import child_rng_path, mix, uniform
from naive import entropy, grow, guided, once_for_each_text, outputs


@once_for_each_text
def cards(base, values, s, prompt, seed, temperature, limit, eos=0):
    """Segment rejection: (tokens, value)."""
    seed, value = mix(seed, 0), values[s.select]
    start = value.score(prompt, [])
    target = start + s.accept_scale * math.log(s.tries) if s.target is None else s.target
    first = (1 - s.threshold_start) * start + s.threshold_start * target
    y, rng_path, done, score = [], 0, False, None
    while not done:
        tried = []
        for k in range(s.tries):
            line = child_rng_path(rng_path, len(y), k)
            new, end = list(y), False
            while not end and len(new) - len(y) < s.chunk_length:
                if len(new) - len(y) >= s.segment_min and entropy(outputs(base, prompt + new)[-1]) >= s.segment_entropy:
                    break
                new, end = grow(base, values, s, prompt, new, line, 1, temperature, seed, limit, eos)
            v = value.score(prompt, new)
            tried.append((v, -k, new, line, end))
            if uniform(seed, len(y), k, 0xCA2D5) < math.exp(min(0, (v - first - len(new) / limit * (target - first)) / s.accept_scale)):
                break
        else:
            tried.sort()
        score, _, y, rng_path, done = tried[-1]
    return y, score


def log_ratio(base, values, s, prompt, y, temperature):
    """log pi_base - log pi_proposal of the last token."""
    z = outputs(base, prompt + y[:-1])[-1]
    moved = guided(z, s, values[s.token], prompt, y[:-1]) if s.token and s.beta else z
    before, after = ((x / temperature).log_softmax(-1)[y[-1]] for x in (z, moved))
    return float(before - after)


def smc(base, values, s, prompt, seed, temperature, limit, eos=0):
    """Particle filter with systematic resampling: (tokens, value)."""
    return filter_particles(base, values, s, prompt, seed, temperature, limit, eos)[:2]


@once_for_each_text
def filter_particles(base, values, s, prompt, seed, temperature, limit, eos=0):
    """Particle filter with systematic resampling: (tokens, value, (weight, tokens) of all particles, log Z)."""
    seed, value, n = mix(seed, 0), values[s.select], s.width * s.successors
    particles, chunks, log_z = [([], 0, False, 0.0, 0.0)] * n, 0, 0.0
    while not all(p[2] for p in particles):
        chunks += 1
        grown, seen = [p for p in particles if p[2]], {}
        for y, rng_path, done, weight, before in particles:
            if done:
                continue
            k = seen[rng_path, len(y)] = seen.get((rng_path, len(y)), -1) + 1
            line = child_rng_path(rng_path, len(y), k)
            new, end = grow(base, values, s, prompt, y, line, s.chunk_length, temperature, seed, limit, eos)
            v = value.score(prompt, new)
            weight += s.particle_beta * (v - before)
            weight += sum(log_ratio(base, values, s, prompt, new[: i + 1], temperature) for i in range(len(y), len(new)))
            grown.append((new, line, end, weight, v))
        particles = grown
        log_weights = torch.tensor([p[3] for p in particles], dtype=torch.float64)
        mean, w = float(log_weights.logsumexp(0)) - math.log(n), log_weights.softmax(0)
        if not all(p[2] for p in particles) and float(1 / (w**2).sum()) < s.resample_below * n:
            picks = [int((w.cumsum(0) <= (uniform(seed, chunks, 0x5E5A) + i) / n).sum()) for i in range(n)]
            particles = [(*particles[i][:3], 0.0, particles[i][4]) for i in picks]
            log_z, mean = log_z + mean, 0.0
            w = torch.full((n,), 1 / n, dtype=torch.float64)
    answer = particles[int((w.cumsum(0) <= uniform(seed, chunks, 0xA25)).sum())]
    return answer[0], answer[4], [(float(weight), p[0]) for weight, p in zip(w, particles, strict=True)], log_z + mean


@once_for_each_text
def speculate(base, values, s, prompt, seed, temperature, limit, eos=0):
    """Guided speculative chunks (RSD, arXiv 2501.19324; GSI, arXiv 2506.04118): (tokens, value)."""
    seed, value, draft = mix(seed, 0), values[s.select], values[s.drafter].tuned
    threshold = value.score(prompt, []) if s.accept_threshold is None else s.accept_threshold
    chunk, y, rng_path, done, score = s.chunk_length or limit, [], 0, False, None

    def chunks(network, first):
        out = []
        for k in range(s.successors):
            line = child_rng_path(rng_path, len(y), first + k)
            new, end = grow(network, {}, s, prompt, y, line, chunk, temperature, seed, limit, eos)
            out.append((new, line, end, value.score(prompt, new)))
        return out

    def draw(scores, purpose):
        weights = (torch.tensor(scores, dtype=torch.float64) / s.soft_scale).softmax(0)
        return int((weights.cumsum(0) <= uniform(seed, len(y), purpose)).sum())

    def logp(network, new):
        rows = (outputs(network, prompt + new)[len(prompt) + len(y) - 1 : -1] / temperature).log_softmax(-1)
        return sum(float(rows[i, t]) for i, t in enumerate(new[len(y) :]))

    while not done:
        drafts = chunks(draft, s.successors)
        scores = [r + s.soft_scale * (logp(base, new) - logp(draft, new)) * s.tilt for new, _, _, r in drafts]
        pick = draw(scores, 0xD4AF7)
        x = (scores[pick] - threshold) / s.accept_scale
        chance = {"threshold": float(x >= 0), "clip": min(1, max(0, x)), "sigmoid": 1 / (1 + math.exp(-x))}[s.acceptance]
        if uniform(seed, len(y), 0xD4ACC) < chance:
            chosen = drafts[pick]
        else:
            written = chunks(base, 0)
            chosen = written[draw([r for *_, r in written], 0xD4BA5)]
        y, rng_path, done, score = chosen
    return y, score


@once_for_each_text
def tree(base, values, s, prompt, seed, temperature, limit, eos=0):
    """Tree search over chunks (UCT; arXiv 2511.11518), everything counted anew for every expansion: (tokens, value)."""
    seed, value, chunk = mix(seed, 0), values[s.select], s.chunk_length or limit
    nodes, finished = {(): (0, 0.0)}, []  # response: (random path, value); of unfinished ones
    expanded = []

    def below(node):
        return [other for other in nodes if other[: len(node)] == node]

    def visits(node):
        return (node != ()) + sum(other in expanded for other in below(node))

    def best(node):
        return max((nodes[leaf][1] for leaf in below(node) if leaf not in expanded), default=-math.inf)

    left = s.width * s.successors * limit
    while leaves := [n for n in nodes if n not in expanded and s.successors * min(chunk, limit - len(n)) <= left]:
        leaves = [leaf for leaf in leaves if s.successors * (limit - len(leaf)) <= left] or leaves
        node = ()
        while node in expanded:
            steps = [other for other in below(node) if len(other) == len(node) + chunk and any(leaf in below(other) for leaf in leaves)]
            node = max(steps, key=lambda n: best(n) + s.exploration * math.sqrt(math.log(visits(node)) / visits(n)))
        expanded.append(node)
        for k in range(s.successors):
            line = child_rng_path(nodes[node][0], len(node), k)
            new, end = grow(base, values, s, prompt, list(node), line, chunk, temperature, seed, limit, eos)
            left -= len(new) - len(node)
            if end:
                finished.append((value.score(prompt, new), -len(finished), new))
            else:
                nodes.setdefault(tuple(new), (line, value.score(prompt, new)))
    score, _, tokens = max(finished)
    return tokens, score
