"""Grammars: answers follow them, alone and in batches; what cannot be obeyed is refused; and a dear one delays no others."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import grpc.aio

from ostinato.errors import InvalidRequest, from_rpc_error
from ostinato.v1 import types_pb2

from service import parse
from tests.gpu.compare import divergence, grade, introduce
from tests.gpu.fronts import Answers, ServiceFront
from tests.gpu.plan import Plan
from tests.gpu.prefix import alone
from tests.gpu.stack import running
from tests.gpu.traffic import Ask, ask_of, fillers, mixed

SEEDS = 3
"""Answers of each grammar."""
TOTAL, ROUNDS = 64, 2
NEW_TOKENS = 900
"""In a tag xgrammar allows white space anywhere in the JSON. At a high temperature a model with random weights leaves it again
after about 30 tokens each time; at a low one perhaps never."""
STREAMS, STREAM_TOKENS = 8, 400
GAP_SECONDS_MAX = 0.25
"""Between two tokens of other runs, while a dear grammar is refused."""
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}, "coast": {"type": "boolean"}},
    "required": ["city", "unit", "coast"],
    "additionalProperties": False,
}
ARGUMENTS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"city": SCHEMA["properties"]["city"]},
    "required": ["city"],
    "additionalProperties": False,
}
"""Of a tool."""
EBNF = 'root ::= item (", " item){1,4} "."\nitem ::= [A-Z] [a-z]{1,6} | [0-9]{1,3}'
_ITEM = r"([A-Z][a-z]{1,6}|\d{1,3})"
REGEX = r"[A-Z][a-z]{2,8}( [a-z]{2,8}){2,5}\."
HERMES, LLAMA = "<tool_call>", '{"name":'


def _tag(form: str, name: str) -> dict[str, Any]:
    """A call of a tool."""
    begin, key, end = ("<tool_call>\n", "arguments", "}\n</tool_call>") if form == HERMES else ("", "parameters", "}")
    opening = f'{begin}{{"name": "{name}", "{key}": '
    return {"type": "tag", "begin": opening, "content": {"type": "json_schema", "json_schema": dict(ARGUMENTS)}, "end": end}


def _triggered(form: str, **more: bool) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": [form], "tags": [_tag(form, "weather"), _tag(form, "tides")]} | more


def _structural(form: Mapping[str, Any]) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(structural_tag=json.dumps({"type": "structural_tag", "format": form}))


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether it is an object of SCHEMA or ARGUMENTS."""
    return (
        isinstance(value, dict)
        and value.keys() == schema["properties"].keys()
        and isinstance(value["city"], str)
        and len(value["city"]) <= 12
        and value.get("unit", "C") in ("C", "F")
        and isinstance(value.get("coast", True), bool)
    )


def _calls(form: parse.Form, *names: str, least: int = 1) -> Callable[[str], bool]:
    """At least so many calls of these tools, whose arguments fit, and nothing that looks like a call and is none."""

    def fits(text: str) -> bool:
        found = form(text)
        called = [call.name in names and _fits(json.loads(call.arguments), ARGUMENTS) for call in found.tool_calls]
        return not found.fault and len(called) >= least and all(called)

    return fits


def _matching(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.DOTALL) is not None


def cases() -> Mapping[str, tuple[types_pb2.ResponseFormat, Callable[[str], bool]]]:
    """By name a grammar, and whether a text follows it. All but `auto` end by themselves."""
    forced = {"at_least_one": True, "stop_after_first": True}
    return {
        "json schema": (
            types_pb2.ResponseFormat(json_schema=json.dumps(SCHEMA)), lambda text: _fits(json.loads(text), SCHEMA),
        ),
        "regex": (types_pb2.ResponseFormat(regex=REGEX), _matching(REGEX)),
        "ebnf": (types_pb2.ResponseFormat(ebnf=EBNF), _matching(rf"{_ITEM}(, {_ITEM}){{1,4}}\.")),
        "hermes auto": (_structural(_triggered(HERMES)), _calls(parse.hermes, "weather", "tides", least=0)),
        "hermes required": (_structural(_triggered(HERMES, **forced)), _calls(parse.hermes, "weather", "tides")),
        "hermes named": (_structural(_tag(HERMES, "tides")), _calls(parse.hermes, "tides")),
        "llama required": (_structural(_triggered(LLAMA, **forced)), _calls(parse.llama, "weather", "tides")),
        "llama named": (_structural(_tag(LLAMA, "tides")), _calls(parse.llama, "tides")),
        "steps": (
            _structural({"type": "sequence", "elements": [
                {"type": "const_string", "value": "Unit: "},
                {"type": "or", "elements": [{"type": "regex", "pattern": "[CF]"}, {"type": "const_string", "value": "none"}]},
            ]}),
            _matching("Unit: ([CF]|none)"),
        ),
    }  # fmt: skip


def refusals() -> Mapping[str, tuple[types_pb2.ResponseFormat, str]]:
    """By name a grammar that Prepare must refuse, and a pattern of the reason."""
    grammar = types_pb2.ResponseFormat
    return {
        "a syntax error": (grammar(ebnf='root ::= "a'), "cannot be obeyed: "),
        "an empty grammar": (grammar(ebnf=""), "must be 1 to"),
        "no root rule": (grammar(ebnf='other ::= "a"'), "cannot be obeyed: .*root"),
        "an unknown rule": (grammar(ebnf="root ::= other"), "cannot be obeyed: .*other"),
        "100,000 characters": (grammar(ebnf='root ::= "' + "a" * 100_000 + '"'), "must be 1 to 65536 bytes"),
        "an unknown format": (_structural({"type": "poem"}), "cannot be obeyed: "),
        "an endless rule": (grammar(ebnf="root ::= root"), "allows no answer"),
        "a lookahead": (grammar(regex="(?=a)b"), "cannot be obeyed: "),
        "no JSON": (grammar(json_schema='{"type": "object"'), "is not JSON"),
    }


