"""The page that maps papers to settings: every row's settings are those of a method that exists."""

import re
from pathlib import Path

import pytest

from ivg.cli.options import plain_value
from ivg.search.methods import METHODS, get_method
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "papers.md").read_text(encoding="utf-8")
NAMES = {*settings_of(SearchSettings), *settings_of(SamplingParams)}


def rows():
    """(method, settings) of the second column of each table, where it begins with a method."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        codes = re.findall("`([^`]*)`", cells[1]) if line.startswith("| ") and len(cells) > 1 else []
        if codes and cells[1].startswith("`") and codes[0] in (*METHODS, "custom"):
            given = dict(code.split("=", 1) for code in codes[1:] if re.fullmatch("[a-z_]+=[^*+]+", code))
            yield pytest.param(codes[0], given, id=cells[0][:40])


@pytest.mark.parametrize("method, given", rows())
def test_the_settings_of_a_row_make_a_method(method, given):
    rule = {"rule": lambda beams, scores: [0]} if method == "custom" and "successors" in given else {}
    settings = {name: plain_value(value) for name, value in given.items()}
    plain, made = get_method(method, **rule), get_method(method, **settings, **rule)
    assert set(given) <= NAMES and made.name == method
    assert not given or made != plain or all(getattr(made, name) == value for name, value in settings.items())


def test_every_method_is_on_the_page():
    named = {p.values[0] for p in rows()}
    assert set(METHODS) - named <= {"cbs-soft", "eft-kl"}  # of no paper of their own


def test_settings_named_on_the_page_exist():
    """Settings in the third column of the table of papers."""
    table = PAGE.split("## AISteer360")[0].split("## Papers")[1]
    codes = {c for line in table.splitlines() if line.startswith("| ") for c in re.findall("`([a-z_]+)`", line.strip("|").split(" | ")[-1])}
    assert codes - {"its"} <= NAMES, codes - NAMES
