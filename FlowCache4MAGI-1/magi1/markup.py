"""The text of HTML, as the tool that cleaned the training captions sees it.

The rules are those of Beautiful Soup 4.13 on Python's `html.parser`. Since 2025 that module reads
broken markup differently from one patch version to the next; here the rules before those changes
are stated, so that a prompt means the same on every Python.
"""

import re
import sys
from html.entities import html5

DROPPED = frozenset({"script", "style", "template", "rt", "rp"})
"""Elements whose text is no text of the page."""
RAW = frozenset({"script", "style"})
"""Elements that hold no markup: only their own end tag ends them."""
VERBATIM = frozenset({"pre", "textarea"})
"""Elements in which white space stays as it is."""
VOID = frozenset(
    {
        *("area", "base", "basefont", "bgsound", "br", "col", "command", "embed", "frame", "hr"),
        *("image", "img", "input", "isindex", "keygen", "link", "menuitem", "meta", "nextid"),
        *("param", "source", "spacer", "track", "wbr"),
    }
)
"""Elements that hold nothing and are closed at once."""
BLANKS = " \n\t\f\r"
CONDITIONS = frozenset({"if", "else", "endif"})
"""Sections of a word processor, which end without the second bracket."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_DIGITS = 8
"""Of a character reference; longer ones are beyond Unicode."""

_SPECIAL = re.compile("[<&]")
_NAME = re.compile(r"[a-zA-Z][^\t\n\r\f />\0]*")
_GAP = re.compile(r"[\s/]*")
_ATTRIBUTE = re.compile(r"[^\s/>][^\s/=>]*")
_VALUE = re.compile(r"""\s*=+\s*(?:'[^']*'|"[^"]*"|(?!['"])[^>\s]*)""")
_CLOSED_NAME = re.compile(r"</\s*([a-zA-Z][-.a-zA-Z0-9:_]*)\s*>")
_COMMENT_END = re.compile(r"--\s*>")
_SECTION = re.compile(r"<!\[\s*([a-zA-Z]\w*)")
_SECTION_END = re.compile(r"]\s*]\s*>")
_CONDITION_END = re.compile(r"]\s*>")
_NUMBER = re.compile(r"&#([0-9]+|[xX][0-9a-fA-F]+)(?=[^0-9a-fA-F]);?")
_ENTITY = re.compile(r"&([a-zA-Z][-.a-zA-Z0-9]*)(?=[^a-zA-Z0-9]);?")


def markup_text(text: str) -> str:
    """Return the text of HTML without its tags, character references resolved.

    Example: `"a<br>b <b>&amp; c</b><script>d</script>"` becomes `"ab & c"`.
    """
    return _Reader(text).read()


