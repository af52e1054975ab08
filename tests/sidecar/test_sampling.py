"""How an item is sampled, in a line."""

from __future__ import annotations

import pytest

from ostinato.v1 import types_pb2

from sidecar.sampling import sampling

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
def test_only_what_is_chosen_is_said(given: dict[str, object], line: str) -> None:
    """Defaults, lengths and what greedy decoding ignores are left out; like items have like lines."""
    assert sampling(types_pb2.ResolvedParameters(**(DEFAULTS | given))) == line  # type: ignore[arg-type]
