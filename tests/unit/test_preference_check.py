"""Whole preference checks on tiny models."""

import numpy as np
import pytest
from test_pair_accuracy import PAIRS, implicit
from test_sweep import SETTINGS, small  # noqa: F401  (a fixture)

from ivg.diagnostics.preference_check import CheckSettings, Judge, check_preferences
from ivg.diagnostics.sweep import SweepSettings
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.training_rows import write_training_rows
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Preference, Prompt, SamplingParams
from ivg.values.base import FunctionValue


def test_pair_without_the_base_vocabulary_is_measured_by_text():
    model = GuidedModel(tiny_lm(), {"implicit": implicit(byte_tokenizer([("t", "h")]))})
    found = check_preferences(
        model,
        PAIRS * 8,
        CheckSettings(SweepSettings(sampling=SamplingParams(max_new_tokens=5)), judge=Judge("words", FunctionValue(characters))),
    )
    assert found.divergence_on_chosen is None
    assert found.sweep == ()
    assert [s.value for s in found.best_of] == ["implicit"]
    assert [v.name for v in found.values] == ["base", "implicit", "words"]
    assert found.pairs == 24


def characters(prompt, text):
    return float(len(text))


def test_a_guide_is_not_its_own_judge(small):  # noqa: F811
    settings = CheckSettings(SweepSettings(samples=2, sampling=SETTINGS.sampling), judge=Judge("implicit", small.values["implicit"]))
    found = check_preferences(small, PAIRS, settings)
    assert found.judge is None
    assert all(r.gain is None for r in found.sweep)
    with pytest.raises(ConfigError, match="no value called 'nothing'"):
        check_preferences(small, PAIRS, CheckSettings(guide="nothing"))


def vowels(prompt, text):
    return float(sum(c in "aeiou" for c in text) / max(1, len(text)))


def word_pairs(count, longer=False):
    """Pairs whose chosen response has more vowels; with ``longer`` it is the longer one as well, whatever its letters."""
    rng = np.random.default_rng(4)
    made = []
    for i in range(count):
        both = ["".join(rng.choice(list("aeioubcdfgkl"), rng.integers(4, 20))) for _ in range(2)]
        both.sort(key=lambda text: (len(text) if longer else 0, vowels("", text)))
        made.append(Preference(Prompt(f"Say {i}:"), both[1] + "x" * longer, both[0]))
    return made


def test_a_value_that_is_right_only_where_length_is_does_not_help():
    base = GuidedModel(tiny_lm(), {"mine": FunctionValue(characters)})
    found = check_preferences(base, word_pairs(60, longer=True), CheckSettings(prompts=0))
    assert found.longer_wins.rate == 1.0
    assert found.values[1].whole.rate == 1.0
    assert (found.verdict.outcome, found.verdict.exit_code) == ("no", 1)
    assert "but length explains it: choosing the longer response" in found.verdict.reasons[0]
    base.add_value("mine", vowels, replace=True)
    assert check_preferences(base, word_pairs(60), CheckSettings(prompts=0)).verdict.outcome == "mixed"  # it can select
    assert check_preferences(base, word_pairs(60), CheckSettings(prompts=0)).verdict.select == ("mine",)


def test_a_value_is_not_measured_on_its_training_data(tmp_path):
    made = word_pairs(60)
    value = tiny_value("scalar")
    value.score = lambda beams: [vowels("", b.text) for b in beams]  # right about all of them
    value.network.config._name_or_path = str(tmp_path)
    model = GuidedModel(tiny_lm(), {"mine": value})
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.unknown_training_data, found.values[1].trained_pairs) == (("explicit",), 0)
    write_training_rows(tmp_path, [(p.prompt, p.chosen) for p in made[:30]])
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.unknown_training_data, found.verdict.outcome) == ((), "mixed")
    assert (found.values[0].whole.n, found.values[1].whole.n, found.values[1].trained_pairs) == (60, 30, 30)
    write_training_rows(tmp_path, [(p.prompt, p.rejected) for p in made[:50]])
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.values[1].on_training_data, found.values[1].trained_pairs) == (True, 50)
    assert (found.verdict.outcome, found.verdict.exit_code, found.verdict.select) == ("unclear", 1, ())
    assert "was trained on 50 of these pairs, and too few others are left" in found.verdict.reasons[0]


def test_pairs_of_one_text_are_counted_and_left_out():
    ties = [Preference(Prompt("p"), "same", "same"), Preference(Prompt("q"), "", "")]
    ends = Preference(Prompt("p"), "same", "same", rejected_ends=False)  # one was cut: the end is the difference
    base = GuidedModel(tiny_lm(), {"mine": FunctionValue(vowels)})
    found = check_preferences(base, [*ties, *word_pairs(30), ends], CheckSettings(prompts=0))
    assert (found.pairs, found.ties) == (31, 2)
    with pytest.raises(ConfigError, match="in all 2 pairs chosen and rejected are the same text"):
        check_preferences(base, ties, CheckSettings(prompts=0))
