"""A run's parameters in TurboMind's form, with a case for everything that TurboMind would misread."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import InvalidRequest
from ostinato.v1 import types_pb2

from service.engines.turbomind.request import ALMOST_ONE, IDS_MAX, NO_TOKEN, Request, request_of

ENDS = frozenset({2, 7})


def asked(*, seed: int = 1, stream: bool = False, end_ids: frozenset[int] = ENDS, **changes: Any) -> Request:
    given = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 8}
    return request_of(types_pb2.ResolvedParameters(**(given | changes)), seed, stream=stream, end_ids=end_ids)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 8}),
        ({"temperature": 0.0}, {"temperature": ALMOST_ONE, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.1}),
        ({"temperature": 1.0}, {"temperature": ALMOST_ONE, "top_k": 40}),
        ({"temperature": 1 + 1e-9}, {"temperature": ALMOST_ONE}),
        ({"temperature": 100.0, "top_k": 0}, {"temperature": 100.0, "top_k": 0}),
        ({"top_k": 1024}, {"top_k": 1024}),
        ({}, {"stop_ids": (2, 7), "eos_ids": (2, 7), "bad_ids": (), "each_step": False, "min_new_tokens": 0}),
        ({"stop_token_ids": [5, 7]}, {"stop_ids": (2, 5, 7), "eos_ids": (2, 7, 5), "each_step": False}),
        ({"ignore_eos": True}, {"stop_ids": (), "eos_ids": (2, 7), "bad_ids": (2, 7), "each_step": False}),
        ({"ignore_eos": True, "stop_token_ids": [5]}, {"stop_ids": (5,), "bad_ids": (2, 7), "each_step": False}),
        ({"ignore_eos": True, "bad_token_ids": [1, 7]}, {"bad_ids": (1, 7, 2)}),
        ({"bad_token_ids": [1, 9]}, {"bad_ids": (1, 9)}),
        ({"stream": True}, {"stop_ids": (2, 7), "each_step": True}),
        ({"stop": ["x"]}, {"stop_ids": (2, 7), "each_step": True}),
        ({"min_new_tokens": 3}, {"min_new_tokens": 4, "stop_ids": (), "eos_ids": (2, 7), "each_step": True}),
        ({"min_new_tokens": 3, "ignore_eos": True}, {"min_new_tokens": 4, "stop_ids": (), "each_step": False}),
        ({"end_ids": frozenset()}, {"stop_ids": (), "eos_ids": (NO_TOKEN,), "each_step": False}),
        ({}, {"output_logprobs": 0}),
        ({"logprobs": 0}, {"output_logprobs": 1}),
        ({"logprobs": 20}, {"output_logprobs": 20}),
        ({"seed": 0}, {"random_seed": 0}),
        ({"seed": 2**64 - 1}, {"random_seed": 2**64 - 1}),
    ],
)
def test_parameters_mean_to_turbomind_what_they_mean_to_us(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each parameter is translated as expected."""
    request = asked(**changes)

    assert {name: getattr(request, name) for name in expected} == expected


def test_more_stops_than_turbomind_takes_are_counted_here() -> None:
    """More stop tokens than TurboMind takes are not passed on; every step is reported instead."""
    request = asked(stop_token_ids=range(100, 100 + IDS_MAX))

    assert (request.stop_ids, request.each_step) == ((), True)
    assert len(request.eos_ids) == IDS_MAX


def test_more_forbidden_tokens_than_turbomind_takes_are_refused() -> None:
    """More forbidden tokens than TurboMind takes are refused."""
    with pytest.raises(InvalidRequest, match="come to 33 tokens") as caught:
        asked(bad_token_ids=range(33))

    assert [violation.field for violation in caught.value.violations] == ["parameters.bad_words"]


def test_ignored_ends_give_way_to_forbidden_tokens() -> None:
    """The caller's forbidden tokens come first; ignored ends are forbidden as far as there is room."""
    assert asked(ignore_eos=True, bad_token_ids=range(50, 81)).bad_ids == (*range(50, 81), 2)


@given(
    temperature=st.floats(0, 100, width=64),
    stops=st.frozensets(st.integers(0, 49_151), max_size=32),
    least=st.integers(0, 8),
    ignore=st.booleans(),
    ends=st.frozensets(st.integers(0, 49_151), max_size=5),
)
def test_no_request_can_lean_on_its_neighbours(
    temperature: float, stops: frozenset[int], least: int, ignore: bool, ends: frozenset[int]
) -> None:
    """The temperature is never exactly 1, there are always banned tokens, no list is too long, and a run that TurboMind does
    not end reports every step."""
    request = asked(
        temperature=temperature, stop_token_ids=sorted(stops), min_new_tokens=least, ignore_eos=ignore, end_ids=ends
    )
    wanted = stops | (frozenset() if ignore else ends)

    assert struct.unpack("f", struct.pack("f", request.temperature))[0] != 1
    assert 1 <= len(request.eos_ids) <= IDS_MAX
    assert max(len(request.stop_ids), len(request.bad_ids)) <= IDS_MAX
    assert request.each_step or set(request.stop_ids) == wanted
