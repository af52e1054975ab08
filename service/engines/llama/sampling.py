"""From the logits of a row to a token. All state belongs to one run; no slot and no other run is visible here.

The order: grammar, forbidden tokens, repetition penalty (these three over the whole row), then llama.cpp's chain: top_k, top_p,
min_p, temperature and a draw. At temperature 0 it takes the likeliest token; of equals, the one with the lowest id.

llguidance compiles the grammars. It cannot be interrupted, reports why it rejects a grammar only on standard error, some of its
failures end the process, and it gives up some grammars only after a few tokens. So each grammar is first compiled, and followed
for some tokens, by this module as the child of a `Checker`.
"""

from __future__ import annotations

import copy
import math
import os
import random
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ostinato.v1 import types_pb2

from service.engines.grammars import Limits, cannot_be_obeyed, serve
from service.engines.llama.lark import lark_of, on_one_line
from service.engines.llama.library import CANDIDATE, library
from service.engines.llama.model import LlamaVocabulary
from service.strict_json import schema_of

PENALTY_WINDOW = 64
"""The repetition penalty applies to the last tokens, prompt included: this many."""
ORDER = "grammar, forbidden, penalty, top_k, top_p, min_p, temperature, draw"
"""A field of the fingerprint."""
WALKS, WALK_TOKENS = 3, 48
"""How often a grammar is followed, and for how many tokens each time."""
LIMITS = Limits(seconds=0.5, memory_bytes=512 << 20, doing=f"compile and to follow for {WALK_TOKENS} tokens")
OPTIONAL_PROPERTIES_MAX = 400
"""Of one object in a schema. llguidance gives up at about 500, when the object is begun."""
_LOGIT_MAX = 1e30
_ERRORS_ONLY = 1
_QUOTED_LINE = re.compile(r"\d+ \| ")

Logits = NDArray[np.float32]


class Sampler:
    """Chooses the tokens of one run. It belongs to one thread."""

    def __init__(
        self,
        vocabulary: LlamaVocabulary,
        parameters: types_pb2.ResolvedParameters,
        prompt: Iterable[int],
        seed: int,
        grammar: Grammar | None,
    ) -> None:
        """`seed`: from `fold_seed`; `grammar`: closed with the sampler."""
        end_ids, self._size, self._grammar = vocabulary.end_ids, vocabulary.size, grammar
        self._end_ids = sorted(end_ids)
        banned = {*parameters.bad_token_ids, *(end_ids if parameters.ignore_eos else ())}
        self._forbidden = sorted(banned)
        self._forbidden_at_first = sorted(banned | end_ids | set(parameters.stop_token_ids))
        self._min = parameters.min_new_tokens
        self._penalty = parameters.repetition_penalty
        self._recent = deque(prompt, PENALTY_WINDOW)
        self._chain = library().chain(parameters, seed)

    def draw(self, logits: Logits, generated: int) -> int:
        """The next token, after `generated` others. Raises ValueError if there is none, or the logits are infinite."""
        ids = self._allowed(generated)
        values = self._penalised(logits)[ids]
        highest = values.max()
        if not math.isfinite(highest):
            raise ValueError("the model's logits are not finite")
        candidates = np.empty(len(ids), CANDIDATE)
        candidates["id"] = ids
        candidates["logit"] = values - highest  # so that no temperature can make the highest infinite
        token_id = int(candidates["id"][library().apply(self._chain, candidates)])
        self._recent.append(token_id)
        if self._grammar is not None and token_id not in self._end_ids:
            self._grammar.accept(token_id)
        return token_id

    def close(self) -> None:
        library().c.llama_sampler_free(self._chain)
        if self._grammar is not None:
            self._grammar.close()

    def _allowed(self, generated: int) -> NDArray[np.intp]:
        """The ids that may come next, ascending; at least one."""
        allowed = np.ones(self._size, np.bool_)
        if self._grammar is not None:
            allowed = self._grammar.allowed()
            # llguidance knows one end token. Where it may come, the model's other end tokens may come too.
            allowed[self._end_ids] = allowed[self._end_ids].any()
        allowed[self._forbidden_at_first if generated < self._min else self._forbidden] = False
        ids = np.flatnonzero(allowed)
        if not len(ids):
            raise ValueError("no token may come next: all that the grammar allows is forbidden by other parameters")
        return ids

    def _penalised(self, logits: Logits) -> Logits:
        """The logits, those of recent tokens divided by the penalty, or multiplied where they are negative."""
        if self._penalty == 1 or not self._recent:
            return logits
        recent = np.unique(np.fromiter(self._recent, np.intp))
        values = logits[recent].astype(np.float64)
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / self._penalty, values * self._penalty)
        penalised = logits.copy()
        penalised[recent] = np.clip(values, -_LOGIT_MAX, _LOGIT_MAX)
        return penalised


