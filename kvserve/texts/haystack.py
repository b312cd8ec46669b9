# SPDX-License-Identifier: Apache-2.0
"""Long English prose to hide needles in.

Two novels ship with the package (``data/README.txt`` says where they come from), so
that a profile is never measured and evaluated on the same text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from kvserve.errors import UserError
from kvserve.texts.user_files import read_user_text

Book = Literal["northanger_abbey", "persuasion"]

DATA = Path(__file__).parent / "data"
_MIN_CHARACTERS = 2000
# A full stop after "Mr" or "Mrs" ends no sentence.
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?][\"')]*(?=\s|$)")


def load_book(book: Book) -> str:
    """Return one of the texts that ship, about 27 000 tokens, a paragraph a line."""
    return (DATA / f"{book}.txt").read_text(encoding="utf-8")


def load_text(path: Path, flag: str = "--data") -> str:
    """Read a user's own haystack.

    Raises:
        UserError: the file cannot be read, or is too short to hide anything in.
    """
    text = read_user_text(path, flag)
    if len(text) < _MIN_CHARACTERS or not _SENTENCE_END.search(text):
        raise UserError(
            f"{flag} {path}: has {len(text)} characters; give a text of whole "
            f"sentences and at least {_MIN_CHARACTERS} characters, or leave {flag} out"
        )
    return text


def passage(text: str, start: float, characters: int) -> str:
    """Cut ``characters`` of prose out of ``text``, which repeats without end.

    Args:
        start: Where to begin, as a fraction of the text; the passage begins with the
            next whole sentence.
        characters: Length of the passage; its last sentence may be cut short.
    """
    end = _SENTENCE_END.search(text, int(start * len(text)))
    first = end.end() if end else 0
    rotated = text[first:] + text[:first]
    copies = -(-characters // len(rotated)) + 1
    return (rotated * copies).lstrip()[:characters]


def insert(haystack: str, sentence: str, depth: float) -> tuple[str, int]:
    """Insert ``sentence`` at the last sentence end at or before ``depth``.

    Args:
        depth: Position as a fraction of the haystack: 0 the beginning, 1 the end.

    Returns:
        The new text and the character at which ``sentence`` begins in it.
    """
    limit = round(depth * len(haystack))
    ends = (match.end() for match in _SENTENCE_END.finditer(haystack))
    at = max((end for end in ends if end <= limit), default=0)
    before, after = haystack[:at], haystack[at:].lstrip()
    head = f"{before} " if before else ""
    return f"{head}{sentence} {after}", len(head)
