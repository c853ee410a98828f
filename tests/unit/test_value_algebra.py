"""Sums, differences and multiples of values, normalised values, batched functions and own rules; each against its definition."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch

from ivg import GuidedModel, batched
from ivg.errors import ConfigError, ScoreError, VocabularyError
from ivg.search.methods import Method
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import FakeEngine, byte_tokenizer, check_value, hypothesis, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams
from ivg.values.base import CompositeValue, FunctionValue, NormalizedValue, WorstCaseValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

COUNT = FunctionValue(lambda prompt, response: float(response.count("a")), "count")
LENGTH = FunctionValue(lambda prompt, response: float(len(response)), "length")


def test_a_value_shows_what_it_is():
    found = 2 * COUNT - 0.5 * LENGTH
    assert repr(COUNT) == "<FunctionValue count>"
    assert repr(found) == f"<CompositeValue {found.name}>" and "count" in found.name and "length" in found.name


@pytest.fixture(scope="module")
def base():
    return tiny_lm("base", seed=1)


def pair():
    return ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))


@pytest.fixture(scope="module")
def model(base):
    return GuidedModel(base, {"implicit": pair(), "explicit": tiny_value("vocabulary", seed=5)}, SamplingParams(max_new_tokens=8))


def chain(base, *texts):
    """Hypotheses, each the parent of the next; the last is finished."""
    found = []
    for i, text in enumerate(texts):
        found.append(hypothesis("The movie", text, base, found[-1] if found else None, end=i == len(texts) - 1))
    return found


# Algebra


@pytest.mark.parametrize(
    "value, parts, name",
    [
        (2 * COUNT - LENGTH, [(2, COUNT), (-1, LENGTH)], "2*count-length"),
        (COUNT + LENGTH, [(1, COUNT), (1, LENGTH)], "count+length"),
        (-COUNT, [(-1, COUNT)], "-count"),
        (COUNT * 0.5 + COUNT, [(1.5, COUNT)], "1.5*count"),
        ((COUNT - LENGTH / 4) * 2 - COUNT, [(1, COUNT), (-0.5, LENGTH)], "count-0.5*length"),
        (sum([COUNT, LENGTH, COUNT]), [(2, COUNT), (1, LENGTH)], "2*count+length"),
        (COUNT - COUNT, [(0, COUNT)], "0*count"),
    ],
)
def test_sums_of_values(base, value, parts, name):
    assert type(value) is CompositeValue and list(value.parts) == parts and value.name == name
    found = chain(base, " banana", " banana was")
    expected = [sum(w * v.score([h])[0] for w, v in parts) for h in found]
    assert value.score(found) == pytest.approx(expected)


def test_the_worst_of_several_is_one_term():
    worst = WorstCaseValue([(1.0, COUNT), (1.0, LENGTH)], "worst")
    assert (2 * worst - COUNT).parts == ((2.0, worst), (-1.0, COUNT))


@pytest.mark.parametrize("make", [lambda: COUNT + 1, lambda: COUNT * COUNT, lambda: 1 / COUNT, lambda: COUNT - "x", lambda: True * COUNT])
def test_what_is_no_sum_of_values(make):
    with pytest.raises(TypeError):
        make()


def test_a_factor_is_finite():
    with pytest.raises(ConfigError, match="weight of count must be a finite number"):
        math.inf * COUNT
    with pytest.raises(ZeroDivisionError):
        COUNT / 0


def test_algebra_guides_as_weights_do(model):
    implicit, explicit = model.values["implicit"], model.values["explicit"]
    settings = {"width": 2, "successors": 2, "chunk_length": 3, "seed": 4}
    weighted = {"weights": {"implicit": 0.5, "explicit": -0.1}, "select_weights": {"explicit": 2.0, "implicit": -1.0}}
    expected = model.generate("The movie", "custom", **weighted, **settings)
    found = model.generate("The movie", "custom", token=0.5 * implicit - explicit / 10, select=2 * explicit - implicit, **settings)
    assert found.token_ids == expected.token_ids and found.score == pytest.approx(expected.score, abs=1e-4)


def test_values_and_functions_in_place_of_names(model):
    found = model.generate("The movie", "bon", select=lambda prompt, response: -len(response), successors=4, seed=1)
    assert found.score == -len(found.text)
    assert model.generate("The movie", "bon", select=model.values["explicit"], successors=4) == model.generate(
        "The movie", "bon", successors=4
    )
    settings = {"seed": 1, "max_new_tokens": 6, "candidates": 3, "beta": 5.0}
    both = {"token": lambda prompt, response: len(response), "select": lambda prompt, response: -len(response)}
    found = model.generate("The movie", "cbs-explicit", **both, **settings)
    named = {role: FunctionValue(function, f"own {role}") for role, function in both.items()}
    expected = model.generate("The movie", "cbs-explicit", **named, **settings)
    assert (found.text, found.score) == (expected.text, -len(found.text)), "two functions without names"
    other = model.generate("The movie", "cbs-explicit", token=named["select"], select=both["select"], **settings)
    assert other.text != found.text, "the function of token matters here"
    twice = {"token": 0.5 * model.values["implicit"], "select": 0.5 * model.values["implicit"], "max_new_tokens": 6}
    assert model.generate("The movie", "ivg", seed=1, **twice).score is not None, "one expression in both places"
    explicit = model.values["explicit"]
    assert model.score("The movie", [" was"], 2 * explicit)[0] == pytest.approx(2 * model.score("The movie", [" was"])[0], abs=1e-4)
    assert model.score("The movie", [" was"], lambda prompt, response: float(len(prompt + response))) == [13.0]
    with pytest.raises(ConfigError, match="another of that name"):
        model.generate("The movie", "bon", select=FunctionValue(lambda p, r: 0.0, "explicit"))
    with pytest.raises(ConfigError, match=r"expected an ivg\.Value"):
        model.generate("The movie", "bon", select=3)


def test_what_leaves_no_token_is_named(model):
    (first,) = model.generate("The movie", "base", temperature=0.0, max_new_tokens=1).token_ids
    for name, setting in (("candidates", 1), ("plausibility", 1.0)):
        (done,) = model.generate(["The movie"], "eft", suppress_tokens=(first,), max_new_tokens=1, **{name: setting})
        assert done.error is not None and f"forbid all that {name}=1 leaves" in done.error


def test_a_value_named_explicit_is_the_one_that_is_given(base):
    """And not the reward model, which takes the place of an explicit value that is missing."""
    model = GuidedModel(base, {"reward": LENGTH}, SamplingParams(max_new_tokens=8))
    explicit = tiny_value("vocabulary", seed=5)
    assert explicit.name == "explicit"
    settings = {"successors": 4, "seed": 1, "ignore_eos": True}
    found = model.generate("The movie", "bon", select=explicit, **settings)
    assert found == GuidedModel(base, {"explicit": explicit}, model.sampling).generate("The movie", "bon", **settings)
    assert found.score != len(found.text)


# Normalised values


def by_definition(value, h):
    """sum_t log softmax(d_t)[y_t], one prefix after the other."""
    total = 0.0
    for t, token in enumerate(h.token_ids):
        prefix = hypothesis("The movie", h.vocabulary.response_text((), h.token_ids[:t]), FakeReader(h))
        total += float(value.deltas([prefix]).log_softmax(-1)[0, token])
        value.release([prefix.key])
    return total


class FakeReader:
    """What ``hypothesis`` needs of a model, for a prefix."""

    def __init__(self, h):
        self.vocabulary = h.vocabulary

    def prompt_ids(self, prompt):
        return self.vocabulary.tokenizer(prompt.content).input_ids


@pytest.mark.parametrize("kind", ["implicit", "explicit", "sum"])
def test_a_normalised_value_is_a_log_probability(base, kind):
    made = {"implicit": pair, "explicit": lambda: tiny_value("vocabulary", seed=5)}
    value = pair() + 0.3 * tiny_value("vocabulary", seed=5) if kind == "sum" else made[kind]()
    normalised = value.normalize()
    chained = chain(base, " was", " was go", " was good.")
    step_by_step = [normalised.score([h])[0] for h in chained]
    assert step_by_step == pytest.approx([by_definition(value, h) for h in chained], abs=1e-4)
    normalised.release([h.key for h in chained])
    assert normalised.score(chained) == pytest.approx(step_by_step, abs=1e-4)
    deltas = normalised.deltas(chained)
    assert torch.allclose(deltas.exp().sum(-1), torch.ones(len(chained)), atol=1e-4)
    assert normalised.parts == ((1.0, value),) and not normalised.is_sum


def test_an_autoregressive_reward_is_normalised_already(base):
    arm = AutoregressiveReward(tiny_lm("arm", seed=4))
    hypotheses = chain(base, " was", " was good.")
    assert arm.normalize().score(hypotheses) == pytest.approx(arm.score(hypotheses), abs=1e-4)


def test_a_normalised_value_obeys_the_laws(base):
    check_value(lambda: pair().normalize(), [chain(base, " was", " was go", " was good.")])


def test_a_normalised_value_guides_and_selects(model):
    arm = AutoregressiveReward(tiny_lm("arm", seed=4), "arm")
    settings = {"width": 2, "successors": 2, "chunk_length": 2, "seed": 2}
    one, other = (model.generate("The movie", "custom", token=v, select=v, **settings) for v in (arm, arm.normalize()))
    assert one.token_ids == other.token_ids and one.score == pytest.approx(other.score, abs=1e-4)
    implicit = model.values["implicit"]
    plain, normalised = (model.generate("The movie", "custom", token=v, seed=2).token_ids for v in (implicit, implicit.normalize()))
    assert plain == normalised  # a constant of each position cancels


def test_what_cannot_be_normalised(base):
    with pytest.raises(ConfigError, match="count has no number for every next token"):
        COUNT.normalize()
    other = tiny_lm("base", tokenizer=byte_tokenizer([("t", "h")]))
    with pytest.raises(VocabularyError, match="its own tokens"):
        pair().normalize().score([hypothesis("The movie", " this", other)])
    assert NormalizedValue(pair(), "mine").name == "mine" and pair().normalize().name == "normalize(implicit)"


# Batched functions


def test_a_batched_function_is_called_once_for_all(model):
    calls = []

    @batched
    def shortest(prompts, responses):
        calls.append((prompts, responses))
        return torch.tensor([-float(len(r)) for r in responses])

    model.add_value("shortest", shortest, replace=True)
    found = model.generate(["One", "Two"], "bon", select="shortest", successors=4, ignore_eos=True)
    assert len(calls) == 1 and calls[0][0] == ["One"] * 4 + ["Two"] * 4
    assert all(c.score == -len(c.text) for c in found)
    texts = ["a", "bcd"]
    assert model.score("One", texts, "shortest") == FunctionValue(shortest).judge([(Prompt("One"), t) for t in texts]) == [-1.0, -3.0]


def test_a_batched_function_in_place_of_a_name_is_called_once_for_all(model):
    calls = []

    @batched
    def fewest(prompts, responses):
        calls.append(len(responses))
        return [-float(len(r)) for r in responses]

    model.generate(["One", "Two", "Three"], "bon", select=fewest, successors=4, ignore_eos=True)
    assert calls == [12]
    both = model.generate("One", "custom", token=fewest, select=fewest, candidates=3, width=2, successors=2, chunk_length=4)
    assert both.score == -len(both.text)


def test_one_bad_pair_does_not_cost_the_others():
    def half(prompts, responses):
        if "bad" in responses:
            raise KeyError("bad")
        return [math.nan if r == "nan" else float(len(r)) for r in responses]

    value = FunctionValue(half, "half", batched=True)
    with pytest.raises(ScoreError, match="the value half raised KeyError") as e:
        value.judge([(Prompt("x"), r) for r in ("a", "bad", "ccc", "nan")])
    assert (e.value.scores[0], e.value.scores[2]) == (1.0, 3.0)
    assert "KeyError" in e.value.scores[1] and "NaN" in e.value.scores[3]
    with pytest.raises(ScoreError, match="gave 2 scores for 1 response"):
        FunctionValue(lambda ps, rs: [1.0, 2.0], batched=True).judge([(Prompt("x"), "a")])


def test_a_function_of_lists_that_is_not_marked(base):
    with pytest.raises(ScoreError, match=r"gave a list: expected a number; a function of lists: @ivg.batched"):
        FunctionValue(lambda prompts, responses: [1.0 for _ in responses]).score(chain(base, " was"))


def test_a_marked_function_of_a_file(tmp_path):
    from ivg.values.reward import load_reward

    (tmp_path / "rules.py").write_text(
        "import ivg\n\n@ivg.batched\ndef score(prompts, responses):\n    return [float(len(responses))] * len(responses)\n"
    )
    assert load_reward(f"{tmp_path}/rules.py:score").judge([(Prompt("x"), "a")] * 3) == [3.0] * 3


# Own rules


def keep_longest(beams, scores):
    return sorted(range(len(beams)), key=lambda i: -len(beams[i].text))[:2]


def run(rule, engine=None, **settings):
    engine = engine or FakeEngine("ab")
    method = Method("own", "", **{"width": 2, "successors": 3, "chunk_length": 2, "rule": rule, **settings})
    request = Request(Prompt("x"), method.search({"count": COUNT}), SamplingParams(max_new_tokens=6), seed=3, trace=True)
    (found,) = [c for _, c in Searcher(engine).run([request])]
    assert not engine.held
    return found


@pytest.mark.parametrize("select", [None, "count"])
def test_a_function_selects(select):
    found = run(keep_longest, select=select)
    for step in found.trace:
        assert min(len(n.text) for n in step.kept) >= max((len(n.text) for n in step.dropped), default=0)
    assert (found.score is None) == (select is None) and found.text == found.trace[-1].kept[0].text


def test_the_best_by_a_function_is_beam_search():
    def top(beams, scores):
        unique = {b.token_ids: i for i, b in reversed(list(enumerate(beams)))}
        return sorted(unique.values(), key=lambda i: (-scores[i], i))[:2]

    assert run(top, select="count").text == run("top", select="count").text


def test_majority_of_whole_responses_needs_no_value():
    seen = []

    def vote(beams, scores):
        seen.extend(zip([b.text for b in beams], scores, strict=True))
        counts = [sum(b.text == other.text for other in beams) for b in beams]
        return [counts.index(max(counts))]

    found = run(vote, FakeEngine("ab", lambda text: [4, 1, 5]), width=1, successors=16, chunk_length=None)
    texts = [text for text, _ in seen]
    assert len(texts) == 16 and texts.count(found.text) == max(map(texts.count, texts)) and {s for _, s in seen} == {0.0}


@pytest.mark.parametrize("kept", [[0, 0], [1, 0, 1], [1]])
def test_a_beam_that_is_kept_several_times_has_as_many_times_the_children(model, kept):
    seen = []

    def rule(beams, scores):
        seen.append(beams)
        return kept

    settings = {"width": len(kept), "successors": 2, "chunk_length": 2, "max_new_tokens": 6, "ignore_eos": True}
    found = model.generate("The movie", "custom", rule=rule, **settings)
    assert found.error is None and len(seen) == 3
    for parents, children in itertools.pairwise(seen):
        of = [[b.key for b in parents].index(c.ancestor_key or c.parent) for c in children]
        assert Counter(of) == {i: 2 * times for i, times in Counter(kept).items()}
        assert len({c.key for c in children}) == len(children) == 2 * len(kept)
    assert not any(r.model.live_rows for r in model.readers)


@pytest.mark.parametrize(
    "rule, error",
    [
        (lambda beams, scores: [], r"the rule <lambda> gave \[\]: expected 1 to 2 positions among 6 beams"),
        (lambda beams, scores: [0, 1, 2], r"gave \[0, 1, 2\]"),
        (lambda beams, scores: [6], r"gave \[6\]"),
        (lambda beams, scores: [0.5], "raised TypeError"),
        (lambda beams, scores: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_what_a_function_may_not_give(rule, error):
    assert re.search(error, run(rule).error)


def test_settings_of_a_function_as_rule(model):
    assert Method("own", "", rule=keep_longest).rule_name == "keep_longest"
    with pytest.raises(ConfigError, match="rule must be top"):
        Method("own", "", rule="best")
    with pytest.raises(ConfigError, match="rule must be"):
        Method("own", "", rule=3)
    with pytest.raises(ConfigError, match="the rule keep_longest does not use original"):
        Method("own", "", rule=keep_longest, original=True)

    def top(beams, scores):
        return [0]

    with pytest.raises(ConfigError, match="guide_after"):  # whatever its name
        Method("own", "", rule=top, guide_after="</think>")
    found = model.generate("The movie", "custom", rule=keep_longest, width=2, successors=2, chunk_length=2)
    assert found.error is None and Search().make_rule is None
