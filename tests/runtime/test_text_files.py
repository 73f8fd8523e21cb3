"""Prompt lists and tables are read strictly; what is wrong is said with its place."""

import codecs
from pathlib import Path

import pytest

from flowcache.errors import UserError
from flowcache.runtime.text_files import escaped, read_lines, read_table, table_row

COLUMNS = ("text", "name")


def table(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "a café\nzwei 猫\n".encode(),
        codecs.BOM_UTF8 + "a café\r\nzwei 猫".encode(),
        codecs.BOM_UTF16_LE + "a café\nzwei 猫\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "a café\rzwei 猫\n".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "a café\n\n  zwei 猫 \n".encode("utf-32-le"),
    ],
)
def test_prompts_are_read_in_every_encoding_that_names_itself(tmp_path: Path, content: bytes):
    assert read_lines(table(tmp_path / "a.txt", content)) == ["a café", "zwei 猫"]


def test_a_line_ends_where_an_editor_ends_it_and_nowhere_else(tmp_path: Path):
    # str.splitlines would cut at both
    lines = ["one \u2028 prompt", "another \u2029 one", "with\ttab"]
    assert read_lines(table(tmp_path / "a.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt; write one per line"),
        (b" \n\n", "holds no prompt; write one per line"),
        (b"good\ncaf\xe9\n", "row 2: byte 0xe9 is no UTF-8: save it as UTF-8 text"),
        (b"a\0b\n", "row 1: character U+0000 is no text: save it as UTF-8 text"),
        (b"a\x1b[31mb\n", "row 1: character U+001B is no text: save it as UTF-8 text"),
        (
            codecs.BOM_UTF16_LE + b"a\0\n\0\0\xd8",
            "begins as UTF-16, but byte 7 is none: save it as UTF-8 text",
        ),
        (
            b"\n" + b"z" * 10_001,
            "row 2: 10001 characters, at most 10000 are allowed: shorten it",
        ),
    ],
)
def test_what_is_no_prompt_is_named_with_its_row(tmp_path: Path, content: bytes, said: str):
    path = table(tmp_path / "a.txt", content)
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value) == f"{path}: {said}"


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    for read in (read_lines, lambda path: read_table(path, columns=COLUMNS)):
        with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
            read(tmp_path / "none")
        with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
            read(tmp_path)


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path):
    content = 'name, text ,more\r\na.mp4,"one, ""two""\r\nthree",\r\n\r\nb.mp4, four,5\r\n'
    rows = read_table(table(tmp_path / "a.csv", "\ufeff" + content), columns=COLUMNS)
    assert [(row.number, dict(row.cells)) for row in rows] == [
        (2, {"name": "a.mp4", "text": 'one, "two"\nthree', "more": ""}),
        (4, {"name": "b.mp4", "text": " four", "more": "5"}),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no row below a head with text, name"),
        ("text,name\n", "holds no row below a head with text, name"),
        ("text,label\nx,a\n", "must have the columns text, name: no name"),
        ("text,name,text\nx,a,y\n", "row 1 names the column text twice: rename one"),
        ("text,name\nx,a\ny\n", "row 3, column name is missing: fill it in"),
        ("text,name\n,a\n", "row 2, column text is empty: fill it in"),
        ("text,name\n , \n", "row 2, column text is empty: fill it in"),
        (
            "text,name\nx, y,a\n",
            "row 2 goes on after column name, 3 cells instead of 2: put quotes around texts with "
            "commas",
        ),
        (b"text,name\nx,caf\xe9\n", "row 2, column name: byte 0xe9 is no UTF-8: save it as UTF-8"),
        (b"text,name\n\nx\0,a\n", "row 3, column text: character U+0000 is no text: save it"),
        (b"te\0xt,name\nx,a\n", "row 1: character U+0000 is no text: save it as UTF-8 text"),
        ('text,name\nx,a\n"y,b\nz,c\n', "row 3, column text: a quote is open or in a wrong"),
        ('text,name\nx,"a\n', "row 2, column name: a quote is open or in a wrong place: write"),
        ('text,name\nx,"a"b\ny,c\n', "row 2, column name: a quote is open or in a wrong place"),
        ('text,name\n"x" "y",b\n', "row 2, column text: a quote is open or in a wrong place"),
        (
            "text,name\n" + "z" * 200_000 + ",a\n",
            "row 2, column text: 200000 characters, at most 10000 are allowed: shorten it",
        ),
        ('text,name\nx,"' + "z," * 200_000 + '"\n', "row 2, column name: 400000 characters"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_row_and_column(
    tmp_path: Path, content: str | bytes, said: str
):
    path = table(tmp_path / "a.csv", content)
    with pytest.raises(UserError) as caught:
        read_table(path, columns=COLUMNS)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


# Markdown -----------------------------------------------------------------------------------------


"""Names in Markdown tables show as they are."""


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("flowcache_fast", "flowcache_fast"),
        ("a|b", r"a\|b"),
        ("two\nlines \t here", "two lines here"),
        ("`code`", r"\`code\`"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("*bold* ~gone~", r"\*bold\* \~gone\~"),
        ("[text](link)", r"\[text\](link)"),
        ("a\\|b", r"a\\\|b"),
    ],
)
def test_a_name_is_written_so_that_it_shows_as_it_is(name: str, written: str):
    assert escaped(name) == written


def test_a_row_keeps_its_number_of_cells_whatever_they_hold():
    assert table_row([escaped("a|b"), "1"]) == r"| a\|b | 1 |"
