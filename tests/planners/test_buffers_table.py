"""Buffers as CSV: read and written byte for byte, refused with everything that is wrong at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.planners.buffers import Buffer, table
from helpers.buffers import PINWHEEL

names = st.text(min_size=1, max_size=6).filter(lambda name: "\r" not in name and "\x00" not in name)
rows = st.tuples(names, st.integers(-(2**40), 2**40), st.integers(1, 2**40), st.integers(0, 2**40))
tables = st.lists(rows, max_size=8, unique_by=lambda row: row[0]).map(
    lambda found: tuple(Buffer(name, lower, lower + length, size) for name, lower, length, size in found)
)


@given(tables)
@settings(derandomize=True, deadline=None, database=None)
def test_what_is_written_is_read_again(buffers: tuple[Buffer, ...]) -> None:
    text = table.text(buffers)
    assert table.parse(text) == buffers
    assert table.text(table.parse(text)) == text


def test_files_come_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'id,lower,upper,size\n007,0,9223372036,4611686018427387903\n"a,b",-5,1,0\n')
    table.write(tmp_path / "out.csv", table.read(path))
    assert (tmp_path / "out.csv").read_bytes() == path.read_bytes()


def test_offsets_are_a_fifth_column_that_may_be_read_again() -> None:
    text = table.text(PINWHEEL, [0, 0, 3, 2, 2])
    assert text.splitlines()[:2] == ["id,lower,upper,size,offset", "b0,0,3,2,0"]
    assert table.parse(text) == PINWHEEL


def test_columns_may_stand_in_any_order() -> None:
    assert table.parse("size,id,upper,lower\r\n8,x,3,1\r\n") == (Buffer("x", 1, 3, 8),)


def test_marks_of_other_editors_are_no_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b"\xef\xbb\xbfid,lower,upper,size\r\nx,1,3,8\r\n  \r\n\r\n")
    assert table.read(path) == (Buffer("x", 1, 3, 8),)


def test_a_plan_of_nothing_has_a_column_for_its_offsets() -> None:
    assert table.text((), ()) == "id,lower,upper,size,offset\n"


def test_all_mistakes_are_told_at_once() -> None:
    text = "id,lower,upper,size\na,0,4,8\nb,5,5,1\nc,1,two,3\nd,0,1,-2\na,0,1,1\ne,0,1\n"
    with pytest.raises(ConfigError) as caught:
        table.parse(text, name="trace.csv")
    found = str(caught.value)
    assert len(caught.value.problems) == 5
    for expected in (
        "line 3 of trace.csv never lives\ngot: lower = 5, upper = 5",
        "line 4 of trace.csv: upper is no integer\ngot: 'two'",
        "line 5 of trace.csv has a negative size",
        "line 6 of trace.csv repeats an id\ngot: a, as line 2 of trace.csv",
        "line 7 of trace.csv has the wrong number of cells\ngot: 3",
    ):
        assert expected in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("id,lower,upper\na,0,1\n", "lacks the column size"),
        ("id,lower,upper,size,offzet\n", "did you mean offset?"),
        ("id,lower,upper,size,gaps\na,0,9,1,2-3\n", "leave it out, if the plan may pass over it"),
        ("id,id,lower,upper,size\n", "the column id more than once"),
        ('id,lower,upper,size\n"a,0,1,2\n', "is no CSV"),
        (f"id,lower,upper,size\na,0,1,{2**62}\n", "sum to more than can be counted"),
        (f"id,lower,upper,size\na,0,{2**63},1\n", "too far off"),
    ],
)
def test_a_file_that_is_none_says_so(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        try:
            table.parse(text)
        except ConfigError as error:
            raise ConfigError(str(error)) from None


def test_a_file_of_something_else_does_not_flood_the_screen() -> None:
    text = "id,lower,upper,size\n" + "x,y,z,w\n" * 1000
    with pytest.raises(ConfigError) as caught:
        table.parse(text)
    assert len(caught.value.problems) == 51
    assert "and 2950 more mistakes" in str(caught.value)


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        table.read(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        table.read(tmp_path / "binary.csv")
