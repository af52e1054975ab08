"""A gateway's request as ours: mapped, or refused by the gateway's name for it."""

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

from sidecar.gateway.sampling import OF_THE_TEXT, PARAMETERS, SEED_MAX, in_their_words, request_of

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
    """The fields that it is refused for."""
    with pytest.raises(errors.InvalidRequest) as caught:
        mapped(request)
    return [violation.field for violation in caught.value.violations]


def test_a_request_that_says_nothing() -> None:
    """Is one item of those tokens, sampled by our defaults, with no seed: it will be given one."""
    made = mapped(asked())

    assert made == generation_pb2.GenerateRequest(
        items=[types_pb2.Item(token_ids=types_pb2.TokenIds(ids=[1, 2]))],
        parameters=types_pb2.Parameters(top_p=1, repetition_penalty=1),
        request_id="r",
    )


def test_every_parameter_is_mapped() -> None:
    """Each to the one that means the same."""
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
    ],
)
def test_constraints(constraint: dict[str, Any], format_: types_pb2.ResponseFormat | None) -> None:
    """A regular expression, and any JSON object at all."""
    parameters = mapped(asked(**constraint)).parameters

    assert parameters.HasField("response_format") == (format_ is not None)
    assert format_ is None or parameters.response_format == format_


def test_a_zero_that_may_be_meant_is_kept() -> None:
    """Temperature 0 is greedy, and no tokens at all is for the service to refuse; top_p 0 is what an unset field reads as."""
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
    "grammar": "root ::= 'a'",
    "structural_tag": "{}",
    "choice": vllm.ChoiceConstraint(choices=["a"]),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused(name: str) -> None:
    """By name, and never dropped: the answer would not be the one that was asked for."""
    assert refused(asked(**{name: UNSUPPORTED[name]})) == [f"sampling_params.{name}"]


def test_every_field_of_the_gateway_s_is_known() -> None:
    """A parameter that a newer package brings is refused until somebody has decided what it means."""
    names = {field.name for field in vllm.SamplingParams.DESCRIPTOR.fields}

    assert names == {*PARAMETERS, *OF_THE_TEXT, *UNSUPPORTED, "n"}


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
def test_what_is_no_text_is_refused(more: dict[str, Any]) -> None:
    """Pictures, and work that is split between engines."""
    request = asked()
    request.MergeFrom(vllm.GenerateRequest(**more))

    assert refused(request) == list(more)


def test_a_prompt_may_be_text_and_must_be_there() -> None:
    """Text is for the service to tokenise; with neither there is nothing to answer."""
    assert mapped(vllm.GenerateRequest(text="hi")).items[0].text == "hi"
    assert refused(vllm.GenerateRequest()) == ["tokenized"]


@given(st.integers(-(2**63), 2**64))
def test_a_seed_is_the_caller_s_or_refused(seed: int) -> None:
    """Whatever was asked for, cut down as the gateway does it, comes out as what it was or is refused."""
    cut = min(max(seed, -(2**31)), 2**31 - 1)
    if 0 <= seed <= SEED_MAX:
        assert [item.parameters.seed for item in mapped(asked(seed=cut)).items] == [seed]
    else:
        assert refused(asked(seed=cut)) == ["sampling_params.seed"]


@given(st.integers(0, SEED_MAX), st.integers(0, 16))
def test_n_items_have_the_seeds_from_the_given_one_on(seed: int, n: int) -> None:
    """Item i of n has seed + i, also beyond what the gateway's field holds; 0 is one, as unset reads."""
    made = mapped(asked(seed=seed, n=n))

    assert [item.parameters.seed for item in made.items] == list(range(seed, seed + max(n, 1)))
    assert not any(item.parameters.HasField("seed") for item in mapped(asked(n=n)).items)


@given(st.floats(width=32) | st.decimals(0, 100, places=3).map(float))
@example(3.4028234663852886e38)
def test_a_number_is_read_as_it_was_written(value: float) -> None:
    """The same 32-bit number, in the shortest decimal: what a person would write comes back as it was."""
    (narrow,) = struct.unpack("f", struct.pack("f", value))
    read = mapped(asked(temperature=narrow)).parameters.temperature

    assert struct.pack("f", read) == struct.pack("f", narrow) or math.isnan(read)
    assert not math.isfinite(value) or len(repr(read)) <= len(repr(narrow))
    if value == round(value, 3) and abs(value) < 1000:
        assert read == value


def test_too_many_answers_are_refused_before_they_are_made() -> None:
    """n is bounded where it is read: two to the 32 items would not be."""
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
def test_a_refusal_is_in_the_gateway_s_words(ours: str, theirs: str) -> None:
    """What the service or the admission calls a field is called what the gateway sent."""
    told = in_their_words(errors.InvalidRequest(violations=[Violation(ours, "is wrong")]))

    assert isinstance(told, errors.InvalidRequest)
    assert told.violations == (Violation(theirs, "is wrong"),)
    assert told.message == f"{theirs}: is wrong"
