"""Names of files as text: they may hold bytes that are not UTF-8."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""A text that can be written as UTF-8: bytes of file names that are not (Python keeps them as lone surrogates)
    become \xdd."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
