"""Requests of a gateway as ours, and our answers as the gateway's."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from ostinato import errors
from ostinato.errors import Violation
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.gateway import (
    IGNORED_PARAMETERS,
    PARAMETERS,
    RECEIPT_METADATA,
    RECEIPTS_MAX,
    SEED_MAX,
    STAMP_METADATA,
    GatewayAnswer,
    request_of,
    with_gateway_names,
)
from tests.sidecar.held_kit import account

Event = generation_pb2.GenerateEvent


class Wire:
    """Takes the place of gRPC's context."""

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


def answer(count: int = 1) -> tuple[Wire, GatewayAnswer, types_pb2.Stamp]:
    wire: Any = Wire()
    return wire, GatewayAnswer(wire, 3, lambda: 1.0, account()), types_pb2.Stamp(first_sequence=7, count=count)


def completed(sequence: int = 7, **output: Any) -> types_pb2.Result:
    made: dict[str, Any] = {"token_ids": [5, 6], "finish_reason": types_pb2.FINISH_REASON_LENGTH, "prompt_tokens": 3} | output
    header = types_pb2.EntryHeader(sequence=sequence, log_id="0" * 32, writer="w" * 128)
    for name in ("input_digest", "output_digest", "logprobs_digest", "fingerprint_digest", "payload_digest"):
        setattr(header, name, bytes(32))
    receipt = types_pb2.Receipt(header=header, previous_hash=bytes(32), entry_hash=bytes(32))
    return types_pb2.Result(sequence=sequence, output=types_pb2.Output(**made), receipt=receipt)


def admitted_of(stamp: types_pb2.Stamp) -> Event:
    return Event(admitted=generation_pb2.Admitted(stamp=stamp))


def tokens(sequence: int, first: int, ids: list[int], **more: Any) -> Event:
    run = generation_pb2.TokenRun(sequence=sequence, first_token=first, token_ids=ids, **more)
    return Event(tokens=generation_pb2.Tokens(runs=[run]))


async def write(answer: GatewayAnswer, *events: Event) -> None:
    for event in events:
        await answer.write(event.SerializeToString())


async def write_response(answer: GatewayAnswer, stamp: types_pb2.Stamp, *results: types_pb2.Result) -> None:
    await answer.write_response(generation_pb2.GenerateResponse(stamp=stamp, results=results).SerializeToString())


async def test_a_stream() -> None:
    """A stream has the tokens, with their item's index and the count so far, and then one complete answer per item."""
    wire, made, stamp = answer(2)
    await write(made, admitted_of(stamp), tokens(8, 0, [1]), tokens(7, 0, [5]), tokens(8, 1, [2, 3]))
    await write(made, Event(finished=completed(8, token_ids=[1, 2, 3])), tokens(7, 1, [6]), Event(finished=completed(7)))
    await made.end()

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
    """An answer has the finish reason, and what stopped it."""
    wire, made, stamp = answer()
    await write_response(made, stamp, completed(**output))

    (end,) = (message.complete for message in wire.sent)
    which = end.WhichOneof("matched_stop")
    assert (end.finish_reason, getattr(end, which) if which else None) == (reason, matched)
    assert (end.prompt_tokens, end.completion_tokens) == (3, 2)


async def test_logprobs() -> None:
    """Logprobs are passed on, one per token with the likeliest tokens."""
    wire, made, stamp = answer()
    top = [types_pb2.TopLogprob(token_id=9, logprob=-0.5), types_pb2.TopLogprob(token_id=5, logprob=-1.0)]
    each = [types_pb2.TokenLogprobs(logprob=-1.0, top=top), types_pb2.TokenLogprobs(logprob=-2.0)]
    await write(made, admitted_of(stamp), tokens(7, 0, [5, 6], logprobs=each), Event(finished=completed(logprobs=each)))
    await made.end()

    for message in (wire.sent[0].chunk, wire.sent[1].complete):
        found = message.output_logprobs
        assert (list(found.token_logprobs), list(found.token_ids)) == ([-1.0, -2.0], [5, 6])
        assert [(list(at.values), list(at.token_ids)) for at in found.top_logprobs] == [([-0.5, -1.0], [9, 5]), ([], [])]


async def test_a_failed_item_fails_the_call() -> None:
    """The call fails with the error of the failed item. The trailers have the stamp, so that the other items can be found."""
    wire, made, stamp = answer(2)
    broken = types_pb2.Result(sequence=8, status=errors.to_status(errors.EngineFailed("broke")))
    with pytest.raises(errors.EngineFailed, match="broke"):
        await write_response(made, stamp, completed(7), broken)

    assert wire.sent == []
    assert [key for key, _ in wire.trailers] == [STAMP_METADATA]


