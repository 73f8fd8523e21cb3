"""Prompt cleaning against the reference pairs."""

import json
from pathlib import Path

import pytest

from magi1.prompt import clean, clean_once, markup_text

PAIRS = json.loads(
    (Path(__file__).parents[1] / "golden/magi1/prompt_cleaning.json").read_text(encoding="utf-8")
)["pairs"]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["input"][:30])
def test_prompts_are_cleaned_as_in_training(pair: dict[str, str]):
    assert clean_once(pair["input"]) == pair["once"]
    assert clean(pair["input"]) == pair["output"]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<b>bold</b> &lt;i&gt; &#233; &#150;", "bold <i> é –"),
        ("fish & chips &unknown; &copy 2024", "fish & chips &unknown © 2024"),
        ("a < b <3", "a < b <3"),
        ("before <!-- hidden --> after", "before  after"),
        ("r&b", "rb"),
    ],
)
def test_markup_leaves_its_text(markup: str, text: str):
    assert markup_text(markup) == text


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("mail me at bob@example.com now", "mail me at bob now"),
        ("a-b-c_d", "a-b-c_d"),
        ("a-b-c_d-e", "a b c d e"),
        ("https:secret", "ecret"),
        ("12:34  ", "12:34"),
    ],
)
def test_rules_that_the_reference_pairs_leave_open(prompt: str, cleaned: str):
    assert clean_once(prompt) == cleaned
