"""One answer as it grows: the one place that decides where it ends, for every engine."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Protocol

from ostinato.v1 import engine_pb2, types_pb2


class TokenTable(Protocol):
    """The tokens of a model and their bytes. Pure; any thread may call it."""

    @property
    def size(self) -> int: ...

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens with which the model itself ends an answer."""
        ...

    def piece(self, token_id: int) -> bytes:
        """The bytes that this token adds to the text; empty for control tokens."""
        ...


class Answer:
    """Tokens become text; end of sequence, stop tokens, stop strings and the length limit end it.

    Not thread-safe: it belongs to whoever makes the tokens.

    1. The text is the UTF-8 of all tokens' pieces; an invalid or unfinished sequence appears as U+FFFD.
    2. The first `min_new_tokens` tokens end nothing, and a stop string matches only in characters that later tokens complete.
    3. Of two reasons that one token gives, a stop string goes before all others (it shortens the text), the model's end of
       sequence before a stop token, and each of them before the length.
    4. What `take` has given is never taken back: text that may begin a stop string waits until it does or does not.
    """

    def __init__(self, parameters: types_pb2.ResolvedParameters, vocabulary: TokenTable) -> None:
        self._piece = vocabulary.piece
        self._end_ids: frozenset[int] = frozenset() if parameters.ignore_eos else vocabulary.end_ids
        self._stop_ids = frozenset(parameters.stop_token_ids)
        self._min, self._max = parameters.min_new_tokens, parameters.max_new_tokens
        self._stops = StopStrings(parameters.stop)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._ids: list[int] = []
        self._logprobs: list[types_pb2.TokenLogprobs] = []
        self._text: list[str] = []
        self._held = ""
        self._taken_ids = 0
        self._taken_text = 0
        self._reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
        self._matched = ""

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    @property
    def complete(self) -> bool:
        return self._reason != types_pb2.FINISH_REASON_UNSPECIFIED

    def accept(self, token_id: int, logprobs: types_pb2.TokenLogprobs | None = None) -> bool:
        """Add a token. True: the answer is complete and takes no more."""
        assert not self._reason, "an answer that is complete takes no token"
        self._ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._reason = reason = self._ended_by(token_id)
        silent = reason in (types_pb2.FINISH_REASON_END_OF_SEQUENCE, types_pb2.FINISH_REASON_STOP_TOKEN)
        self._extend(self._decode(b"" if silent else self._piece(token_id), bool(reason)))
        if reason and not self._matched:
            self._settle(self._held)
        return self.complete

    def take(self) -> engine_pb2.RunTokens | None:
        """What is new since the last take, or None. The texts in order are a prefix of the output's, and once the answer is
        complete the whole of it; a take may then bring text without tokens."""
        first, shown = self._taken_ids, self._taken_text
        if first == len(self._ids) and shown == len(self._text):
            return None
        self._taken_ids, self._taken_text = len(self._ids), len(self._text)
        return engine_pb2.RunTokens(
            first_token=first, token_ids=self._ids[first:], text="".join(self._text[shown:]), logprobs=self._logprobs[first:]
        )

    def output(
        self, *, seed: int, engine_seed: int, prompt_tokens: int, logprob_kind: types_pb2.LogprobKind.ValueType
    ) -> types_pb2.Output:
        """The whole output of a complete answer; grade left unset."""
        assert self.complete, "an answer has an output once it is complete"
        return types_pb2.Output(
            text="".join(self._text), token_ids=self._ids, finish_reason=self._reason, matched_stop=self._matched, seed=seed,
            engine_seed=engine_seed, prompt_tokens=prompt_tokens, logprobs=self._logprobs, logprob_kind=logprob_kind,
        )  # fmt: skip

    def _ended_by(self, token_id: int) -> types_pb2.FinishReason.ValueType:
        """What ends the answer at this token, strings apart."""
        made = len(self._ids)
        if made > self._min:
            if token_id in self._end_ids:
                return types_pb2.FINISH_REASON_END_OF_SEQUENCE
            if token_id in self._stop_ids:
                return types_pb2.FINISH_REASON_STOP_TOKEN
        return types_pb2.FINISH_REASON_LENGTH if made >= self._max else types_pb2.FINISH_REASON_UNSPECIFIED

    def _extend(self, text: str) -> None:
        """Append decoded text, up to a stop string if it completes one."""
        if not self._stops or len(self._ids) <= self._min:
            return self._settle(text)
        found = self._stops.feed(text)
        held = self._held + text
        if found is None:
            safe = len(held) - self._stops.pending
            self._held = held[safe:]
            return self._settle(held[:safe])
        used, self._matched = found
        self._reason = types_pb2.FINISH_REASON_STOP_STRING
        self._held = ""
        return self._settle(held[: len(held) - len(text) + used - len(self._matched)])

    def _settle(self, text: str) -> None:
        if text:
            self._text.append(text)


class StopStrings:
    """An Aho-Corasick automaton over the text's characters; a character costs amortised constant time.

    Invariants:
    1. `pending` is the length of the longest end of the text that begins a stop string.
    2. The stop string that is *completed* first in the text wins, of those completed at once the longest. So what is found
       depends on the text alone, never on how tokens cut it, and nothing has to wait for a longer match.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._match: list[str] = [""]
        for stop in stops:
            self._add(stop)
        self._fall: list[int] = [0] * len(self._next)
        self._link()
        self._state = 0

    def __bool__(self) -> bool:
        return len(self._next) > 1

    @property
    def pending(self) -> int:
        """Characters at the text's end that could be the beginning of a stop string."""
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[int, str] | None:
        """Append `text`. The stop string that it completes and how many of its characters that took, or None."""
        following, fall, state = self._next, self._fall, self._state
        for index, character in enumerate(text):
            while state and character not in following[state]:
                state = fall[state]
            state = following[state].get(character, 0)
            if self._match[state]:
                self._state = state
                return index + 1, self._match[state]
        self._state = state
        return None

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            branches = self._next[state]
            if character not in branches:
                branches[character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append("")
            state = branches[character]
        self._match[state] = stop

    def _link(self) -> None:
        """Breadth first: where a state falls back to, and the longest stop string that ends at it."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                waiting.append(child)
                back = self._fall[state]
                while back and character not in self._next[back]:
                    back = self._fall[back]
                self._fall[child] = self._next[back].get(character, 0)
                self._match[child] = self._match[child] or self._match[self._fall[child]]


class Lexicon:
    """Built once, on first use or by `warm`; may be used from any thread."""

    def __init__(self, vocabulary: TokenTable) -> None:
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
