"""The settings of a search: token guidance, beams, selection. Standard library only.

``ivg.search.methods`` has the named combinations. Sources: IVG, Liu et al. 2024 (arXiv 2409.17819); EFT, Mitchell et al. 2023; FUDGE,
Yang & Klein 2021; VAS, Han et al. 2024; GenARM, Xu et al. 2024; CARDS, Li et al. 2024 (arXiv 2406.16306); classifier-free guidance,
Sanchez et al. 2023 (arXiv 2306.17806); contrastive decoding, Li et al. 2023 (arXiv 2210.15097); RMOD, Son et al. 2025 (arXiv
2503.08796); RSD, Liao et al. 2025 (arXiv 2501.19324); GSI, Geuter et al. 2025 (arXiv 2506.04118);
W2S-AlignTree, Ding et al. 2025 (arXiv 2511.11518).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ivg.settings import rules as r
from ivg.settings.schema import Setting, validate

Transform = Literal["identity", "log-sigmoid", "centered"]
ValuesRead = Literal["answer", "all"]
SelectionName = Literal["top", "soft", "reject", "particles", "speculate", "tree"]
SelectionFunction = Callable[[Sequence[Any], Sequence[float]], Sequence[int]]
"""A selection rule of (beams, their scores): the positions of those that are kept, the best first, at most W."""
Combination = Literal["sum", "min"]
Acceptance = Literal["threshold", "clip", "sigmoid"]
StepAggregation = Literal["last", "min", "mean", "product"]
Weights = tuple[tuple[str, float], ...]
"""(name, weight) of values."""

MAX_BEAMS = 256
"""Beams of all requests that run at once, where nothing is said."""

_WITHIN_1000 = r.number("within 1000 of 0", -1000, 1000)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Every setting of a search, with its default; docs/reference/settings.md describes each.

    Raises:
        ConfigError: a field of the wrong type or out of range.
    """

    width: Annotated[
        int,
        Setting(
            "Beams kept (W).",
            r.count(1, most=r.MOST_BEAMS, label="width (W)"),
            aliases=("w", "W", "num_beams", "beam_width"),
            flags=("-W", "--width"),
            group="selection",
        ),
    ] = 1
    successors: Annotated[
        int,
        Setting(
            "Continuations of each beam (K).",
            r.count(1, most=r.MOST_BEAMS, label="successors (K)"),
            aliases=("k", "K", "num_candidates"),
            flags=("-K", "--successors"),
            group="selection",
        ),
    ] = 1
    chunk_length: Annotated[
        int | None,
        Setting(
            "Tokens between selections (L).",
            r.count(1, optional=True, label="chunk_length (L)"),
            aliases=("l", "L", "block_len"),
            flags=("-L", "--chunk-length"),
            group="selection",
            unset="the whole response",
        ),
    ] = None
    chunk_until: Annotated[
        str | None,
        Setting(
            "Text at which a chunk ends, such as \\n: chunks are steps; L is the most tokens of one.",
            r.MARKER,
            flags=("--chunk-until",),
            group="selection",
            unset="none",
            escapes=True,
        ),
    ] = None
    token: Annotated[
        str | None,
        Setting(
            "Value that guides every token: none, implicit, explicit, reward, arm, contrast, or the name of your own.",
            r.VALUE_NAME,
            aliases=("token_value",),
            flags=("--token",),
            unset="none",
        ),
    ] = None
    select: Annotated[
        str | None,
        Setting(
            "Value that selects beams: none, implicit, explicit, reward, contrast, or the name of your own.",
            r.VALUE_NAME,
            aliases=("select_value",),
            flags=("--select",),
            unset="none",
        ),
    ] = None
    weights: Annotated[
        Weights,
        Setting(
            "Several values guide tokens by their weighted sum, instead of token: NAME=WEIGHT,NAME=WEIGHT.",
            r.WEIGHTS,
            flags=("--weights",),
            accepts=dict[str, float] | str,
        ),
    ] = ()
    select_weights: Annotated[
        Weights,
        Setting(
            "Several values select by their weighted sum, instead of select: NAME=WEIGHT,NAME=WEIGHT.",
            r.WEIGHTS,
            flags=("--select-weights",),
            accepts=dict[str, float] | str,
        ),
    ] = ()
    select_combine: Annotated[
        Combination,
        Setting(
            "How the values of select_weights make one score: sum, or min (the worst of them, each times its weight).",
            r.choice("sum", "min"),
            flags=("--select-combine",),
            group="selection",
        ),
    ] = "sum"
    select_reference: Annotated[
        Weights,
        Setting(
            "With select_combine=min: the level of a value that counts as 0, subtracted before its weight: NAME=NUMBER,NAME=NUMBER.",
            r.LEVELS,
            flags=("--select-reference",),
            accepts=dict[str, float] | str,
            group="selection",
        ),
    ] = ()
    step_aggregation: Annotated[
        StepAggregation | None,
        Setting(
            "Process rewards: the probabilities that the steps of a response are right make one number by last, min, mean or product "
            "(its logarithm). A sequence classifier is then read at the end of each step.",
            r.choice("last", "min", "mean", "product", optional=True),
            flags=("--step-aggregation",),
            group="steps",
            unset="last for a classifier of tokens; a sequence classifier reads the whole response",
        ),
    ] = None
    step_separator: Annotated[
        str | None,
        Setting(
            "Process rewards: text that ends a step, as the reward was trained with.",
            r.MARKER,
            flags=("--step-separator",),
            group="steps",
            unset="a line break",
            escapes=True,
        ),
    ] = None
    beta: Annotated[
        float, Setting("Weight of token guidance.", _WITHIN_1000, aliases=("alpha", "guidance_weight"), flags=("--beta",), group="guidance")
    ] = 1.0
    contrast: Annotated[
        str | None,
        Setting(
            "Value contrast: an instruction to follow more closely. The base's own weights read the prompt with it and without it.",
            r.INSTRUCTION,
            flags=("--contrast",),
            group="contrast",
            unset="none",
        ),
    ] = None
    negative: Annotated[
        str | None,
        Setting(
            "Value contrast: an instruction to move away from, as a negative prompt.",
            r.INSTRUCTION,
            aliases=("negative_prompt",),
            flags=("--negative",),
            group="contrast",
            unset="none",
        ),
    ] = None
    candidates: Annotated[
        int,
        Setting(
            "Number of the base's likeliest tokens that a value re-scores; 0: the whole vocabulary (the value must have the base's).",
            r.count(0, "0 (whole vocabulary) or more"),
            flags=("--guide-candidates",),
            group="guidance",
        ),
    ] = 0
    transform: Annotated[
        Transform,
        Setting(
            "Transform of the candidates' values: identity, log-sigmoid or centered.",
            r.choice("identity", "log-sigmoid", "centered"),
            group="guidance",
        ),
    ] = "identity"
    normalise: Annotated[bool, Setting("Mix log-probabilities instead of logits (GenARM).", r.FLAG, group="guidance")] = False
    gate: Annotated[
        float,
        Setting(
            "Guide only tokens whose next-token entropy under the base is at least this many nats; 0: all.",
            r.number("0 (guide everywhere) or more nats", 0),
            flags=("--gate",),
            group="guidance",
        ),
    ] = 0.0
    plausibility: Annotated[
        float,
        Setting(
            "Only tokens to which the base gives at least this share of its likeliest token's probability (contrastive decoding); 0: all.",
            r.SHARE,
            flags=("--plausibility",),
            group="guidance",
        ),
    ] = 0.0
    kl_budget: Annotated[
        float | None,
        Setting(
            "Nats of KL divergence from the base that token guidance may take in one answer; beta is then its largest weight.",
            r.number("0 or more nats", 0, optional=True),
            flags=("--kl-budget",),
            group="guidance",
            unset="no limit",
        ),
    ] = None
    draft: Annotated[
        int,
        Setting(
            "Speculative decoding: the guiding pair drafts up to this many tokens ahead of the base; 0: off. Exact in distribution.",
            r.count(0, "0 (off) or more tokens", most=r.MOST_BEAMS),
            aliases=("num_speculative_tokens",),
            flags=("--draft",),
        ),
    ] = 0
    guide_after: Annotated[
        str | None,
        Setting(
            "Text after which the answer begins, such as </think>: the model's thinking before it is neither guided nor selected.",
            r.MARKER,
            flags=("--guide-after",),
            unset="no thinking",
            escapes=True,
        ),
    ] = None
    thinking_budget: Annotated[
        int | None,
        Setting(
            "After so many tokens of thinking without the text of guide_after, that text is forced.",
            r.count(0, "0 or more tokens", optional=True),
            aliases=("thinking_token_budget",),
            flags=("--thinking-budget",),
            unset="no limit",
        ),
    ] = None
    values_read: Annotated[
        ValuesRead,
        Setting(
            "With guide_after: what guides and values read: answer (the response without its thinking) or all.",
            r.choice("answer", "all"),
        ),
    ] = "answer"
    rule: Annotated[
        SelectionName | SelectionFunction,
        Setting(
            "Selection rule. top: the best; soft: drawn with probability proportional to exp(score / soft_scale); reject: CARDS; "
            "particles: a particle filter of W*K particles; speculate: a small model drafts K chunks, and the base writes where the value "
            "accepts none (RSD, GSI); tree: Monte Carlo tree search with the budget of W beams. In Python also a function of your own.",
            r.choice_or_function("top", "soft", "reject", "particles", "speculate", "tree"),
            accepts=SelectionName,
        ),
    ] = "top"
    soft_scale: Annotated[
        float,
        Setting("Rules soft and speculate: draws are proportional to exp(score / soft_scale).", r.POSITIVE, group="soft|speculate"),
    ] = 1.0
    decay: Annotated[
        float,
        Setting(
            "Factor of W*K from chunk to chunk, the total unchanged; 1: constant.",
            r.number("in (0, 1]", 0, 1, open_low=True),
            flags=("--decay",),
            group="selection",
        ),
    ] = 1.0
    original: Annotated[
        bool,
        Setting("As in the authors' code, a finished beam that is kept competes with K copies of itself.", r.FLAG, group="selection"),
    ] = False
    target: Annotated[
        float | None,
        Setting(
            "Rule reject: the reward that a whole response should reach.",
            r.number("a finite reward, within 1e9 of 0", -1e9, 1e9, optional=True),
            unset="from the prompt's value and tries",
            group="reject",
        ),
    ] = None
    accept_scale: Annotated[
        float,
        Setting(
            "Rule reject: accept with probability min(1, exp((value - threshold) / accept_scale)). Rule speculate: see acceptance.",
            r.POSITIVE,
            group="reject|speculate",
        ),
    ] = 0.7
    threshold_start: Annotated[float, Setting("Rule reject: share of the target in the first threshold.", r.SHARE, group="reject")] = 0.5
    tries: Annotated[int, Setting("Rule reject: largest number of segments tried for one place.", r.count(1), group="reject")] = 20
    segment_entropy: Annotated[
        float,
        Setting(
            "Rule reject: a segment ends where the base's entropy reaches this many nats.",
            r.number("positive (nats)", 0, open_low=True),
            group="reject",
        ),
    ] = 3.0
    segment_min: Annotated[
        int,
        Setting(
            "Rule reject: smallest number of tokens of a segment; chunk_length is the largest.",
            r.count(1, "at least 1 token"),
            group="reject",
        ),
    ] = 4
    exploration: Annotated[
        float,
        Setting(
            "Rule tree: weight of exploration, in units of the value; 0: always the best leaf.",
            r.number("0 (best first) or more", 0),
            aliases=("uct_constant",),
            flags=("--exploration",),
            group="tree",
        ),
    ] = 1.0
    drafter: Annotated[
        str,
        Setting(
            "Rule speculate: value whose language model writes the drafts: implicit (its tuned model), arm, or the name of your own.",
            r.WRITER_NAME,
            aliases=("draft_model",),
            flags=("--drafter",),
            group="speculate",
        ),
    ] = "implicit"
    tilt: Annotated[
        bool,
        Setting(
            "Rule speculate: judge drafts by value + soft_scale * log(p_base / p_draft) (GSI). The base then reads every draft.",
            r.FLAG,
            group="speculate",
        ),
    ] = False
    acceptance: Annotated[
        Acceptance,
        Setting(
            "Rule speculate: probability that a draft is accepted, with x = (value - accept_threshold) / accept_scale. "
            "threshold: 1 if x >= 0, else 0; clip: min(1, max(0, x)); sigmoid: 1 / (1 + exp(-x)).",
            r.choice("threshold", "clip", "sigmoid"),
            group="speculate",
        ),
    ] = "threshold"
    accept_threshold: Annotated[
        float | None,
        Setting(
            "Rule speculate: value from which a draft is accepted.",
            r.number("a finite value, within 1e9 of 0", -1e9, 1e9, optional=True),
            flags=("--accept-threshold",),
            unset="the value of the prompt",
            group="speculate",
        ),
    ] = None
    particle_beta: Annotated[
        float, Setting("Rule particles: weight of the value in the target distribution.", _WITHIN_1000, group="particles")
    ] = 1.0
    resample_below: Annotated[
        float, Setting("Rule particles: resample below this share of effective particles.", r.SHARE, group="particles")
    ] = 0.5

    def __post_init__(self) -> None:
        validate(self)
