"""Collisions of unseeded answers, the choice that an answer took, and the sampling label."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ostinato.v1 import sequencer_pb2, types_pb2
from ostinato.v1.sequencer_pb2 import COLLISION_FOUND, COLLISION_NONE, COLLISION_UNSPECIFIED

from sidecar.collisions import CHOICE_BITS_MIN, DISTINCT_TOKEN_BITS, TOKENS_MIN, Collisions, choice_of, sampling_label

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "defaults"),
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05}, "temperature=0.7 top_k=40 top_p=0.9 min_p=0.05"),
        ({"temperature": 0.0, "top_k": 40}, "greedy"),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, "greedy repetition_penalty=1.1"),
        ({"response_format": types_pb2.ResponseFormat(regex="a+"), "logprobs": 0}, "regex logprobs"),
        ({"response_format": types_pb2.ResponseFormat(json_schema="{}")}, "json_schema"),
        ({"temperature": 1 / 3}, "temperature=0.333333"),
        ({"max_new_tokens": 7, "stop": ["."]}, "defaults"),
    ],
)
def test_sampling_label(given: dict[str, object], line: str) -> None:
    """The label leaves out defaults, lengths and what greedy decoding ignores; similar items have the same label."""
    assert sampling_label(types_pb2.ResolvedParameters(**(DEFAULTS | given))) == line  # type: ignore[arg-type]


def given(*, seed_derived: bool = True, prompt: bytes = b"Shanghai is", **parameters: Any) -> sequencer_pb2.AdmittedPayload:
    """An item that is sampled freely, with these changes."""
    chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 40, "repetition_penalty": 1.0, "max_new_tokens": 64} | parameters
    return sequencer_pb2.AdmittedPayload(
        token_ids=prompt, seed_derived=seed_derived, parameters=types_pb2.ResolvedParameters(**chosen)
    )


def output(first: int = 0, *, engine_seed: int, count: int = 64) -> types_pb2.Output:
    """An answer of distinct tokens."""
    return types_pb2.Output(
        token_ids=range(first, first + count), finish_reason=types_pb2.FINISH_REASON_LENGTH, engine_seed=engine_seed
    )


def with_logprobs(
    made: types_pb2.Output, kind: types_pb2.LogprobKind.ValueType, probability: float, *likelier: float
) -> types_pb2.Output:
    """The answer, each of whose tokens had this probability, with others that had these."""
    made.logprob_kind = kind
    for _ in made.token_ids:
        position = made.logprobs.add(logprob=math.log(probability))
        for each in sorted((probability, *likelier), reverse=True):
            position.top.add(token_id=999, logprob=math.log(each))
    return made


def certain(probability: float, *, engine_seed: int) -> types_pb2.Output:
    return with_logprobs(output(engine_seed=engine_seed), types_pb2.LOGPROB_KIND_PROCESSED, probability)


def test_equal_answers_of_unequal_seeds_collide() -> None:
    """The first answer is not compared, a different one does not collide, and an equal one does."""
    seen = Collisions()

    assert seen.check("", given(), output(0, engine_seed=1)) == COLLISION_UNSPECIFIED
    assert seen.check("", given(), output(1, engine_seed=2)) == COLLISION_NONE
    assert seen.check("", given(), output(0, engine_seed=3)) == COLLISION_FOUND
    assert seen.check("", given(), output(1, engine_seed=4)) == COLLISION_FOUND


def test_equal_engine_seeds_do_not_collide() -> None:
    """Two seeds that the engine maps to the same one do not collide."""
    seen = Collisions()
    seen.check("", given(), output(0, engine_seed=1))

    assert seen.check("", given(), output(0, engine_seed=1)) == COLLISION_NONE


@pytest.mark.parametrize(
    "other",
    [given(prompt=b"Shanghai"), given(temperature=0.5), given(top_k=41), given(max_new_tokens=65), given(stop=["."])],
    ids=["prompt", "temperature", "top_k", "max_new_tokens", "stop"],
)
def test_other_inputs_are_not_compared(other: sequencer_pb2.AdmittedPayload) -> None:
    """Inputs that differ in more than the seed are not compared."""
    seen = Collisions()
    seen.check("", given(), output(0, engine_seed=1))

    assert seen.check("", other, output(0, engine_seed=2)) == COLLISION_UNSPECIFIED


def loop(*words: int, engine_seed: int, count: int = 256) -> types_pb2.Output:
    """An answer that repeats its last token: village market market market …"""
    made = output(engine_seed=engine_seed, count=count)
    made.token_ids[:] = [*words, *[words[-1]] * (count - len(words))]
    return made


RAW, PROCESSED = types_pb2.LOGPROB_KIND_RAW, types_pb2.LOGPROB_KIND_PROCESSED
PLAIN = given(top_k=0)
RESHAPED = given(top_k=40, temperature=0.5)


@pytest.mark.parametrize(
    ("item", "kind", "probabilities", "bits"),
    [
        (PLAIN, PROCESSED, (0.5,), 16.0),
        (PLAIN, RAW, (0.25,), 32.0),
        (RESHAPED, PROCESSED, (0.25,), 32.0),
        (RESHAPED, RAW, (0.5, 0.25), 0.0),
        (RESHAPED, RAW, (0.25, 0.5), 16 * math.log2(1 + 4)),
        (given(top_k=40), RAW, (0.25, 0.5), 16 * math.log2(1 + 2)),
    ],
    ids=["processed", "raw, not reshaped", "processed, reshaped", "raw, the likeliest", "raw, by temperature", "raw, by top_k"],
)
def test_choice_from_logprobs(
    item: sequencer_pb2.AdmittedPayload, kind: types_pb2.LogprobKind.ValueType, probabilities: tuple[float, ...], bits: float
) -> None:
    """The bits are the logarithm of the answer's probability if the logprobs are of the distribution that was sampled from, and
    otherwise a bound from the likelier tokens."""
    made = with_logprobs(output(engine_seed=1, count=16), kind, *probabilities)

    choice = choice_of(item.parameters, made)

    assert (choice.tokens, choice.distinct_tokens, choice.logprobs_known) == (16, 16, True)
    assert choice.bits == pytest.approx(bits)


@pytest.mark.parametrize(
    "item",
    [
        given(repetition_penalty=1.1),
        given(bad_token_ids=[5]),
        given(ignore_eos=True),
        given(min_new_tokens=4),
    ],
    ids=["a penalty", "a ban", "no end", "no early end"],
)
def test_raw_logprobs_that_cannot_be_used(item: sequencer_pb2.AdmittedPayload) -> None:
    """If the order of tokens may differ from that of the logprobs, the bits are estimated from the distinct tokens."""
    choice = choice_of(item.parameters, with_logprobs(output(engine_seed=1), RAW, 0.01, 0.5))

    assert not choice.logprobs_known
    assert choice.bits == 64 * DISTINCT_TOKEN_BITS


@pytest.mark.parametrize(
    ("item", "made"),
    [
        pytest.param(given(seed_derived=False), output, id="seeded"),
        pytest.param(given(temperature=0.0), output, id="greedy by temperature"),
        pytest.param(given(top_k=1), output, id="greedy by top_k"),
        pytest.param(given(response_format=types_pb2.ResponseFormat(regex="a+")), output, id="a format"),
        pytest.param(given(temperature=0.1), output, id="a low temperature"),
        pytest.param(given(top_p=0.1), output, id="a small top_p"),
        pytest.param(given(), partial(loop, 7, 8), id="a long loop"),
        pytest.param(given(), partial(certain, 0.99), id="certain by its logprobs"),
    ],
)
def test_items_that_do_not_count(item: sequencer_pb2.AdmittedPayload, made: Callable[..., types_pb2.Output]) -> None:
    """Equal answers are not compared if the caller gave the seed, or if the answer took little choice."""
    seen = Collisions()

    assert seen.check("", item, made(engine_seed=1)) == COLLISION_UNSPECIFIED
    assert seen.check("", item, made(engine_seed=2)) == COLLISION_UNSPECIFIED


def test_a_loop_of_known_choice() -> None:
    """A loop whose logprobs show that each token was one of two equally likely ones collides."""
    seen = Collisions()
    for engine_seed, found in ((1, COLLISION_UNSPECIFIED), (2, COLLISION_FOUND)):
        assert seen.check("", given(), with_logprobs(loop(7, 8, engine_seed=engine_seed), PROCESSED, 0.5)) == found


def test_the_threshold() -> None:
    """An answer just above CHOICE_BITS_MIN is compared, and one just below is not."""
    enough = math.ceil(CHOICE_BITS_MIN / DISTINCT_TOKEN_BITS)
    for count, found in ((enough, COLLISION_FOUND), (enough - 1, COLLISION_UNSPECIFIED)):
        seen = Collisions()
        seen.check("", given(), output(engine_seed=1, count=count))
        assert seen.check("", given(), output(engine_seed=2, count=count)) == found


def test_short_answers_do_not_count() -> None:
    """Answers of fewer than 16 tokens are not compared, whatever the logprobs say."""
    seen, made = Collisions(), (TOKENS_MIN - 1, TOKENS_MIN - 1, TOKENS_MIN, TOKENS_MIN)
    found = [
        seen.check("", given(), with_logprobs(output(0, engine_seed=engine_seed, count=count), PROCESSED, 0.01))
        for engine_seed, count in enumerate(made, start=1)
    ]

    assert TOKENS_MIN == 16
    assert found == [COLLISION_UNSPECIFIED, COLLISION_UNSPECIFIED, COLLISION_UNSPECIFIED, COLLISION_FOUND]


def test_groups_are_apart() -> None:
    """An answer is compared with those of its own group only, and remembered for no other."""
    seen = Collisions()
    seen.check("acme", given(), output(0, engine_seed=1))

    assert seen.check("rival", given(), output(0, engine_seed=2)) == COLLISION_UNSPECIFIED
    assert seen.check("acme", given(), output(0, engine_seed=3)) == COLLISION_FOUND
    assert seen.check("rival", given(), output(1, engine_seed=4)) == COLLISION_NONE


def test_seeded_answers_are_not_remembered() -> None:
    """An unseeded item is not compared with a seeded one."""
    seen = Collisions()
    seen.check("", given(seed_derived=False), output(0, engine_seed=1))

    assert seen.check("", given(), output(0, engine_seed=2)) == COLLISION_UNSPECIFIED


def test_memory_is_bounded() -> None:
    """Only the newest inputs are remembered, and only the first outputs of each."""
    seen = Collisions(inputs_max=2, outputs_max=2)
    for prompt in (b"a", b"b", b"a", b"c"):  # c pushes b out, not a
        seen.check("", given(prompt=prompt), output(0, engine_seed=1))
    assert seen.check("", given(prompt=b"a"), output(0, engine_seed=2)) == COLLISION_FOUND
    assert seen.check("", given(prompt=b"b"), output(0, engine_seed=2)) == COLLISION_UNSPECIFIED

    for first in (1, 2):
        seen.check("", given(prompt=b"b"), output(first, engine_seed=3))
    assert seen.check("", given(prompt=b"b"), output(2, engine_seed=4)) == COLLISION_NONE, "a third output is not remembered"
    assert seen.check("", given(prompt=b"b"), output(1, engine_seed=4)) == COLLISION_FOUND