def fold_seed(seed: int) -> int:
    """A uint64 as a llama.cpp seed. These have 32 bits, and the last value means "random". A seed that fits is unchanged; any
    other goes through a step of SplitMix64."""
    reserved, mask = 2**32 - 1, 2**64 - 1
    if seed < reserved:
        return seed
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) % reserved


def token_logprobs(logits: Logits, token_id: int, top: int) -> types_pb2.TokenLogprobs:
    """RAW logprobs of a token and of the `top` likeliest, ties by id. The bits do not depend on `top`."""
    row = logits.astype(np.float64)
    highest = row.max()
    norm = highest + np.log(np.exp(row - highest).sum())
    likeliest: Iterable[int] = ()
    if top:
        # A partition alone would choose arbitrarily among equals at its edge.
        found = np.flatnonzero(row >= np.partition(row, -top)[-top])
        likeliest = found[np.lexsort((found, -row[found]))][:top]
    return types_pb2.TokenLogprobs(
        logprob=row[token_id] - norm,
        top=[types_pb2.TopLogprob(token_id=int(each), logprob=row[each] - norm) for each in likeliest],
    )


# Grammars


class GrammarLost(ValueError):
    """llguidance has failed and would allow every token."""


class Grammar:
    """The state of one answer's grammar. It belongs to one thread."""

    def __init__(self, vocabulary: LlamaVocabulary, kind: str, source: bytes) -> None:
        """`kind` and `source` are from `source_of`."""
        self._sampler = library().grammar(vocabulary.handle, kind, source)
        self._tokens = np.zeros(vocabulary.size, CANDIDATE)
        self._tokens["id"] = np.arange(vocabulary.size)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by id. Raises GrammarLost.

        A grammar always forbids something, at least control tokens. When llguidance fails, it forbids nothing.
        """
        self._tokens["logit"] = 0
        library().apply(self._sampler, self._tokens)
        allowed: NDArray[np.bool_] = self._tokens["logit"] == 0
        if allowed.all():
            raise GrammarLost("llguidance has failed on this grammar")
        return allowed

    def copy(self) -> Grammar:
        """Another one in the same state, to be closed too."""
        copied = copy.copy(self)
        copied._sampler = library().copy_of(self._sampler)
        copied._tokens = self._tokens.copy()
        return copied

    def accept(self, token_id: int) -> None:
        """Advance by a token, which must be allowed."""
        library().c.llama_sampler_accept(self._sampler, token_id)

    def close(self) -> None:
        library().c.llama_sampler_free(self._sampler)


_ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)


def source_of(response_format: types_pb2.ResponseFormat) -> tuple[str, bytes]:
    """llguidance's kind of grammar, and the grammar. Raises ValueError."""
    kind = response_format.WhichOneof("format")
    assert kind is not None, "Prepare refuses an empty one"
    if kind != "json_schema" and "\0" in getattr(response_format, kind):
        raise ValueError("holds a NUL character" + ("; write \\x00" if kind == "regex" else ""))
    match kind:
        case "json_schema":
            schema = schema_of(response_format.json_schema)
            if (most := max(_optional_properties(schema), default=0)) > OPTIONAL_PROPERTIES_MAX:
                raise ValueError(
                    f"has an object with {most} optional properties, at most {OPTIONAL_PROPERTIES_MAX} are allowed"
                )
            return "json", on_one_line(schema).encode()
        case "regex":
            return "regex", response_format.regex.encode()
        case "ebnf":
            return "lark", response_format.ebnf.encode()
        case _:
            return "lark", lark_of(response_format.structural_tag).encode()


