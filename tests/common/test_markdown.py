"""Names in Markdown tables show as they are."""

import pytest

from flowcache.runtime.markdown import escaped, table_row


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
