"""Requests: targets of sixteen kinds, and background requests with random parameters. The same at every call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ostinato.v1 import types_pb2

WORDS = (
    "river", "city", "engine", "music", "protein", "market", "winter", "theorem", "garden", "history", "copper", "signal",
    "memory", "bridge", "ocean", "letter", "planet", "velvet", "shadow", "number", "circle", "silver", "forest", "window",
)  # fmt: skip
OPENINGS = (
    "Shanghai is", "The theory of evolution", "Once upon a time, in a small village by the sea,", "def quicksort(arr):",
    "The three most important things about databases are", "In 1969,", "My favourite recipe needs",
    "Explain how a bicycle stays upright.",
)  # fmt: skip
NEW_TOKENS = 96
CHOSEN_TOO = 5
"""Logprobs beside the chosen token's."""
ARRIVALS_SECONDS = 0.5
"""All requests arrive within this time."""
LONG_WORDS = (1500, 3000, 6000, 12000)
"""Of every fourth target's prompt if contexts are long; up to 12,000 tokens."""
LONG_CONTEXT = 16384
IDS = (40, 250)
"""Range of token ids that every vocabulary has."""
SCHEMA = (
    '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 24}, "people": {"type": "integer"},'
    ' "coast": {"type": "boolean"}}, "required": ["city", "people", "coast"]}'
)
FIRST, SECOND, ONE_TOKEN = "first turn", "second turn", "one token"
KINDS: dict[str, dict[str, object]] = {
    "sampled": {"temperature": 1.0, "top_k": 40},
    "greedy": {"temperature": 0.0},
    "nucleus": {"temperature": 0.7, "top_p": 0.9},
    "penalised": {"temperature": 1.0, "top_k": 12, "repetition_penalty": 1.1},
    "hot": {"temperature": 1.3, "top_k": 5},
    "narrow nucleus": {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    "wide": {"temperature": 0.9, "top_k": 1000, "min_p": 0.05},
    "all at once": {
        "temperature": 0.0, "repetition_penalty": 1.2, "bad_words": ["the"], "min_new_tokens": 95, "ignore_eos": False,
    },
    "widest": {"temperature": 1.0, "top_k": 1024},
    "bad words": {"temperature": 1.0, "top_k": 20, "bad_words": ["the", "a", "of", "is", "to"]},
    "minimum": {"temperature": 0.9, "top_k": 60, "min_new_tokens": 24, "ignore_eos": False},
    "json": {"temperature": 0.8, "ignore_eos": False, "response_format": types_pb2.ResponseFormat(json_schema=SCHEMA)},
    "regex": {
        "temperature": 1.0, "top_k": 64, "ignore_eos": False,
        "response_format": types_pb2.ResponseFormat(regex="[A-Z][a-z]{2,11}( [a-z]{2,11}){3,9}\\."),
    },
    FIRST: {"temperature": 0.8, "top_k": 30},
    SECOND: {"temperature": 0.0},
    ONE_TOKEN: {"temperature": 1.0, "top_k": 50},
}  # fmt: skip
"""Name and sampling. A second turn's prompt contains the first one's prompt and answer."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    name: str
    item: types_pb2.Item
    after: float = 0.0
    """Seconds before it is sent."""
    leaves: bool = False
    """Whether it is cancelled while it runs."""
    leaves_after: float = 0.2
    """Seconds from sending to the cancellation."""
    streams: bool = False
    follows: str = ""
    """Name of the ask whose answer its prompt begins with."""

    def behind(self, first: Ask, answer: types_pb2.Output) -> Ask:
        """The second turn with its whole prompt."""
        item = types_pb2.Item()
        item.CopyFrom(self.item)
        item.text = f"{first.item.text}{answer.text}\n{self.item.text}"
        return replace(self, item=item, follows="")


def ask_of(name: str, prompt: str | Sequence[int], **given: Any) -> Ask:
    """With a prompt of text or of token ids, and these parameters."""
    item = types_pb2.Item(parameters=types_pb2.Parameters(**given))
    if isinstance(prompt, str):
        item.text = prompt
    else:
        item.token_ids.ids.extend(prompt)
    return Ask(name, item)


def random_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(*IDS) for _ in range(count)]


def targets(count: int, *, new_tokens: int = NEW_TOKENS, context_tokens: int = 4096) -> list[Ask]:
    """All kinds in turn, of prompts between 1 and about 500 tokens; of up to 12,000 where the context has room for them."""
    rng, kinds = random.Random(5), list(KINDS.items())
    made: list[Ask] = []
    for index in range(count):
        kind, given = kinds[index % len(kinds)]
        length = (index * 37) % 260
        if context_tokens >= LONG_CONTEXT and index % 4 == 2:
            length = LONG_WORDS[index // 4 % len(LONG_WORDS)]
        words = " ".join(rng.choice(WORDS) for _ in range(length))
        parameters = types_pb2.Parameters(
            max_new_tokens=new_tokens, ignore_eos=True, logprobs=CHOSEN_TOO, seed=1_000_003 * index + (index % 3 == 0) * 2**63
        )
        parameters.MergeFrom(types_pb2.Parameters(**given))  # type: ignore[arg-type]
        parameters.min_new_tokens = min(parameters.min_new_tokens, new_tokens - 1)
        item = types_pb2.Item(text=f"{rng.choice(OPENINGS)} {words}", parameters=parameters)
        if kind == ONE_TOKEN:
            item.ClearField("text")
            item.token_ids.ids.append(IDS[0] + index)
        made.append(Ask(f"{index} {kind}", item, follows=made[-1].name if kind == SECOND else ""))
    return made


def plain(asks: Sequence[Ask]) -> list[Ask]:
    """The same without grammars and bad words, which the scripted engine does not have."""
    found = []
    for ask in asks:
        item = types_pb2.Item()
        item.CopyFrom(ask.item)
        item.parameters.ClearField("response_format")
        item.parameters.ClearField("bad_words")
        found.append(replace(ask, item=item))
    return found


def neighbours(count: int, seed: int, context_tokens: int = 4096) -> Iterator[Ask]:
    """Random lengths, sampling, arrival times, grammars and cancellations."""
    rng = random.Random(seed)
    for index in range(count):
        parameters = types_pb2.Parameters(
            max_new_tokens=rng.randrange(1, 200), ignore_eos=rng.random() < 0.5, seed=rng.getrandbits(64),
            temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.5]), top_k=rng.choice([0, 1, 5, 20, 60, 64, 500, 1024]),
            top_p=rng.choice([1.0, 0.9, 0.5]), min_p=rng.choice([0.0, 0.05]), repetition_penalty=rng.choice([1.0, 1.2]),
        )  # fmt: skip
        if rng.random() < 0.2:
            parameters.logprobs = rng.randrange(21)
        if rng.random() < 0.1:
            parameters.min_new_tokens = min(10, parameters.max_new_tokens)
        elif rng.random() < 0.05:
            parameters.ignore_eos = False
            parameters.response_format.regex = "[a-z ]{5,60}"
        if rng.random() < 0.1:
            parameters.stop.append("e")
        length = rng.randrange(1, 900)
        if context_tokens >= LONG_CONTEXT and rng.random() < 0.05:
            length *= 10
        item = types_pb2.Item(text=" ".join(rng.choice(WORDS) for _ in range(length)), parameters=parameters)
        if rng.random() < 0.03:
            item = types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[rng.randrange(*IDS)]), parameters=parameters)
        yield Ask(f"neighbour {index}", item, after=rng.random() * ARRIVALS_SECONDS, leaves=rng.random() < 0.1)


def mixed(asks: Sequence[Ask], total: int, seed: int, context_tokens: int = 4096) -> list[Ask]:
    """The targets among `total` requests, shuffled, arriving within half a second, about half of them streamed."""
    rng = random.Random(seed)
    everyone = [replace(ask, after=rng.random() * ARRIVALS_SECONDS, streams=rng.random() < 0.5) for ask in asks]
    everyone += neighbours(total - len(asks), seed, context_tokens)
    rng.shuffle(everyone)
    return everyone


def fillers(count: int, new_tokens: int, prompt: Callable[[], str | Sequence[int]] = lambda: OPENINGS[0]) -> list[Ask]:
    """Equal work, to be timed."""
    given = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0.9, "top_k": 40}
    return [ask_of(f"filler {index}", prompt(), seed=index, **given) for index in range(count)]


def long_prompts(count: int, words: int) -> list[Ask]:
    """One new token each: all of the time is prefill."""
    rng = random.Random(9)
    given = {"max_new_tokens": 1, "ignore_eos": True, "temperature": 0.0, "seed": 1}
    return [ask_of(f"long {index}", " ".join(rng.choice(WORDS) for _ in range(words)), **given) for index in range(count)]


def contexts(count: int, tokens: int, new_tokens: int) -> list[Ask]:
    """As `fillers`, with prompts of `tokens` tokens."""
    rng = random.Random(11)
    return fillers(count, new_tokens, lambda: random_ids(rng, tokens))
