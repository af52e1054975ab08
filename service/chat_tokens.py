"""Chats to token ids.

What a caller writes is data: a control token in a message, a tool or an argument is ordinary text, unless the chat allows
control tokens. To tell the template's own control tokens from others, the chat is rendered again with marks in the caller's
strings. A token that is not a control token, such as `<think>` in many models, is recognised everywhere, as in a text.
"""

from __future__ import annotations

import re
import sys

from service.chat import Conversation, RenderBounds
from service.engines.base import Span, Vocabulary

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})
"""May be the name of a control token, as in `<|user|>`."""
_PRIVATE = range(0xF0000, 0xFFFFE)
"""Code points without a meaning, for marks."""


class ChatTokenizer:
    """Chats to token ids. Safe in any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._begin, self._control_ids = vocabulary.encode("", special=True), frozenset(vocabulary.controls.values())
        longest_first = sorted(vocabulary.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._firsts = frozenset(control[0] for control in longest_first)
        self._names = frozenset(name for control in longest_first if (name := _name(control)) not in ROLES)

    def token_ids(
        self, given: Conversation, bounds: RenderBounds, *, allow_control_tokens: bool, most: int = sys.maxsize
    ) -> list[int]:
        """Of the rendered chat. Only the template's own control tokens are control tokens, unless others are allowed.

        Raises ValueError with the template's message, or if the two cannot be told apart, or for a role that is the name of a
        control token, because some templates build control tokens from roles; OutOfBounds; and TooManyTokens, perhaps, for more
        than `most`.
        """
        for message in given.messages:
            if message["role"] in self._names:
                raise ValueError(f"the role {message['role']} is the name of a control token")
        text = self._vocabulary.render(given, bounds)
        vocabulary, every = self._vocabulary, _spans(self._control, text)
        own = every if allow_control_tokens else self._own(given, bounds, text, every)
        if own == every:
            ids = vocabulary.encode(text, special=True, most=most)
            written = [vocabulary.controls[text[first:last]] for first, last in own]
            found = [token_id for token_id in ids if token_id in self._control_ids]
            # A tokenizer may find others than `every`: it may change the text before it looks for them.
            if allow_control_tokens or found in (written, self._begin + written):
                return ids
        return vocabulary.encode_at(text, own, most=most)

    def _own(self, given: Conversation, bounds: RenderBounds, text: str, every: list[Span]) -> list[Span]:
        """Where the template's own control tokens are: all, if the caller's strings cannot make any.

        The caller's strings are marked in two ways. If the first characters of control tokens are marked wherever they stand,
        strings that are put together cannot make a control token either; but the template may look for such characters. If only
        whole control tokens are marked, it rarely does; then it must write the same control tokens as with the other marks.
        """
        if not any(first in string for string in given.strings() for first in self._firsts):
            return every
        marks = self._marks(text, given)
        plain = str.maketrans({mark: first for first, mark in marks.items()})
        everywhere = str.maketrans(marks)
        marked = self._vocabulary.render(given.mapped(lambda string: string.translate(everywhere)), bounds)
        if marked.translate(plain) == text:
            return _spans(self._control, marked)
        written = self._control.findall(marked)
        marked = self._vocabulary.render(
            given.mapped(lambda string: self._control.sub(lambda found: marks[found[0][0]] + found[0][1:], string)), bounds
        )
        if marked.translate(plain) != text or self._control.findall(marked) != written:
            raise ValueError("it depends on a control token in a string of the chat; remove it, or set allow_control_tokens")
        return _spans(self._control, marked)

    def _marks(self, text: str, given: Conversation) -> dict[str, str]:
        """A character for each first character of a control token, which neither the text nor the caller's strings have."""
        used = set(text).union(*map(set, given.strings()))
        unused = (chr(point) for point in _PRIVATE if chr(point) not in used)
        marks = dict(zip(sorted(self._firsts), unused, strict=False))
        if len(marks) < len(self._firsts):
            raise ValueError("it has too many characters of the private use area U+F0000")
        return marks


def _name(control: str) -> str:
    """A control token without what stands around its name."""
    return control.strip("<>[]|｜/▁ ")


def _spans(pattern: re.Pattern[str], text: str) -> list[Span]:
    return [found.span() for found in pattern.finditer(text)]