def control_in(source: str, controls: Iterable[str]) -> str | None:
    """A control token whose text a grammar asks for. llguidance would take the token for it, which has no text."""
    plain = _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], source)
    return next((control for control in controls if control in source or control in plain), None)


def _optional_properties(schema: dict[str, Any]) -> Iterator[int]:
    """How many each object in a schema has."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            properties, required = part.get("properties"), part.get("required")
            if isinstance(properties, dict):
                named = {each for each in required if isinstance(each, str)} if isinstance(required, list) else set[str]()
                yield len(properties.keys() - named)
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


class _Compiler:
    """In the child: compiles grammars and reads llguidance's messages."""

    def __init__(self, model: Path, errors: IO[bytes]) -> None:
        """`errors`: the file to which standard error goes."""
        self._errors, self._vocabulary = errors, LlamaVocabulary(model)
        library().c.common_log_set_verbosity_thold(_ERRORS_ONLY)
        self._quote = next((token_id for token_id, piece in enumerate(self._vocabulary.pieces) if piece == b'"'), None)
        silent = set(self._vocabulary.controls.values()) - self._vocabulary.end_ids
        self._controls = np.array(sorted(silent), np.int64)
        self.problem("regex", "a")  # builds what all grammars need

    def problem(self, kind: str, source: str) -> str | None:
        """Why the grammar is rejected, or None."""
        self._errors.seek(0)
        self._errors.truncate()
        self._tokens = 0
        if (control := control_in(source, self._vocabulary.controls)) is not None:
            return f"holds the text of a control token, {control}"
        with closing(Grammar(self._vocabulary, kind, source.encode())) as grammar:
            try:
                if not grammar.allowed().any():
                    return "allows no answer"
                for walk in range(WALKS):
                    with closing(grammar.copy()) as followed:
                        if not self._follow(followed, walk):
                            return "allows control tokens, which have no text"
            except GrammarLost:
                library().c.common_log_flush(library().c.common_log_main())
                self._errors.seek(0)
                reason = explanation(self._errors.read().decode(errors="replace"))
                return f"{reason} (after {self._tokens} tokens)" if self._tokens else reason
        return None

    def _follow(self, grammar: Grammar, walk: int) -> bool:
        """Follow the grammar by arbitrary tokens, always the same ones. The second walk and the third end strings early or at
        once, and so reach more of a JSON schema. False: it allows a token that has no text and does not end the output. Raises
        GrammarLost."""
        chance = random.Random(walk)  # noqa: S311  # no secret
        for self._tokens in range(WALK_TOKENS):
            allowed = grammar.allowed()
            if not (ids := np.flatnonzero(allowed)).size:
                break
            if allowed[self._controls].any():
                return False
            token_id = int(ids[chance.randrange(ids.size)])
            if self._quote is not None and allowed[self._quote] and 2 * chance.random() < walk:
                token_id = self._quote
            if token_id in self._vocabulary.end_ids:
                break
            grammar.accept(token_id)
        return True


def explanation(text: str) -> str:
    """llguidance's message in one line, without the dump of its state and without the source lines that it quotes."""
    lines = [line.strip() for line in text.rpartition("llg error: ")[2].partition("<state>")[0].splitlines()]
    reason = " ".join(line for line in lines if line.strip("^") and not _QUOTED_LINE.match(line))
    if reason == "NoExtensionBias":
        return "allows no answer"
    return cannot_be_obeyed(reason or "llguidance does not say why")


def main(model: Path) -> None:
    """The child of `Checker`."""
    with tempfile.TemporaryFile() as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
        compiler = _Compiler(model, errors)
        serve(sys.stdin.buffer, sys.stdout.buffer, compiler.problem, LIMITS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
