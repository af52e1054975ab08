"""Requests: targets of eight kinds, and neighbours that ask for anything. The same at every call."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ostinato.v1 import types_pb2

WORDS = [
    "river",
    "city",
    "engine",
    "music",
    "protein",
    "market",
    "winter",
    "theorem",
    "garden",
    "history",
    "copper",
    "signal",
    "memory",
    "bridge",
    "ocean",
    "letter",
    "planet",
    "velvet",
    "shadow",
    "number",
    "circle",
    "silver",
    "forest",
    "window",
]
OPENINGS = (
    "Shanghai is", "The theory of evolution", "Once upon a time, in a small village by the sea,", "def quicksort(arr):",
    "The three most important things about databases are", "In 1969,", "My favourite recipe needs",
    "Explain how a bicycle stays upright.",
)  # fmt: skip
NEW_TOKENS = 96
CHOSEN_TOO = 5
"""Logprobs beside the chosen token's."""
KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 12, "repetition_penalty": 1.1},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 1000, "min_p": 0.05},
    {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "bad_words": ["the"],
        "min_new_tokens": NEW_TOKENS - 1,
        "ignore_eos": False,
    },
)
"""Sampled narrowly, greedily, by nucleus, with a penalty, hot, narrow and by nucleus, wide, and greedily with all else."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    name: str
    item: types_pb2.Item
    after: float = 0.0
    """Seconds that it waits before it is sent."""
    leaves: bool = False
    """Cancelled on its way."""


def targets(count: int) -> list[Ask]:
    """Of prompts between 3 and about 500 tokens, and, last, of a single one."""
    rng = random.Random(5)
    made = []
    for index in range(count):
        words = " ".join(rng.choice(WORDS) for _ in range((index * 37) % 260))
        parameters = types_pb2.Parameters(
            max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=CHOSEN_TOO, seed=1_000_003 * index + (index % 3 == 0) * 2**63
        )
        parameters.MergeFrom(types_pb2.Parameters(**KINDS[index % len(KINDS)]))  # type: ignore[arg-type]
        item = types_pb2.Item(text=f"{OPENINGS[index % len(OPENINGS)]} {words}", parameters=parameters)
        if index == count - 1:
            item.ClearField("text")
            item.token_ids.ids.append(500)
        made.append(Ask(f"{index}/{index % len(KINDS)}", item))
    return made


def neighbours(count: int, seed: int) -> Iterator[Ask]:
    """Lengths, sampling, arrival, grammar, cancellation: anything goes."""
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
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 900)))
        item = types_pb2.Item(text=words, parameters=parameters)
        if rng.random() < 0.03:
            item = types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[rng.randrange(300, 4000)]), parameters=parameters)
        yield Ask(f"neighbour {index}", item, after=rng.random() * 0.5, leaves=rng.random() < 0.1)


def mixed(asks: list[Ask], total: int, seed: int) -> list[Ask]:
    """The targets among so many in all, shuffled, arriving within half a second."""
    rng = random.Random(seed)
    everyone = [Ask(ask.name, ask.item, after=rng.random() * 0.5) for ask in asks] + list(neighbours(total - len(asks), seed))
    rng.shuffle(everyone)
    return everyone


def fillers(count: int, new_tokens: int) -> list[Ask]:
    """Equal work, to be timed."""
    return [
        Ask(
            f"filler {index}",
            types_pb2.Item(
                text="Shanghai is",
                parameters=types_pb2.Parameters(
                    max_new_tokens=new_tokens, ignore_eos=True, temperature=0.9, top_k=40, seed=index, logprobs=None
                ),
            ),
        )
        for index in range(count)
    ]


def long_prompts(count: int, words: int) -> list[Ask]:
    """One new token each: all of the time is prefill."""
    rng = random.Random(9)
    parameters = types_pb2.Parameters(max_new_tokens=1, ignore_eos=True, temperature=0.0, seed=1)
    texts = [" ".join(rng.choice(WORDS) for _ in range(words)) for _ in range(count)]
    return [Ask(f"long {index}", types_pb2.Item(text=text, parameters=parameters)) for index, text in enumerate(texts)]
