"""Rows of benchmarks as ``ivg.bench`` writes them."""


def row(label, number, seconds, answers=2, **more):
    facts = {
        "new_tokens": 10,
        "first_text_seconds": seconds / 2,
        "tokens": 10 * answers,
        "peak": 300,
        "before": 100,
        "flops": 8e12,
        "dtype": "float32",
    }
    facts |= {
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "commit": "c",
        "others": 0.0,
        "roofline": seconds / 2,
        "forward_tokens": {"base": 5},
        "sizes": {"base": 100, "tuned": 25},
    }
    return {"label": label, "round": number, "seconds": seconds, "answers": answers, **facts, **more}
