"""Clean a prompt the way MAGI-1's training captions were cleaned.

Source of the rules: the caption cleaning of DeepFloyd IF, which the released models use; each
rule is stated here in our own form and order matters. Chinese characters are removed by it.
"""

import html
import re
import urllib.parse
from collections.abc import Iterable

from magi1.markup import markup_text

Rules = tuple[tuple[re.Pattern[str], str], ...]

MAX_JOINTS = 3
"""With more dashes and underscores than this in all, they are taken for blanks."""

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_JOINT = re.compile(r"[-_]")


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _link(scheme: str) -> str:
    """Match a scheme, or a bare host name with its path (but no mail address)."""
    host = rf"[a-zA-Z0-9.\-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{host})"


_LINKS = _rules(("<person>", "person"), (_link("https?"), ""), (_link("www"), ""))

_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed and compatibility letters, ideographs
    # every dash of Unicode
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
        r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # an article's time
    (r"\\n", " "),  # a line break that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

_SPAM = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # catalogue numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)

_HUGE = re.compile(r"(?<=&#)[0-9]{8,}")
"""Numbers of character references that are beyond Unicode."""

_EDGES = _rules(
    (r"(?s)^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(prompt: str) -> str:
    """Return the prompt as the text encoder is to see it: cleaned twice, as in training.

    Example: `"snow_falling-on-cedar-trees_at-night"` becomes
    `"snow falling on cedar trees at night"`.
    """
    return clean_once(clean_once(prompt))


def clean_once(prompt: str) -> str:
    """Apply all rules once: links, markup, odd characters, mojibake, spam, edges."""
    import ftfy

    text = urllib.parse.unquote_plus(prompt).strip().lower()
    text = _apply(_LINKS, text)
    text = _apply(_CHARACTERS, markup_text(text))
    if len(_JOINT.findall(text)) > MAX_JOINTS:
        text = _JOINT.sub(" ", text)
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    return _apply(_EDGES, _apply(_SPAM, text)).strip()


def _unescape(text: str) -> str:
    """Resolve character references; Python refuses to read numbers of thousands of digits."""
    return html.unescape(_HUGE.sub("99999999", text))


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
