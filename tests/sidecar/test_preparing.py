"""Requests to prepare and their answers, without a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2
from serving.hop import SHORT_BYTES, is_short

from sidecar.link import Preparing, check_prepared

DEEDS = ("ask", "ask", "leave", "take", "answer", "answer", "refuse", "answer again", "answer unsent", "lose")


def asked(text: str = "x", **parameters: object) -> engine_pb2.PrepareRequest:
    return engine_pb2.PrepareRequest(items=[types_pb2.Item(text=text, parameters=types_pb2.Parameters(**parameters))])  # type: ignore[arg-type]


def answer(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    """By which its request can be told."""
    item = engine_pb2.PreparedItem(token_ids=[1], parameters=types_pb2.ResolvedParameters(max_new_tokens=1))
    return engine_pb2.PrepareResponse(prepare_id=request.prepare_id, model_digest=request.items[0].text.encode(), items=[item])


def refusal(request: engine_pb2.PrepareRequest) -> engine_pb2.PrepareResponse:
    status = errors.to_status(errors.invalid("items[0].text", request.items[0].text))
    return engine_pb2.PrepareResponse(prepare_id=request.prepare_id, refused=status)


async def outcome(preparing: Preparing, name: str) -> str:
    """The end of the request of this name."""
    try:
        return "answered " + (await preparing.ask(asked(name), None)).model_digest.decode()
    except errors.InvalidRequest as error:
        return "refused " + error.violations[0].description
    except errors.EngineUnavailable:
        return "lost"


@given(st.lists(st.sampled_from(DEEDS), max_size=40), st.data())
def test_each_gets_its_own_answer(deeds: Sequence[str], data: st.DataObject) -> None:
    """Whatever is answered, refused, taken, given up or lost in whatever order, each caller gets the answer to its
    own request, once; what was given up is neither sent nor kept; and an answer to what was not sent is a violation."""

    async def play() -> None:
        preparing = Preparing()
        preparing.open = True
        tasks = dict[str, asyncio.Task[str]]()
        expected, unsent, out = dict[str, str](), list[str](), dict[str, engine_pb2.PrepareRequest]()
        settled = list[engine_pb2.PrepareRequest]()
        for number, deed in enumerate(deeds):
            waiting = [name for name in tasks if name not in expected]
            match deed:
                case "ask":
                    name = str(number)
                    tasks[name] = asyncio.create_task(outcome(preparing, name))
                    unsent.append(name)
                case "leave" if waiting:
                    name = data.draw(st.sampled_from(waiting))
                    tasks[name].cancel()
                    expected[name] = "gone"
                case "take":
                    sent = list(preparing.take(data.draw(st.integers(1, 60))))
                    names = [request.items[0].text for request in sent]
                    wanted = [name for name in unsent if name not in expected]
                    assert names == wanted[: len(names)]
                    assert names or not wanted
                    unsent = wanted[len(names) :]
                    out |= {request.items[0].text: request for request in sent}
                case "answer" | "refuse" if out:
                    name = data.draw(st.sampled_from(sorted(out)))
                    settled.append(request := out.pop(name))
                    preparing.settle([answer(request) if deed == "answer" else refusal(request)])
                    expected.setdefault(name, f"{deed}{'ed' if deed == 'answer' else 'd'} {name}")
                case "answer again" if settled:
                    preparing.settle([answer(data.draw(st.sampled_from(settled)))])
                case "answer unsent":
                    early = data.draw(st.sampled_from([engine_pb2.PrepareRequest(prepare_id=2**63), *preparing.unsent]))
                    with pytest.raises(errors.ProtocolViolation):
                        preparing.settle([engine_pb2.PrepareResponse(prepare_id=early.prepare_id)])
                case "lose":
                    preparing.lose()
                    expected |= dict.fromkeys(waiting, "lost")
                    unsent, out = [], {}
                    preparing.open = True
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(preparing._answers) == len(tasks.keys() - expected.keys())
        preparing.lose()
        told = dict[str, str]()
        for name, task in tasks.items():
            told[name] = "gone"
            with contextlib.suppress(asyncio.CancelledError):
                told[name] = await task
        assert told == dict.fromkeys(tasks, "lost") | expected
        assert not preparing.unsent

    asyncio.run(play())


async def test_a_deadline_that_passes() -> None:
    """The asker hears of it, and the request is not sent any more."""
    preparing = Preparing()
    preparing.open = True
    with pytest.raises(errors.DeadlineExceeded):
        await preparing.ask(asked(), 0.001)

    assert list(preparing.take(100)) == []


async def test_without_a_stream() -> None:
    """Before there is one, and after it, the service cannot be reached: at once, with a time to come back."""
    preparing = Preparing()
    for _ in range(2):
        with pytest.raises(errors.EngineUnavailable) as caught:
            await preparing.ask(asked(), None)
        assert caught.value.retry_after == 1.0
        preparing.open = True
        preparing.lose()


def test_what_has_a_call_of_its_own() -> None:
    """Much text, wherever it stands, many items or messages, and every grammar: what takes long would block the stream."""
    assert is_short(asked())
    assert is_short(asked("x" * (SHORT_BYTES - 60)))
    assert not is_short(asked("x" * SHORT_BYTES))
    assert not is_short(asked(stop=["x" * SHORT_BYTES]))
    for messages, short in ((31, True), (32, False)):
        chat = types_pb2.Chat(messages=[types_pb2.Message()] * messages)
        assert is_short(engine_pb2.PrepareRequest(items=[types_pb2.Item(chat=chat)])) == short
    for items, short in ((90, True), (100, False)):
        for kind in (engine_pb2.PrepareRequest, generation_pb2.TokenizeRequest):
            assert is_short(kind(items=[types_pb2.Item(text="x")] * items)) == short
    grammar = types_pb2.ResponseFormat(regex="a")
    assert not is_short(asked(response_format=grammar))
    assert not is_short(engine_pb2.PrepareRequest(parameters=types_pb2.Parameters(response_format=grammar)))


def test_a_preparation_that_cannot_be_numbered() -> None:
    """As many items as were asked for, each with tokens and room for an answer."""
    good = engine_pb2.PreparedItem(token_ids=[1], parameters=types_pb2.ResolvedParameters(max_new_tokens=1))
    check_prepared(engine_pb2.PrepareResponse(items=[good] * 2), 2)
    for bad in (
        None,
        engine_pb2.PrepareResponse(items=[good]),
        engine_pb2.PrepareResponse(items=[good] * 3),
        engine_pb2.PrepareResponse(items=[good, engine_pb2.PreparedItem(token_ids=[1])]),
        engine_pb2.PrepareResponse(items=[good, engine_pb2.PreparedItem(parameters=good.parameters)]),
    ):
        with pytest.raises(errors.ProtocolViolation):
            check_prepared(bad, 2)