TYPES = ("string", "integer", "boolean")
DEAR = {
    "a long string": types_pb2.ResponseFormat(json_schema='{"type": "array", "items": {"type": "string", "maxLength": 20000}}'),
    "2,000 properties": types_pb2.ResponseFormat(
        json_schema=json.dumps({"type": "object", "properties": {f"p{i}": {"type": TYPES[i % 3]} for i in range(2000)}})
    ),
    "what is dear to follow": types_pb2.ResponseFormat(ebnf='root ::= root root | [a-z] | ""'),
}
COST = r"takes more than .* s of processor time|takes more than \d+ MiB"


def _ask(name: str, grammar: types_pb2.ResponseFormat, seed: int) -> Ask:
    given = {"max_new_tokens": NEW_TOKENS, "temperature": 5.0, "top_k": 0, "logprobs": 5, "response_format": grammar}
    return ask_of(f"{name} {seed}", "The weather in Shanghai:", seed=seed, **given)


async def refused(front: ServiceFront, grammar: types_pb2.ResponseFormat) -> str:
    """Why Prepare refuses a grammar, if it names the field; else empty."""
    try:
        await front._prepare([_ask("refused", grammar, 1).item])
    except grpc.aio.AioRpcError as failed:
        error = from_rpc_error(failed)
        if isinstance(error, InvalidRequest) and len(error.violations) == 1:
            field, why = error.violations[0]
            return why if field.startswith("items[0].parameters.response_format") else ""
    return ""


async def grammars(plan: Plan) -> None:
    """Answers, refusals and dear grammars, of one model."""
    async with running(plan.model, plan.state, *plan.flags, engine=plan.engine) as stack:
        model = await introduce(stack, "grammars")
        assert isinstance(stack.front, ServiceFront), "the service is asked at its own stream"
        await _follow(stack.front, plan, model.context_tokens)
        for name, (grammar, wanted) in refusals().items():
            why = await refused(stack.front, grammar)
            if not re.search(wanted, why):
                plan.bad.append(f"grammars: {name} is not refused as such: {why!r}")
            plan.tell(f"grammars {name}: {why[:150]}")
        await _dear(stack.front, plan)
        if (after := await stack.front.describe()).grade != model.grade:
            plan.bad.append(f"grammars: the grade was lost on the way: {grade(after)}: {after.grade_reason}")


async def _follow(front: ServiceFront, plan: Plan, context_tokens: int) -> None:
    given = cases()
    asks = [_ask(name, grammar, seed) for name, (grammar, _) in given.items() for seed in range(SEEDS)]
    expected = await alone(front, asks)
    for ask in asks:
        answer, name = expected[ask.name], ask.name.rpartition(" ")[0]
        if why := _fault(answer, given[name][1], ends=name != "hermes auto"):
            plan.bad.append(f"grammars: {ask.name}: {why}")
    cells = [_cell("alone again", expected, await alone(front, asks), plan)]
    for number in range(ROUNDS):
        found = await front.ask(mixed(asks, TOTAL, 77 + number, context_tokens))
        cells.append(_cell(f"among {TOTAL}", expected, found, plan))
    plan.tell(f"grammars {len(given)} of them, {len(asks)} answers follow them; {'; '.join(cells)}")


def _fault(answer: object, fits: Callable[[str], bool], *, ends: bool) -> str:
    if not isinstance(answer, types_pb2.Output):
        return str(answer)[:300]
    if ends and answer.finish_reason == types_pb2.FINISH_REASON_LENGTH:
        return f"does not end: {answer.text!r}"
    try:
        return "" if fits(answer.text) else f"does not follow its grammar: {answer.text!r}"
    except ValueError as error:
        return f"{error}: {answer.text!r}"


def _cell(what: str, expected: Answers, found: Answers, plan: Plan) -> str:
    tokens, bits = divergence(expected, found, list(expected))
    if tokens or bits:
        plan.bad.append(f"grammars: {what}: {len(tokens)}+{len(bits)} diverged {(tokens + bits)[:6]}")
    return f"{what} {len(tokens)}+{len(bits)} differ"


async def _dear(front: ServiceFront, plan: Plan) -> None:
    """Refused with their cost, while streams go on and another grammar is checked."""
    cheap = types_pb2.ResponseFormat(regex=f"[a-z]{{3}}{time.time_ns()}")
    for name, grammar in DEAR.items():
        streams = asyncio.create_task(front.ask(fillers(STREAMS, STREAM_TOKENS), stream=True))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        why, other = await asyncio.gather(refused(front, grammar), _seconds(front, cheap))
        seconds = time.monotonic() - began
        await streams
        gap = max(after - before for times in front.arrivals.values() for before, after in pairwise(times))
        plan.tell(
            f"grammars {name}: {why} after {seconds:.2f} s; meanwhile {1000 * gap:.0f} ms between two tokens of"
            f" {STREAMS} streams, another grammar ready after {other:.2f} s"
        )
        if not re.search(COST, why):
            plan.bad.append(f"grammars: {name} is not refused with its cost: {why!r}")
        if gap > GAP_SECONDS_MAX:
            plan.bad.append(f"grammars: {name} delays others by {1000 * gap:.0f} ms")


async def _seconds(front: ServiceFront, grammar: types_pb2.ResponseFormat) -> float:
    began = time.monotonic()
    await front._prepare([_ask("cheap", grammar, 1).item])
    return time.monotonic() - began
