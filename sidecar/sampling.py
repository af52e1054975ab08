"""How an item is sampled, in a line for people: divergence is counted by it."""

from __future__ import annotations

from ostinato.v1 import types_pb2


def sampling(given: types_pb2.ResolvedParameters) -> str:
    """What is not at its default and may matter to a divergence, names ascending by importance; `defaults` if nothing is.

    Numbers have six digits at most, and what a format demands is not said, so that like items are alike.
    """
    greedy = given.temperature == 0
    numbers = (
        ("temperature", given.temperature, 1.0),
        ("top_k", given.top_k, 0),
        ("top_p", given.top_p, 1.0),
        ("min_p", given.min_p, 0.0),
        ("repetition_penalty", given.repetition_penalty, 1.0),
    )
    words = ["greedy"] if greedy else []
    words += [
        f"{name}={value:g}"
        for name, value, default in numbers
        if value != default and not (greedy and name != "repetition_penalty")
    ]
    if given.HasField("response_format"):
        words.append(given.response_format.WhichOneof("format") or "response_format")
    if given.HasField("logprobs"):
        words.append("logprobs")
    return " ".join(words) or "defaults"