class _Reader:
    """Reads one text from start to end.

    Broken markup is read in two passes, as by the original: the first one stops where something
    seems to be incomplete; the last one starts there and takes what is broken for text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.is_last_pass = False
        self.opened: list[str] = []
        """Names of the elements around `place`, outermost first."""
        self.run: list[str] = []
        """Text since the last tag or comment."""
        self.kept: list[str] = []

    def read(self) -> str:
        """Return the text that is kept."""
        while self.place < len(self.text):
            found = _SPECIAL.search(self.text, self.place)
            start = found.start() if found else len(self.text)
            self.run.append(self.text[self.place : start])
            self.place = start
            if not found:
                break
            is_read = self._markup() if found.group() == "<" else self._reference()
            if is_read:
                continue
            if self.is_last_pass:
                self.run.append(self.text[self.place :])
                break
            self.is_last_pass = True
        self._end_run()
        return "".join(self.kept)

    # Markup -----------------------------------------------------------------------------------

    def _markup(self) -> bool:
        """Read what begins with `<`; tell whether it can be read, in this pass."""
        text, start = self.text, self.place
        following = text[start + 1 : start + 2]
        if not following:
            return False
        if following.isascii() and following.isalpha():
            end = self._start_tag()
        elif following == "/":
            end = self._end_tag()
        elif following in "!?":
            end = self._hidden_end()
            if end is not None:
                self._end_run()
        else:
            self.run.append("<")
            end = start + 1
        if end is None and self.is_last_pass:
            end = self._broken_end()
            self.run.append(text[start:end])
        if end is None:
            return False
        self.place = end
        return True

    def _broken_end(self) -> int:
        """Return where markup ends that is taken for text: behind the next `>`, or at `<`."""
        text, start = self.text, self.place + 1
        end = text.find(">", start)
        if end >= 0:
            return end + 1
        end = text.find("<", start)
        return end if end >= 0 else start

    def _start_tag(self) -> int | None:
        """Open an element; return where its tag ends, or None if it does not.

        The text of a raw element is passed over, up to its end tag.
        """
        text, start = self.text, self.place
        if self.is_last_pass and text.find(">", start) < 0:
            return None  # as below, but in linear time
        name = _matched(_NAME, text, start + 1)
        end, is_closed = _attributes_end(text, start + 1 + len(name))
        after = text[end : end + 1]
        if after in ("", "="):
            return None
        if after != ">":
            self.run.append(text[start:end])
            return end
        name = name.lower()
        self._end_run()
        self.opened.append(name)
        if is_closed or name in VOID:
            self._close(name)
        elif name in RAW:
            closing = re.compile(rf"</\s*{name}\s*>", re.IGNORECASE).search(text, end + 1)
            return closing.start() if closing else len(text)
        return end + 1

    def _end_tag(self) -> int | None:
        """Close an element; return where the tag ends, or None if it does not."""
        text, start = self.text, self.place
        end = text.find(">", start)
        if end < 0:
            return None
        plain = _CLOSED_NAME.match(text, start)
        name = plain[1] if plain else _matched(_NAME, text, start + 2)
        if name:
            self._end_run()
            self._close(name.lower())
            return plain.end() if plain else text.find(">", start + 2 + len(name)) + 1
        if end > start + 2:  # a comment: </ and no name
            self._end_run()
        return end + 1

    def _hidden_end(self) -> int | None:
        """Return where a comment, declaration or instruction ends, or None if it does not."""
        text, start = self.text, self.place
        if text.startswith("<!--", start):
            found = _COMMENT_END.search(text, start + 4)
        elif section := _SECTION.match(text, start):
            is_condition = section[1].lower() in CONDITIONS
            found = (_CONDITION_END if is_condition else _SECTION_END).search(text, start + 3)
            if found and section[0].lower() == "<![cdata" and text[section.end()] == "[":
                self._end_run()
                self._keep(text[section.end() + 1 : found.start()])
        elif text.startswith("<![", start):
            return None
        else:
            found = re.compile(">").search(text, start + 2)
        return found.end() if found else None

    def _close(self, name: str) -> None:
        """Close the innermost element of this name and all inside; ignored if there is none."""
        if name in self.opened:
            while self.opened.pop() != name:
                pass

    # Text -------------------------------------------------------------------------------------

    def _reference(self) -> bool:
        """Read what begins with `&`; tell whether it can be read, in this pass."""
        text, start = self.text, self.place
        if number := _NUMBER.match(text, start):
            self.run.append(_character(number[1]))
            self.place = number.end()
            return True
        if text.startswith("&#", start):
            if ";" in text[start:]:
                self.run.append("&#")
                self.place += 2
            return False
        if entity := _ENTITY.match(text, start):
            self.run.append(html5.get(f"{entity[1]};", f"&{entity[1]}"))
            self.place = entity.end()
            return True
        following = text[start + 1 : start + 2]
        if following.isascii() and following.isalpha():
            # the text ends with it; of a single letter the original loses the ampersand
            self.place += self.is_last_pass and start + 2 == len(text)
            return False
        if following:
            self.run.append("&")
            self.place += 1
        return bool(following)

    def _end_run(self) -> None:
        """Keep the text since the last tag or comment, unless it is in a dropped element."""
        run, self.run = "".join(self.run), []
        if run and not DROPPED.intersection(self.opened):
            self._keep(run)

    def _keep(self, run: str) -> None:
        if not run.strip(BLANKS) and not VERBATIM.intersection(self.opened):
            run = "\n" if "\n" in run else " "
        self.kept.append(run)


def _attributes_end(text: str, place: int) -> tuple[int, bool]:
    """Return where the attributes of a tag end, and whether a slash before `>` closes it."""
    while True:
        gap = _matched(_GAP, text, place)
        place += len(gap)
        # a name follows white space, a slash, or the quote that ends a value
        name = _ATTRIBUTE.match(text, place) if text[place - 1] in "'\"/" or gap else None
        if name is None:
            return place, gap.endswith("/")
        place = name.end()
        if value := _VALUE.match(text, place):
            place = value.end()


def _matched(pattern: re.Pattern[str], text: str, place: int) -> str:
    found = pattern.match(text, place)
    return found[0] if found else ""


def _character(number: str) -> str:
    """Return the character of a numeric reference; one of 128 to 159 is of Windows' code page."""
    is_hex = number[0] in "xX"
    digits = number.lstrip("xX").lstrip("0") or "0"
    if len(digits) > MAX_DIGITS:
        return REPLACEMENT
    code = int(digits, 16 if is_hex else 10)
    if 128 <= code < 160:
        return bytes([code]).decode("cp1252", errors="ignore") or chr(code)
    return chr(code) if code <= sys.maxunicode else REPLACEMENT