async def test_other_tokens_than_were_sent_fail_the_call() -> None:
    """After a restart with other tokens nothing more is streamed, and the error says where the whole answer is."""
    wire, made, stamp = answer()
    restarted = Event(restarted=generation_pb2.Restarted(sequence=7, attempt=2))
    await write(made, admitted_of(stamp), tokens(7, 0, [5]), restarted, tokens(7, 0, [4, 3]))
    await write(made, Event(finished=completed(token_ids=[4, 3])))
    with pytest.raises(errors.Abandoned, match="sequence 7"):
        await made.end()

    assert [list(message.chunk.token_ids) for message in wire.sent] == [[5]]
    assert [key for key, _ in wire.trailers] == [STAMP_METADATA]


@pytest.mark.parametrize(
    ("count", "path", "translated"), [(RECEIPTS_MAX, 0, RECEIPTS_MAX), (RECEIPTS_MAX + 1, 0, 0), (4, 16, 4), (8, 16, 0)]
)
async def test_trailers_stay_small(count: int, path: int, translated: int) -> None:
    """The trailers have all receipts or, if these would not fit, none; a path of a signed head may be long."""
    wire, made, stamp = answer(count)
    results = [completed(7 + index) for index in range(count)]
    for result in results:
        result.receipt.path.extend([bytes(32)] * path)
    await write_response(made, stamp, *results)

    assert len(wire.receipts()) == translated
    assert sum(len(key) + len(value) * 4 // 3 for key, value in wire.trailers) < 8192


DEFAULTS: dict[str, Any] = {
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "n": 1,
}
"""What the gateway sends for a request that says nothing."""


def asked(**parameters: Any) -> vllm.GenerateRequest:
    given = vllm.SamplingParams(**(DEFAULTS | parameters))
    return vllm.GenerateRequest(request_id="r", tokenized=vllm.TokenizedInput(input_ids=[1, 2]), sampling_params=given)


def mapped(request: vllm.GenerateRequest) -> generation_pb2.GenerateRequest:
    return request_of(request, items_max=16)


def refused(request: vllm.GenerateRequest) -> list[str]:
    """The fields for which it is refused."""
    with pytest.raises(errors.InvalidRequest) as caught:
        mapped(request)
    return [violation.field for violation in caught.value.violations]


def test_a_request_with_defaults() -> None:
    """A request with defaults becomes one item with those tokens, our defaults and no seed."""
    made = mapped(asked())

    assert made == generation_pb2.GenerateRequest(
        items=[types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[1, 2]))],
        parameters=types_pb2.Parameters(top_p=1, repetition_penalty=1),
        request_id="r",
    )


def test_every_parameter_is_mapped() -> None:
    """Each supported parameter becomes ours of the same meaning."""
    made = mapped(
        asked(
            temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, max_tokens=7, min_tokens=2,
            stop=["a", "b"], stop_token_ids=[3], ignore_eos=True, logprobs=4, json_schema='{"type":"string"}',
        )
    )  # fmt: skip

    assert made.parameters == types_pb2.Parameters(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=7,
        min_new_tokens=2,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=4,
        response_format=types_pb2.ResponseFormat(json_schema='{"type":"string"}'),
    )


@pytest.mark.parametrize(
    ("constraint", "format_"),
    [
        ({"regex": "a+"}, types_pb2.ResponseFormat(regex="a+")),
        ({"json_object": True}, types_pb2.ResponseFormat(json_schema='{"type":"object"}')),
        ({"json_object": False}, None),
        ({"grammar": "root ::= 'a'"}, types_pb2.ResponseFormat(ebnf="root ::= 'a'")),
        ({"structural_tag": "{}"}, types_pb2.ResponseFormat(structural_tag="{}")),
        ({"choice": vllm.ChoiceConstraint(choices=["a.b c", "d|e"])}, types_pb2.ResponseFormat(regex=r"a\.b c|d\|e")),
    ],
)
def test_constraints(constraint: dict[str, Any], format_: types_pb2.ResponseFormat | None) -> None:
    """Each constraint becomes a response format."""
    parameters = mapped(asked(**constraint)).parameters

    assert parameters.HasField("response_format") == (format_ is not None)
    assert format_ is None or parameters.response_format == format_


def test_a_zero_that_may_be_meant_is_kept() -> None:
    """Zeros of fields with presence are kept; a zero that means "unset" is left out."""
    made = mapped(asked(temperature=0.0, max_tokens=0, top_p=0.0, repetition_penalty=0.0)).parameters

    assert made.HasField("temperature") and made.temperature == 0
    assert made.HasField("max_new_tokens") and made.max_new_tokens == 0
    assert not made.HasField("top_p") and not made.HasField("repetition_penalty")


