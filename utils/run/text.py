"""Text from elsewhere, such as names of files, made fit for terminals, files and tables."""

from __future__ import annotations

import re

# What moves a terminal's cursor or colours, what makes text run backwards, and halves of characters that stand for no
# byte of a file name; not line breaks and tabs.
CONTROL = re.compile(
    "[\\ud800-\\udc7f\\udd00-\\udfff\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e"
    "\\u2066-\\u2069]|\\r(?!\\n)"
)
BREAK = re.compile("[\t\n\r\u2028\u2029]")


def printable(text: str) -> str:
    r"""A text that can be written as UTF-8 and shown in a terminal.

    Bytes of file names that are not UTF-8 (Python keeps them as lone surrogates) become \xdd, and so do characters that
    a terminal obeys.
    """
    text = CONTROL.sub(escaped, text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    r"""A printable text without line breaks and tabs: they become \n, \r, \t."""
    return BREAK.sub(escaped, printable(text))


def escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
