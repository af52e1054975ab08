"""One answer as it grows. The one place that decides where an answer ends, for every engine."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from ostinato.v1 import engine_pb2, types_pb2

NO_REASON = types_pb2.FINISH_REASON_UNSPECIFIED
_Decoder = codecs.getincrementaldecoder("utf-8")
_BY_TOKEN = (types_pb2.FINISH_REASON_END_OF_SEQUENCE, types_pb2.FINISH_REASON_STOP_TOKEN)
"""The last token ended the answer."""


class TokenTable(Protocol):
    """The tokens of a model and their bytes. Pure; may be called from any thread."""

    size: int
    end_ids: frozenset[int]
    """Tokens with which the model itself ends an answer."""
    pieces: Sequence[bytes]
    """By token id, the bytes that it adds to the text; empty for control tokens."""
    written: Sequence[bytes]
    """As `pieces`, but a control token has the text that names it."""


class Answer:
    """Tokens become text, until end of sequence, a stop token, a stop string or the length limit ends it.

    Not thread-safe: it belongs to the thread that makes the tokens.

    1. The text is the UTF-8 of all tokens' pieces. An invalid or unfinished sequence becomes U+FFFD.
    2. The first `min_new_tokens` tokens end nothing, and a stop string is only found where a later token completes it.
    3. If one token gives several reasons, a stop string precedes all others (it shortens the text), the model's end of
       sequence precedes a stop token, and both precede the length.
    4. The stop string that matched, and the token that ended the answer, are in the text only with `include_stop`.
    5. What `take` has returned is never taken back: text that may be the beginning of a stop string is held until it is one or
       cannot be one.
    """

    def __init__(self, parameters: types_pb2.ResolvedParameters, vocabulary: TokenTable) -> None:
        self._pieces = vocabulary.written if parameters.keep_special_tokens else vocabulary.pieces
        self._include_stop = parameters.include_stop
        self._end_ids: frozenset[int] = frozenset() if parameters.ignore_eos else vocabulary.end_ids
        self._stop_ids = frozenset(parameters.stop_token_ids)
        self._min, self._max = parameters.min_new_tokens, parameters.max_new_tokens
        self._stops = StopStrings(parameters.stop) if parameters.stop else None
        self._decode = _Decoder("replace").decode
        self._ids: list[int] = []
        self._logprobs: list[types_pb2.TokenLogprobs] = []
        self._text: list[str] = []
        """For each token, what was appended with it."""
        self._held = ""
        self._taken = 0
        self._reason: types_pb2.FinishReason.ValueType = NO_REASON
        self._matched = ""

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    @property
    def complete(self) -> bool:
        return self._reason != NO_REASON

    def accept(self, token_id: int, logprobs: types_pb2.TokenLogprobs | None = None) -> bool:
        """Adds a token. True: the answer is complete and takes no more."""
        assert self._reason == NO_REASON, "a complete answer takes no token"
        self._ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._reason = reason = self._reason_of(token_id)
        silent = not self._include_stop and reason in _BY_TOKEN
        text = self._decode(b"" if silent else self._pieces[token_id], bool(reason))
        if self._stops is None or len(self._ids) <= self._min:
            self._text.append(text)
        else:
            self._extend(text, self._stops)
        return self._reason != NO_REASON

    def take(self) -> engine_pb2.RunTokens | None:
        """What is new since the last call, or None. The texts together are a prefix of the output's text, and all of it once
        the answer is complete."""
        first = self._taken
        assert first <= len(self._ids) == len(self._text), "what was taken is never taken back"
        if first == len(self._ids):
            return None
        self._taken = len(self._ids)
        return engine_pb2.RunTokens(
            first_token=first, token_ids=self._ids[first:], text="".join(self._text[first:]), logprobs=self._logprobs[first:]
        )

    def put_into(self, output: types_pb2.Output) -> None:
        """What is known here of a complete answer."""
        assert self.complete, "only a complete answer has an output"
        output.text, output.finish_reason, output.matched_stop = "".join(self._text), self._reason, self._matched
        output.token_ids.extend(self._ids)
        output.logprobs.extend(self._logprobs)

    def _reason_of(self, token_id: int) -> types_pb2.FinishReason.ValueType:
        """Why the answer ends at this token, stop strings aside."""
        made = len(self._ids)
        if made > self._min:
            if token_id in self._end_ids:
                return types_pb2.FINISH_REASON_END_OF_SEQUENCE
            if token_id in self._stop_ids:
                return types_pb2.FINISH_REASON_STOP_TOKEN
        return types_pb2.FINISH_REASON_LENGTH if made >= self._max else NO_REASON

    def _extend(self, text: str, stops: StopStrings) -> None:
        """Appends what can no longer become part of a stop string, or ends the text before a stop string that is complete."""
        found = stops.feed(text)
        held = self._held + text
        if found is not None:
            used, self._matched = found
            self._reason = types_pb2.FINISH_REASON_STOP_STRING
            end = len(held) - len(text) + used - (0 if self._include_stop else len(self._matched))
        else:
            end = len(held) - (0 if self._reason else stops.pending)
        self._text.append(held[:end])
        self._held = "" if self._reason else held[end:]


class StopStrings:
    """Finds stop strings in a growing text: an Aho-Corasick automaton over characters, amortised constant time for each.

    1. `pending` is the length of the longest end of the text that is the beginning of a stop string.
    2. The stop string that is *completed* first in the text is found; of those completed at once, the longest. So the result
       depends on the text alone and not on how tokens divide it, and no longer match has to be waited for.
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

    @property
    def pending(self) -> int:
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[int, str] | None:
        """Appends `text`. The stop string that it completes, and the number of its characters up to there, or None."""
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
        """Breadth first: the state that each falls back to, and the longest stop string that ends there."""
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
