"""What is computed from a whole vocabulary, once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from service.engines.base import Vocabulary


class Lexicon:
    """May be used from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def warm(self) -> None:
        """Compute it now: that takes 0.1 s for a large vocabulary."""
        _ = self._words, self.text_bytes_max

    def ids_of(self, word: str) -> tuple[int, ...]:
        """All tokens whose text is this word; white space before it is ignored. May be empty."""
        return self._words.get(_bare(word), ())

    @cached_property
    def text_bytes_max(self) -> int:
        """The most bytes of UTF-8 that one token can add to an answer's text, whatever tokens are beside it."""
        return max(map(_text_bytes, self._pieces()), default=0)

    @cached_property
    def control_bytes_max(self) -> int:
        """The most bytes that one control token adds, where control tokens are kept."""
        return max((len(text.encode()) for text in self._vocabulary.controls), default=0)

    @cached_property
    def _words(self) -> Mapping[str, tuple[int, ...]]:
        words: dict[str, tuple[int, ...]] = {}
        for token_id, piece in enumerate(self._pieces()):
            try:
                word = _bare(piece.decode())
            except UnicodeDecodeError:
                continue
            if word:
                words[word] = (*words.get(word, ()), token_id)
        return words

    def _pieces(self) -> list[bytes]:
        return [self._vocabulary.piece(token_id) for token_id in range(self._vocabulary.size)]


def _bare(word: str) -> str:
    """Without white space before it. White space alone stays as it is."""
    return word.lstrip() or word


def _text_bytes(piece: bytes) -> int:
    """Of whole characters, their own bytes; of a broken one, three (U+FFFD) for each byte at worst."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return sum(1 if byte < 0x80 else 3 for byte in piece)
    return len(piece)
