"""A real model on this machine's cores: the same request with the same seed gives the same tokens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing

import pytest

from ostinato.client import Client
from ostinato.digest import logprobs_digest, output_digest
from ostinato.requests import Sampling
from ostinato.v1 import types_pb2

from tests.pair import Pair
from tests.service.llama_kit import LACKING

pytestmark = [pytest.mark.llama, pytest.mark.timeout(400)]

READY_SECONDS = 300.0
"""The self-test takes half a minute, and several minutes on a busy machine."""
PROMPT, TOKENS = "Shanghai is", 8
SIZES = (1, 2, 3, 8, 16)
"""Of batches; the engine computes eight runs at once, so the largest fills it twice."""
GRADES = {types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if LACKING:
        pytest.skip(f"the llama engine needs {', '.join(LACKING)}")
    with Pair(engine="llama") as both:
        start(both)
        yield both


def start(pair: Pair) -> None:
    """The service first, with all the time that it wants."""
    pair.start_service().wait_for("serving", READY_SECONDS)
    pair.start_sidecar().wait_for("engine connected")


async def seeded(client: Client, items: int, seed: int = 1) -> list[types_pb2.Result]:
    response = await client.generate([PROMPT] * items, seed=seed, top_k=40, max_new_tokens=TOKENS, logprobs=1)
    return list(response.results)


def outputs(results: Sequence[types_pb2.Result]) -> set[tuple[bytes, bytes, str]]:
    """Distinct answers: tokens and what ended them, the bits of the logprobs, and the text."""
    assert all(result.HasField("output") for result in results)
    return {(output_digest(each.output), logprobs_digest(each.output), each.output.text) for each in results}


async def test_the_grade_is_earned(pair: Pair) -> None:
    """The self-test finds the engine EXACT, or SERIAL, and says what it looked at."""
    async with Client(pair.target) as client:
        model = await client.model()

    assert model.grade in GRADES
    assert "gave the same tokens and logprob bits" in model.grade_reason


async def test_seeded_answers_are_equal_at_every_batch_size(pair: Pair) -> None:
    """One seed makes one answer, alone and beside 1, 2, 7 and 15 others, bit for bit."""
    async with Client(pair.target) as client:
        made = [result for items in SIZES for result in await seeded(client, items)]
        other = await seeded(client, 1, seed=2)

    assert len(outputs(made)) == 1
    assert {result.output.seed for result in made} == {1}
    assert {result.output.grade for result in made} <= GRADES
    assert outputs(made) != outputs(other)


async def test_unseeded_answers_differ_at_every_batch_size(pair: Pair) -> None:
    """Without a seed no two answers are equal, within a batch and between batches, and each names the seed that repeats it."""
    hot = Sampling(temperature=1.5, max_new_tokens=TOKENS, ignore_eos=True)
    async with Client(pair.target) as client:
        made = [result for items in SIZES for result in (await client.generate([PROMPT] * items, **hot)).results]
        last = made[-1].output
        hot["seed"] = last.seed
        again = await client.generate(PROMPT, **hot)

    assert len({result.output.text for result in made}) == len(made)
    assert len({tuple(result.output.token_ids) for result in made}) == len(made)
    assert len({result.output.seed for result in made}) == len(made)
    assert again.results[0].output.token_ids == last.token_ids


async def test_traffic_does_not_change_an_answer(pair: Pair) -> None:
    """Among other requests of other lengths and parameters that start, stream and disconnect, the answer is the same."""
    number = random.randrange(2**32)
    print(f"seed {number}")
    rng = random.Random(number)
    async with Client(pair.target) as client:
        alone = await seeded(client, 1)

        async def needle() -> list[types_pb2.Result]:
            await asyncio.sleep(rng.uniform(0, 2))
            return await seeded(client, rng.randint(1, 2))

        load = [asyncio.create_task(_other_request(client, rng)) for _ in range(12)]
        made = [result for results in await asyncio.gather(*(needle() for _ in range(8))) for result in results]
        await asyncio.gather(*load)

    assert outputs(alone) == outputs(made)


async def _other_request(client: Client, rng: random.Random) -> None:
    await asyncio.sleep(rng.uniform(0, 2))
    stream = client.stream(
        "A stranger comes to town. " * rng.randint(1, 20),
        max_new_tokens=rng.randint(1, 24),
        temperature=rng.choice((0.0, 0.8, 1.5)),
        top_k=rng.choice((0, 1, 20)),
    )
    leaves = rng.random() < 0.4
    async with aclosing(stream):
        async for event in stream:
            if leaves and event.HasField("tokens"):
                return


async def test_a_restart_of_both_changes_nothing(pair: Pair) -> None:
    """The same request has the same answer from other processes, in the next epoch."""
    async with Client(pair.target) as client:
        before = await seeded(client, 3)
    await asyncio.to_thread(pair.stop)
    await asyncio.to_thread(start, pair)
    async with Client(pair.target) as client:
        after = await seeded(client, 3)

    assert outputs(before) == outputs(after)
    assert {result.receipt.header.epoch for result in (*before, *after)} == {1, 2}
    assert len({result.receipt.header.fingerprint_digest for result in (*before, *after)}) == 1
