"""Prompt cleaning against the reference pairs."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from magi1.markup import markup_text
from magi1.text import clean, clean_once

FILES = ("prompt_cleaning", "prompt_cleaning_html")
PAIRS = [
    pair
    for name in FILES
    for pair in json.loads(
        (Path(__file__).parents[1] / f"golden/magi1/{name}.json").read_text(encoding="utf-8")
    )["pairs"]
]
MARKUP = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *("<", ">", "</", "/>", "&", "&#", "&#x", ";", "<!--", "-->", "<![", "]]>", "<?"),
                *("<script>", "</script>", "<rt>", "</rt>", "<br>", "<p a='", 'b="', "=", "\0"),
                *("%3C", "%00", "+", "＆＃", "9" * 50, "\ud800", "&lt;", "&#0;", "http://a.com"),
            ]
        ),
        st.text(max_size=5),
    ),
    max_size=20,
).map("".join)
"""Texts in which markup is frequent, mostly broken."""


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
        ("fish&chips", "fish&chips"),
        # text of dropped elements, at any depth, up to the end of them or of what is around them
        ("a<style>b</style>c", "ac"),
        ("a<template><p>b</p></template>c", "ac"),
        ("<ruby>a<rp>(</rp><rt>b</rt><rp>)</rp></ruby>c", "ac"),
        ("<ruby>a<rt>b</ruby>c", "ac"),
        ("a<template>b", "a"),
        ("a<script>b</style>c", "a"),
        ("<script>'<p>' < 1 && b</script >a", "a"),
        ("<script/>a", "a"),
        ("<script src=a/>b", ""),
        ("a</script>b", "ab"),
        ("<rt><br>a</rt>b", "b"),
        ("<b title='<rt>'>a</b>", "a"),
        # comments and declarations
        ("a<!-- <b> -- >b", "ab"),
        ("a<!doctype html>b<?php c?>d<!e>f</ >g</>h", "abdfgh"),
        # character references
        ("&#0;|&#x0;", "\0|\0"),
        ("&#129;&#x80;&#xD7FF;&#1114112;&#99999999999;", "\x81€\ud7ff\ufffd\ufffd"),
        ("&#" + "9" * 5000 + ";", "\ufffd"),
        ("&fjlig;&notin;&notit; &nosuch;", "fj∉&notit &nosuch"),
        # broken markup is text
        ("a < b <3 <", "a < b <3 <"),
        ("a <b", "a <b"),
        ('<a href="x>b</a>c', '<a href="x>bc'),
        ("x <!-- y", "x <!-- y"),
        ("a<b\0c>d", "a<b\0c>d"),
        # between tags a run of white space is one character
        ("a<b>  \t</b>c<b> \n </b>d<pre>  </pre>e", "a c\nd  e"),
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


@settings(deadline=None, max_examples=100)
@given(MARKUP)
@example("<a " * 1000)
@example("＆＃" + "9" * 5000 + "a")
@example("<![" * 500)
def test_any_text_is_cleaned(prompt: str):
    cleaned = clean(prompt)
    assert cleaned == cleaned.strip()
    cleaned.encode()  # text that the tokenizer can read: no half of a surrogate pair
    assert "\0" not in cleaned


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_characters="<&")))
def test_text_without_markup_is_kept(text: str):
    assert markup_text(f"<b>x{text}</b>") == f"x{text}"
