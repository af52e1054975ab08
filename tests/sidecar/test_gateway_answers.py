"""Our events as a gateway's messages: what is sent, in which order, and what becomes of what cannot be said."""

from __future__ import annotations

from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from ostinato import errors
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.gateway.answers import RECEIPT_METADATA, RECEIPTS_MAX, STAMP_METADATA, Answer
from tests.sidecar.held_kit import account

Event = generation_pb2.GenerateEvent


class Wire:
    """gRPC's context, as far as an answer uses it."""

    def __init__(self) -> None:
        self.sent: list[vllm.GenerateResponse] = []
        self.trailers: list[tuple[str, bytes]] = []

    async def write(self, message: vllm.GenerateResponse | bytes) -> None:
        self.sent.append(vllm.GenerateResponse.FromString(message) if isinstance(message, bytes) else message)

    def set_trailing_metadata(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.trailers = list(metadata)

    def receipts(self) -> list[int]:
        """The sequences whose receipts are in the trailers."""
        found = [types_pb2.Receipt.FromString(value) for key, value in self.trailers if key == RECEIPT_METADATA]
        return [receipt.header.sequence for receipt in found]


def answer(count: int = 1) -> tuple[Wire, Answer, types_pb2.Stamp]:
    wire: Any = Wire()
    return wire, Answer(wire, 3, lambda: 1.0, account()), types_pb2.Stamp(first_sequence=7, count=count)


def completed(sequence: int = 7, **output: Any) -> types_pb2.Result:
    made: dict[str, Any] = {"token_ids": [5, 6], "finish_reason": types_pb2.FINISH_REASON_LENGTH, "prompt_tokens": 3} | output
    header = types_pb2.EntryHeader(sequence=sequence, log_id="0" * 32, writer="w" * 128)
    for name in ("input_digest", "output_digest", "logprobs_digest", "fingerprint_digest", "payload_digest"):
        setattr(header, name, bytes(32))
    receipt = types_pb2.Receipt(header=header, previous_hash=bytes(32), entry_hash=bytes(32))
    return types_pb2.Result(sequence=sequence, output=types_pb2.Output(**made), receipt=receipt)


def failed(sequence: int, error: errors.OstinatoError) -> types_pb2.Result:
    return types_pb2.Result(sequence=sequence, status=errors.to_status(error))


def tokens(sequence: int, first: int, ids: list[int], **more: Any) -> Event:
    run = generation_pb2.TokenRun(sequence=sequence, first_token=first, token_ids=ids, **more)
    return Event(tokens=generation_pb2.Tokens(runs=[run]))


async def test_a_stream() -> None:
    """Tokens as they come, each with its item's index and the count so far, then one whole answer for each item."""
    wire, told, stamp = answer(2)
    await told.write(Event(admitted=generation_pb2.Admitted(stamp=stamp)).SerializeToString())
    await told.write(tokens(8, 0, [1]).SerializeToString())
    await told.write(tokens(7, 0, [5]).SerializeToString())
    await told.write(tokens(8, 1, [2, 3]).SerializeToString())
    await told.write(Event(finished=completed(8, token_ids=[1, 2, 3])).SerializeToString())
    await told.write(tokens(7, 1, [6]).SerializeToString())
    await told.write(Event(finished=completed(7)).SerializeToString())
    await told.end()

    chunks = [message.chunk for message in wire.sent if message.HasField("chunk")]
    assert [(chunk.index, list(chunk.token_ids), chunk.completion_tokens, chunk.prompt_tokens) for chunk in chunks] == [
        (1, [1], 1, 3),
        (0, [5], 1, 3),
        (1, [2, 3], 3, 3),
        (0, [6], 2, 3),
    ]
    ends = [message.complete for message in wire.sent[len(chunks) :]]
    assert [(end.index, list(end.output_ids), end.finish_reason) for end in ends] == [
        (0, [5, 6], "length"),
        (1, [1, 2, 3], "length"),
    ]
    assert wire.trailers[0] == (STAMP_METADATA, stamp.SerializeToString())
    assert wire.receipts() == [8, 7]


@pytest.mark.parametrize(
    ("output", "reason", "matched"),
    [
        ({"finish_reason": types_pb2.FINISH_REASON_END_OF_SEQUENCE}, "stop", None),
        ({"finish_reason": types_pb2.FINISH_REASON_LENGTH}, "length", None),
        ({"finish_reason": types_pb2.FINISH_REASON_STOP_STRING, "matched_stop": "x"}, "stop", "x"),
        ({"finish_reason": types_pb2.FINISH_REASON_STOP_TOKEN}, "stop", 6),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
async def test_why_it_ended(output: dict[str, Any], reason: str, matched: str | int | None) -> None:
    """A stop says what it was."""
    wire, told, stamp = answer()
    await told.whole(generation_pb2.GenerateResponse(stamp=stamp, results=[completed(**output)]).SerializeToString())

    (end,) = (message.complete for message in wire.sent)
    which = end.WhichOneof("matched_stop")
    assert (end.finish_reason, getattr(end, which) if which else None) == (reason, matched)
    assert (end.prompt_tokens, end.completion_tokens) == (3, 2)


async def test_logprobs() -> None:
    """One for each token, with the likeliest beside it; none where none were asked for."""
    wire, told, stamp = answer()
    top = [types_pb2.TopLogprob(token_id=9, logprob=-0.5), types_pb2.TopLogprob(token_id=5, logprob=-1.0)]
    each = [types_pb2.TokenLogprobs(logprob=-1.0, top=top), types_pb2.TokenLogprobs(logprob=-2.0)]
    await told.write(Event(admitted=generation_pb2.Admitted(stamp=stamp)).SerializeToString())
    await told.write(tokens(7, 0, [5, 6], logprobs=each).SerializeToString())
    await told.write(Event(finished=completed(logprobs=each)).SerializeToString())
    await told.end()

    for message in (wire.sent[0].chunk, wire.sent[1].complete):
        found = message.output_logprobs
        assert (list(found.token_logprobs), list(found.token_ids)) == ([-1.0, -2.0], [5, 6])
        assert [(list(at.values), list(at.token_ids)) for at in found.top_logprobs] == [([-0.5, -1.0], [9, 5]), ([], [])]


async def test_a_failed_item_fails_the_call() -> None:
    """With its own error, whichever item it is; the stamp goes out all the same, so that the others can be found."""
    wire, told, stamp = answer(2)
    results = [completed(7), failed(8, errors.EngineFailed("broke"))]
    with pytest.raises(errors.EngineFailed, match="broke"):
        await told.whole(generation_pb2.GenerateResponse(stamp=stamp, results=results).SerializeToString())

    assert wire.sent == []
    assert [key for key, _ in wire.trailers] == [STAMP_METADATA]


async def test_other_tokens_than_were_sent_fail_the_call() -> None:
    """They cannot be taken back here: nothing more is streamed, and the error says where the whole answer is."""
    wire, told, stamp = answer()
    await told.write(Event(admitted=generation_pb2.Admitted(stamp=stamp)).SerializeToString())
    await told.write(tokens(7, 0, [5]).SerializeToString())
    await told.write(Event(restarted=generation_pb2.Restarted(sequence=7, attempt=2)).SerializeToString())
    await told.write(tokens(7, 0, [4, 3]).SerializeToString())
    await told.write(Event(finished=completed(token_ids=[4, 3])).SerializeToString())
    with pytest.raises(errors.Abandoned, match="sequence 7"):
        await told.end()

    assert [list(message.chunk.token_ids) for message in wire.sent] == [[5]]
    assert [key for key, _ in wire.trailers] == [STAMP_METADATA]


@pytest.mark.parametrize(("count", "told"), [(RECEIPTS_MAX, RECEIPTS_MAX), (RECEIPTS_MAX + 1, 0)])
async def test_trailers_stay_small(count: int, told: int) -> None:
    """All receipts or, where they would not fit, none; the stamp says where they are."""
    wire, made, stamp = answer(count)
    response = generation_pb2.GenerateResponse(stamp=stamp, results=[completed(7 + index) for index in range(count)])
    await made.whole(response.SerializeToString())

    assert len(wire.receipts()) == told
    assert sum(len(key) + len(value) * 4 // 3 for key, value in wire.trailers) < 8192
