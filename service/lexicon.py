"""What has to be known of a whole vocabulary: which tokens are a given word, and how much text a token can make."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from service.engines.base import Vocabulary


class Lexicon:
    """Built once, on first use or by `warm`; may be used from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def warm(self) -> None:
        """Take the time now: a tenth of a second for a large vocabulary."""
        _ = self._words, self.text_bytes_max

    def ids_of(self, word: str) -> tuple[int, ...]:
        """All tokens whose text is this word, white space before it apart. Empty: no token is."""
        return self._words.get(_bare(word), ())

    @cached_property
    def text_bytes_max(self) -> int:
        """The most bytes of UTF-8 that one token can add to an answer's text, whatever stands around it."""
        return max(map(_text_bytes, self._pieces), default=0)

    @property
    def _pieces(self) -> list[bytes]:
        return [self._vocabulary.piece(token_id) for token_id in range(self._vocabulary.size)]

    @cached_property
    def _words(self) -> Mapping[str, tuple[int, ...]]:
        words: dict[str, tuple[int, ...]] = {}
        for token_id, piece in enumerate(self._pieces):
            try:
                word = _bare(piece.decode())
            except UnicodeDecodeError:
                continue
            if word:
                words[word] = (*words.get(word, ()), token_id)
        return words


def _bare(word: str) -> str:
    """Without white space before it; white space alone stays as it is."""
    return word.lstrip() or word


def _text_bytes(piece: bytes) -> int:
    """Whole characters stay what they are. A byte of a broken one becomes U+FFFD, three bytes, at worst."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return sum(1 if byte < 0x80 else 3 for byte in piece)
    return len(piece)
