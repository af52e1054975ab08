"""Unseeded twins that came out equal: what counts as one, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from ostinato.v1 import sequencer_pb2, types_pb2
from ostinato.v1.sequencer_pb2 import COLLISION_FOUND, COLLISION_NONE, COLLISION_UNSPECIFIED

from sidecar.collisions import TOKENS_MIN, Collisions


def given(*, seed_derived: bool = True, prompt: bytes = b"Shanghai is", **parameters: Any) -> sequencer_pb2.AdmittedPayload:
    """An item that samples freely, but for what is changed."""
    chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 40, "repetition_penalty": 1.0, "max_new_tokens": 64} | parameters
    return sequencer_pb2.AdmittedPayload(
        token_ids=prompt, seed_derived=seed_derived, parameters=types_pb2.ResolvedParameters(**chosen)
    )


def output(first: int = 0, *, engine_seed: int, count: int = TOKENS_MIN) -> types_pb2.Output:
    return types_pb2.Output(token_ids=[first] * count, finish_reason=types_pb2.FINISH_REASON_LENGTH, engine_seed=engine_seed)


def test_equal_answers_of_unequal_seeds_collide() -> None:
    """The first answer has nothing to be compared with; a different one is fine; the first one again is a collision."""
    seen = Collisions()

    assert seen.check(given(), output(0, engine_seed=1)) == COLLISION_UNSPECIFIED
    assert seen.check(given(), output(1, engine_seed=2)) == COLLISION_NONE
    assert seen.check(given(), output(0, engine_seed=3)) == COLLISION_FOUND
    assert seen.check(given(), output(1, engine_seed=4)) == COLLISION_FOUND


def test_equal_engine_seeds_are_arithmetic() -> None:
    """Two seeds that the engine folds into one must give one answer."""
    seen = Collisions()
    seen.check(given(), output(0, engine_seed=1))

    assert seen.check(given(), output(0, engine_seed=1)) == COLLISION_NONE


@pytest.mark.parametrize(
    "other",
    [given(prompt=b"Shanghai"), given(temperature=0.5), given(top_k=41), given(max_new_tokens=65), given(stop=["."])],
    ids=["prompt", "temperature", "top_k", "max_new_tokens", "stop"],
)
def test_other_inputs_are_not_compared(other: sequencer_pb2.AdmittedPayload) -> None:
    """Inputs that differ in more than the seed have nothing to do with each other."""
    seen = Collisions()
    seen.check(given(), output(0, engine_seed=1))

    assert seen.check(other, output(0, engine_seed=2)) == COLLISION_UNSPECIFIED


FORMAT = types_pb2.ResponseFormat(regex="a+")


@pytest.mark.parametrize(
    "item",
    [given(seed_derived=False), given(temperature=0.0), given(top_k=1), given(response_format=FORMAT)],
    ids=["seeded", "greedy by temperature", "greedy by top_k", "a format"],
)
def test_who_does_not_count(item: sequencer_pb2.AdmittedPayload) -> None:
    """Where the caller gave the seed, or little is left to chance, equal answers are no news."""
    seen = Collisions()

    assert seen.check(item, output(0, engine_seed=1)) == COLLISION_UNSPECIFIED
    assert seen.check(item, output(0, engine_seed=2)) == COLLISION_UNSPECIFIED


def test_short_answers_do_not_count() -> None:
    """They may be equal by chance; from 16 tokens on they may not."""
    seen = Collisions()
    for engine_seed in (1, 2):
        assert seen.check(given(), output(0, engine_seed=engine_seed, count=TOKENS_MIN - 1)) == COLLISION_UNSPECIFIED

    assert TOKENS_MIN == 16
    assert seen.check(given(), output(0, engine_seed=3)) == COLLISION_UNSPECIFIED, "nor are they remembered"


def test_seeded_answers_are_not_remembered() -> None:
    """An unseeded item is not compared with a seeded one."""
    seen = Collisions()
    seen.check(given(seed_derived=False), output(0, engine_seed=1))

    assert seen.check(given(), output(0, engine_seed=2)) == COLLISION_UNSPECIFIED


def test_memory_is_bounded() -> None:
    """The inputs least recently seen are forgotten, and of one input the outputs beyond the first few."""
    seen = Collisions(inputs_max=2, outputs_max=2)
    for prompt in (b"a", b"b", b"a", b"c"):  # c pushes b out, not a
        seen.check(given(prompt=prompt), output(0, engine_seed=1))
    assert seen.check(given(prompt=b"a"), output(0, engine_seed=2)) == COLLISION_FOUND
    assert seen.check(given(prompt=b"b"), output(0, engine_seed=2)) == COLLISION_UNSPECIFIED

    for first in (1, 2):
        seen.check(given(prompt=b"b"), output(first, engine_seed=3))
    assert seen.check(given(prompt=b"b"), output(2, engine_seed=4)) == COLLISION_NONE, "a third output is not remembered"
    assert seen.check(given(prompt=b"b"), output(1, engine_seed=4)) == COLLISION_FOUND