UNSUPPORTED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "prompt_logprobs": 0,
    "include_stop_str_in_output": True,
    "logit_bias": {5: 1.0},
    "truncate_prompt_tokens": 3,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_parameters_are_refused(name: str) -> None:
    """An unsupported parameter is refused by name, and not ignored."""
    assert refused(asked(**{name: UNSUPPORTED[name]})) == [f"sampling_params.{name}"]


def test_every_parameter_is_known() -> None:
    """Every parameter of the installed package is either supported, ignored on purpose, or refused."""
    names = {field.name for field in vllm.SamplingParams.DESCRIPTOR.fields}

    assert names == {*PARAMETERS, *IGNORED_PARAMETERS, *UNSUPPORTED, "n"}


@pytest.mark.parametrize(
    "more",
    [
        {"kv_transfer_params": vllm.KvTransferParams(remote_port=1)},
        {"kv_transfer_params_json": "{}"},
        {"mm_inputs": vllm.MultimodalInputs(mm_hashes=["a"])},
        {"extra_mm_inputs": [vllm.MultimodalInputs()]},
        {"media_refs": vllm.MediaRefs()},
        {"data_parallel_rank": 1},
    ],
    ids=lambda more: next(iter(more)),
)
def test_unsupported_requests_are_refused(more: dict[str, Any]) -> None:
    """Images, and requests that are split between engines, are refused."""
    request = asked()
    request.MergeFrom(vllm.GenerateRequest(**more))

    assert refused(request) == list(more)


def test_a_prompt_may_be_text_and_must_be_there() -> None:
    """A prompt may be text. A request without a prompt is refused."""
    assert mapped(vllm.GenerateRequest(text="hi")).items[0].text == "hi"
    assert refused(vllm.GenerateRequest()) == ["tokenized"]


@given(st.integers(-(2**63), 2**64))
def test_a_seed_is_the_caller_s_or_refused(seed: int) -> None:
    """A seed that the gateway has clamped is refused; any other is the caller's."""
    cut = min(max(seed, -(2**31)), 2**31 - 1)
    if 0 <= seed <= SEED_MAX:
        assert [item.parameters.seed for item in mapped(asked(seed=cut)).items] == [seed]
    else:
        assert refused(asked(seed=cut)) == ["sampling_params.seed"]


@given(st.integers(0, SEED_MAX), st.integers(0, 16))
def test_n_items_have_the_seeds_from_the_given_one_on(seed: int, n: int) -> None:
    """Item i of n has seed + i, also beyond the range of the gateway's field. n = 0 means 1."""
    made = mapped(asked(seed=seed, n=n))

    assert [item.parameters.seed for item in made.items] == list(range(seed, seed + max(n, 1)))
    assert not any(item.parameters.HasField("seed") for item in mapped(asked(n=n)).items)


@given(st.floats(width=32) | st.decimals(0, 100, places=3).map(float))
@example(3.4028234663852886e38)
def test_a_number_is_read_as_it_was_written(value: float) -> None:
    """A 32-bit number is read as the shortest decimal with its value."""
    (narrow,) = struct.unpack("f", struct.pack("f", value))
    read = mapped(asked(temperature=narrow)).parameters.temperature

    assert struct.pack("f", read) == struct.pack("f", narrow) or math.isnan(read)
    assert not math.isfinite(value) or len(repr(read)) <= len(repr(narrow))
    if value == round(value, 3) and abs(value) < 1000:
        assert read == value


def test_too_many_answers_are_refused_before_they_are_made() -> None:
    """n is checked before items are created."""
    assert refused(asked(n=17)) == ["sampling_params.n"]
    assert refused(asked(n=2**32 - 1)) == ["sampling_params.n"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("parameters.max_new_tokens", "sampling_params.max_tokens"),
        ("parameters.stop[3]", "sampling_params.stop[3]"),
        ("parameters.stop_token_ids[3]", "sampling_params.stop_token_ids[3]"),
        ("parameters.response_format.json_schema", "sampling_params.json_schema"),
        ("items[0].parameters.min_new_tokens", "sampling_params.min_tokens"),
        ("items[2].token_ids.ids[7]", "tokenized.input_ids"),
        ("items[0]", "tokenized.input_ids"),
        ("items", "sampling_params.n"),
        ("request_id", "request_id"),
    ],
)
def test_a_refusal_has_the_gateway_s_names(ours: str, theirs: str) -> None:
    """A refused field is named as the gateway names it."""
    translated = with_gateway_names(errors.InvalidRequest(violations=[Violation(ours, "is wrong")]))

    assert isinstance(translated, errors.InvalidRequest)
    assert translated.violations == (Violation(theirs, "is wrong"),)
    assert translated.message == f"{theirs}: is wrong"
