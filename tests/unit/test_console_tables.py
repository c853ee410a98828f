"""Tables on terminals of any width: nothing of a cell is lost, words stay whole, lines fit."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivg.utils.console import plain_table, print_table

WORDS = st.text("abcXYZ019-._[]/", min_size=1, max_size=16)
CELLS = st.lists(WORDS, max_size=5).map(" ".join)


def printed(table: Table, width: int) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    print_table(table, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=4), width=st.integers(20, 120))
def test_every_word_is_printed_whole_at_any_width(rows: list[tuple[str, str, str]], width: int) -> None:
    table = plain_table("first", "second", "third")
    for row in rows:
        table.add_row(*row)
    text = printed(table, width)
    # in the order of a row's columns the words of one cell may go on in the next line: so they are counted, not searched in order
    words = text.replace("first:", "").replace("second:", "").replace("third:", "").split()
    expected = [word for row in rows for cell in row for word in cell.split()]
    assert sorted(word for word in words if word not in ("first", "second", "third")) == sorted(expected)


@given(rows=st.lists(st.tuples(WORDS, st.text("ab", min_size=1, max_size=200)), min_size=1, max_size=3), width=st.integers(10, 120))
def test_long_words_are_broken_and_no_character_is_lost(rows: list[tuple[str, str]], width: int) -> None:
    table = plain_table("name", "value")
    for row in rows:
        table.add_row(*row)
    text = printed(table, width)
    assert text.count("a") + text.count("b") >= sum((name + value).count("a") + (name + value).count("b") for name, value in rows)


@pytest.mark.parametrize(
    "table", [plain_table("name", "what it does"), Table("name", "what it does"), Table("name", "what it does", show_lines=True)]
)
def test_lines_of_a_table_fit(table: Table) -> None:
    for _ in range(3):
        table.add_row("ivg", "guides every token and selects among chunks " * 4)
    for width in range(30, 200, 7):
        lines = printed(table, width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("name" in line and "what" in line for line in lines), "it fits, so it stays a table"


def test_a_row_becomes_lines_where_the_table_cannot_fit() -> None:
    table = plain_table("setting", "value", "from", title="Settings")
    table.columns[0].no_wrap = True
    table.add_row("sampling.max_new_tokens", "50", Text("command line"))
    table.add_row("search.width", "", "default")
    expected = "Settings\nsetting: sampling.max_new_tokens\nvalue: 50\nfrom: command line\n\nsetting: search.width\nfrom: default\n"
    assert printed(table, 24) == expected


def test_only_the_widest_column_is_narrowed() -> None:
    table = plain_table("name", "text")
    table.add_row("a name of words", "one two three four five six seven eight nine ten eleven")
    assert printed(table, 40).splitlines()[1].startswith("a name of words  ")


def test_brackets_are_text() -> None:
    table = plain_table("setting", "value", title="of [end]")
    table.add_row("stop", '["[/end]", "[bold]"]')
    for width in (120, 20):
        assert "".join(printed(table, width).split()).count('["[/end]","[bold]"]') == 1
