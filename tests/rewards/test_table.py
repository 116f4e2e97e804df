"""Tables: forms of one table are equal, the formula at exact values, junk lowers it, symmetry and totality."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import RewardResult, Unavailable
from vlpost.rewards.ocr import similarity
from vlpost.rewards.table import MAX_CELLS, TableError, check_table_answer, read_table, table, table_similarity

HTML = "<table><tr><th>Name</th><th>Age</th></tr><tr><td>Ann</td><td>31</td></tr></table>"
MARKDOWN = "| Name | Age |\n|:--|--:|\n| Ann | 31 |"
SPANNED = "<table><tr><td rowspan=2>A</td><td>b</td></tr><tr><td>c</td></tr></table>"


def html(rows):
    return "<table>" + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows) + "</table>"


@pytest.mark.parametrize(
    "text",
    [
        *(HTML, MARKDOWN, f"Here it is:\n\n{MARKDOWN}\n\nDone.", f"```markdown\n{MARKDOWN}\n```", f"<answer>{HTML}</answer>"),
        *(
            "Name|Age\n---|---\nＡｎｎ|３１",
            HTML.replace("Ann", " <b>A</b>nn\n"),
            HTML.upper().replace("NAME", "Name").replace("AGE", "Age").replace("ANN", "Ann"),
        ),
        *("<table><tr><td>Name<td>Age<tr><td>Ann<td>&#51;1</table>", f"<think>x</think>{HTML}"),
    ],
)
def test_forms_of_one_table_are_equal(text, make_example, make_rollout):
    assert table(make_example(HTML), make_rollout(text)).value == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (html([["Name", "Age"], ["Ann", "32"]]), 3.5 / 4),
        (html([["Name", "Age"]]), 0.5),
        (html([["Name", "Age", "x"], ["Ann", "31", "y"]]), 4 / 6),
        (html([["Name", "Age"], ["Ann", "31"], ["?", "?"], ["?", "?"]]), 0.5),
        (html([["Name"], ["Age"], ["Ann"], ["31"]]), 2 / 8),
        (html([["Age", "Name"], ["31", "Ann"]]), 0.5),
        (HTML + HTML, 0.0),
        (f"{MARKDOWN}\nor\n{MARKDOWN}", 0.0),
        ("no table", 0.0),
        ("<table></table>", 0.0),
        ("<table><tr><td colspan=99999>x</td></tr></table>", 0.0),
        (f"<table><tr><td colspan={MAX_CELLS + 1}>x</td></tr></table>", 0.0),
        (f"<think>{HTML}", 0.0),
    ],
)
def test_table_values(text, value, make_example, make_rollout):
    assert table(make_example(HTML), make_rollout(text)).value == pytest.approx(value)


def test_spans_fill_the_places_they_cover_and_count_as_structure():
    grid = read_table(SPANNED)
    assert [[cell[0] for cell in row] for row in grid] == [["A", "b"], ["A", "c"]]
    assert table_similarity(grid, read_table(html([["A", "b"], ["A", "c"]]))) == 3 / 4
    assert read_table(SPANNED.replace("rowspan=2", "rowspan=50")) == grid


def test_text_that_stands_in_a_wrong_cell_is_paid_once_at_most():
    assert table_similarity(read_table(html([["a", "b"]])), read_table(html([["b", "a"]]))) == 0.5


def test_large_tables_are_compared_by_equality():
    one = [[f"r{row}c{column}" for column in range(20)] for row in range(20)]
    other = [list(row) for row in one]
    other[0][0], other[19][19] = "r0c0x", "r19c19x"
    assert table_similarity(read_table(html(one)), read_table(html(other))) == pytest.approx(398 / 400)
    # With equal rows at the ends the rest is small enough for distances.
    other[0][0], other[19][19], other[3][4] = "r0c0", "r19c19", "r3c4x"
    assert table_similarity(read_table(html(one)), read_table(html(other))) == pytest.approx((399 + 4 / 5) / 400)


def test_long_cells_are_compared_by_equality():
    long = read_table(html([["a" * 501, "b"]]))
    assert table_similarity(long, read_table(html([["a" * 500, "b"]]))) == 0.5
    assert table_similarity(long, read_table(html([["a" * 501, "c"]]))) == 0.5


def test_an_entity_is_never_declared_or_fetched():
    hostile = '<!DOCTYPE t [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + html([["&x;"]])
    assert [[cell[0] for cell in row] for row in read_table(hostile)] == [["&x;"]]


cells = st.sampled_from(["", "a", "ab", "12", "中文", "a b"])
tables = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda size: st.lists(st.lists(cells, min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0])
)


@given(tables, tables)
def test_similarity_is_symmetric_and_1_only_for_equal_tables(first, second):
    one, other = read_table(html(first)), read_table(html(second))
    assert table_similarity(one, other) == pytest.approx(table_similarity(other, one), abs=1e-12)
    assert (table_similarity(one, other) == 1.0) == (first == second)
    assert 0.0 <= table_similarity(one, other) <= 1.0


def alignments(scores, row=0, column=0):
    """The formula said naively: the best of aligning, skipping a row, skipping a column."""
    if row == len(scores) or column == len(scores[0]):
        return 0.0
    aligned = scores[row][column] + alignments(scores, row + 1, column + 1)
    return max(aligned, alignments(scores, row + 1, column), alignments(scores, row, column + 1))


@given(tables, tables)
def test_the_value_is_that_of_the_naive_recursion(first, second):
    rows = [[alignments([[similarity(a, b) for b in other] for a in row]) for other in second] for row in first]
    value = alignments(rows) / (max(len(first), len(second)) * max(len(first[0]), len(second[0])))
    assert table_similarity(read_table(html(first)), read_table(html(second))) == pytest.approx(value)


@given(tables)
def test_a_junk_column_or_row_always_lowers_the_value_of_a_right_table(rows):
    right = read_table(html(rows))
    for wider in ([[*row, "junk"] for row in rows], [*rows, ["junk"] * len(rows[0])]):
        assert table_similarity(read_table(html(wider)), right) < 1.0


@pytest.mark.parametrize("answer", ["", "no table", "| a | b |", "<table>"])
def test_an_answer_that_is_no_table_is_named(answer, make_example, make_rollout):
    with pytest.raises(DataError, match=r"example 'add-0'.*table"):
        check_table_answer(make_example(answer))
    assert isinstance(table(make_example(answer), make_rollout(HTML)), Unavailable)


def test_a_cell_before_any_row_is_refused():
    with pytest.raises(TableError, match="outside any row"):
        read_table("<table><td>a</td></table>")


pieces = st.lists(
    st.sampled_from(
        ["<table>", "</table>", "<tr>", "<td>", "</td>", "<td rowspan=3>", "<td colspan='2'>", "|", "---", "\n", "a", "<!", "<![", "&#x"]
    )
)


@given(text=st.one_of(st.text(max_size=200), pieces.map("".join)))
def test_table_is_total(text, make_example, make_rollout):
    for answer in (HTML, text):
        verdict = table(make_example(answer), make_rollout(text))
        assert isinstance(verdict, Unavailable) or (isinstance(verdict, RewardResult) and 0.0 <= verdict.value <= 1.0)
