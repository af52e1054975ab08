"""An OpenAI client, a real gateway and a real sidecar: what is passed on, what is refused, and what the journal has."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ostinato.client import Client
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.kit import Door, counted, opened, own, rule, scripted
from tests.gateway import Gateway
from tests.pair import Pair, running_pair
from tests.service.llama_kit import LACKING
from tests.waiting import eventually

HANG_AT = 3000
"""No answer gets beyond this token, so a client that disconnects does so before the end."""
QUEUE_ITEMS = 8
HANGING = {"rules": [rule("hang", HANG_AT)]}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", name="behind")
def _behind() -> Iterator[tuple[Pair, Gateway]]:
    sidecar = ["--vllm-face", "--queue-items-max", str(QUEUE_ITEMS)]
    with running_pair(service=scripted(**HANGING), sidecar=sidecar) as pair, Gateway(pair.target) as gateway:
        gateway.model()
        yield pair, gateway


@contextlib.asynccontextmanager
async def client(pair: Pair) -> AsyncIterator[tuple[openai.AsyncOpenAI, str]]:
    """A client of a new gateway before this pair, and the model's name."""
    with Gateway(pair.target) as gateway:
        model = gateway.model()
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key="none", max_retries=0) as api:
            yield api, model


@pytest.fixture(name="api")
async def _api(behind: tuple[Pair, Gateway]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=behind[1].url, api_key="none", max_retries=0) as api:
        yield api


@pytest.fixture(name="door")
async def _door(behind: tuple[Pair, Gateway]) -> AsyncIterator[Door]:
    async with opened(behind[0]) as door:
        yield door


async def records(door: Door, after: int, prefix: str) -> list[sequencer_pb2.ItemRecord]:
    """The records after sequence `after`, all of the HTTP response with this id."""
    last = await door.last_sequence()
    found = [record for number in range(after + 1, last + 1) for record in await door.client.get(number)]
    assert [record for record in found if not record.input.request_id.startswith(prefix)] == []
    return found


async def test_a_completion(api: openai.AsyncOpenAI, door: Door) -> None:
    """Text, finish reason and usage are those of the recorded item, which has the caller's parameters, seed and request id."""
    before = await door.last_sequence()
    made = await api.completions.create(
        model="scripted", prompt="one", max_tokens=12, seed=7, temperature=0.7, extra_headers={"X-Request-Id": "mine"}
    )
    (record,) = await records(door, before, "mine")

    output, parameters = record.result.output, record.input.parameters
    assert (made.choices[0].text, made.choices[0].finish_reason) == (output.text, "length")
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (output.prompt_tokens, len(output.token_ids))
    assert (record.input.seed, record.input.seed_derived) == (7, False)
    assert (parameters.temperature, parameters.max_new_tokens) == (0.7, 12)
    assert made.id == record.input.request_id


async def test_a_chat_is_the_service_s_own(api: openai.AsyncOpenAI, door: Door) -> None:
    """The gateway tokenises a chat as the service does: the two items are twins, and equal, in journal and metrics."""
    before, matches = await door.last_sequence(), counted(door.pair, "twin")["match"]
    made = await api.chat.completions.create(model="scripted", messages=HELLO, max_tokens=12, seed=7, temperature=0.7)
    (record,) = await records(door, before, made.id)
    chat = types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user", content="hello")]))
    ours = await door.client.generate(chat, max_new_tokens=12, seed=7, temperature=0.7)

    assert made.choices[0].message.content == ours.results[0].output.text
    assert list(record.input.token_ids) == list((await door.client.get(before + 2))[0].input.token_ids)
    assert await twin(door, before + 2) == (types_pb2.VERDICT_MATCH, before + 1)
    await eventually(lambda: counted(door.pair, "twin")["match"] == matches + 1, "it is counted")


async def test_a_batch_of_prompts(api: openai.AsyncOpenAI, door: Door) -> None:
    """Each prompt is one call with n items, whose seeds count up from the given one; choices are in order."""
    before = await door.last_sequence()
    made = await api.completions.create(model="scripted", prompt=["a", "b", "a"], n=2, max_tokens=9, seed=2**31 - 2)
    found = await records(door, before, made.id)

    assert [choice.index for choice in made.choices] == list(range(6))
    seeds: dict[bytes, list[int]] = {}
    for record in found:
        seeds.setdefault(bytes(record.input.token_ids), []).append(record.input.seed)
    assert {prompt: sorted(of) for prompt, of in seeds.items()} == {
        b"a": [2**31 - 2, 2**31 - 2, 2**31 - 1, 2**31 - 1],
        b"b": [2**31 - 2, 2**31 - 1],
    }
    texts = [choice.text for choice in made.choices]
    assert texts[0:2] == texts[4:6] and texts[0] != texts[1]


async def test_a_stream(api: openai.AsyncOpenAI) -> None:
    """The pieces of a streamed chat join to the text of an unstreamed one; usage comes last."""
    whole = await api.chat.completions.create(model="scripted", messages=HELLO, max_tokens=60, seed=5, stop=["q"])
    stream = await api.chat.completions.create(
        model="scripted", messages=HELLO, max_tokens=60, seed=5, stop=["q"], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [whole.usage.total_tokens]


async def test_a_stop_string(api: openai.AsyncOpenAI) -> None:
    """A stop string ends the answer before it, streamed or not."""
    free = (await api.completions.create(model="scripted", prompt="stop", max_tokens=60, seed=3)).choices[0].text
    stop = free[20:22]
    cut = await api.completions.create(model="scripted", prompt="stop", max_tokens=60, seed=3, stop=stop)
    stream = await api.completions.create(model="scripted", prompt="stop", max_tokens=60, seed=3, stop=stop, stream=True)
    pieces = [choice.text async for chunk in stream for choice in chunk.choices]

    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (free[: free.index(stop)], "stop")
    assert "".join(pieces) == cut.choices[0].text


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"prompt": ""}, "input_ids"),
    ],
    ids=str,
)
async def test_what_is_refused(api: openai.AsyncOpenAI, door: Door, parameters: dict[str, Any], field: str) -> None:
    """A bad parameter is status 400 with the gateway's name of the field; it uses no sequence and is counted."""
    refusals = 'ostinato_refused_requests_total{reason="INVALID_REQUEST"}'
    before = door.pair.metrics().get(refusals, 0)
    async with door.nothing_numbered():
        with pytest.raises(openai.BadRequestError, match=field):
            await api.completions.create(**({"model": "scripted", "prompt": "x"} | parameters))
    await eventually(lambda: door.pair.metrics()[refusals] == before + 1, "it is counted")


async def test_what_the_gateway_loses(api: openai.AsyncOpenAI, door: Door) -> None:
    """The gateway still drops the fields that docs/using.md lists, and changes a bare prompt as described there."""
    before = await door.last_sequence()
    made = await api.completions.create(
        model="scripted",
        prompt="a<|end|>b",
        max_tokens=3,
        logprobs=1,
        best_of=3,
        logit_bias={"97": 5},
        extra_headers={"X-Request-Id": "x"},
    )
    (record,) = await records(door, before, "x")
    ours = await door.client.generate("a<|end|>b", max_new_tokens=1)
    (own,) = await door.client.get(ours.stamp.first_sequence)

    assert made.choices[0].logprobs is None and len(record.result.output.logprobs) == 3
    assert list(record.input.token_ids) == [97, 256, 98]
    assert list(own.input.token_ids) == [257, *b"a<|end|>b"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_disconnected_client_stops_the_run(api: openai.AsyncOpenAI, door: Door, streamed: bool) -> None:
    """If a client disconnects before the end, the run stops, and journal and metrics have CANCELLED."""
    cancelled = 'ostinato_ended_items_total{outcome="cancelled",reason="CANCELLED"}'
    before, sequence = door.pair.metrics().get(cancelled, 0), await door.last_sequence() + 1
    asking = api.completions.create(
        model="scripted", prompt="long", max_tokens=HANG_AT + 500, extra_body={"ignore_eos": True}, stream=streamed
    )
    if streamed:
        stream: Any = await asking
        await anext(aiter(stream))
        await stream.close()
    else:
        waiting = asyncio.ensure_future(asking)
        service = door.pair.service
        await eventually(lambda: door.pair.metrics(service)["ostinato_engine_runs_in_flight"] == 1, "it runs")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    assert await door.outcome(sequence) == ("CANCELLED", "CANCELLED")
    await door.freed()
    await eventually(lambda: door.pair.metrics()[cancelled] == before + 1, "it is counted")


async def test_a_full_queue_is_429(api: openai.AsyncOpenAI, door: Door) -> None:
    """QUEUE_FULL arrives as status 429."""
    async with door.nothing_numbered():
        with pytest.raises(openai.RateLimitError):
            await api.completions.create(model="scripted", prompt="x", n=QUEUE_ITEMS + 1)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


async def test_tools_of_a_chat() -> None:
    """A call that the model chooses reaches the client, streamed or not; asked twice with a seed it is the same, and the twin
    matches. Tools and arguments of the template are in the prompt."""
    # By this name the gateway knows the form of calls.
    async with own("--vllm-face", model="Qwen3-scripted", says=CALL) as door, client(door.pair) as (api, model):
        asked: Any = {"model": model, "messages": HELLO, "tools": TOOLS, "seed": 5, "max_tokens": 200}
        asked["extra_body"] = {"chat_template_kwargs": {"prefix": "<think></think>"}}
        made = [await api.chat.completions.create(**asked, tool_choice="auto") for _ in range(2)]
        chunks = [chunk async for chunk in await api.chat.completions.create(**asked, stream=True)]
        (record,) = await door.client.get(1)
        found = [await twin(door, sequence) for sequence in (1, 2, 3)]

    calls = [choice.message.tool_calls for each in made for choice in each.choices]
    assert [(call.function.name, json.loads(call.function.arguments)) for each in calls for call in each or ()] == [
        ("weather", {"city": "Paris"})
    ] * 2
    assert {choice.finish_reason for each in made for choice in each.choices} == {"tool_calls"}
    parts = [call.function for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert [part.name for part in parts if part and part.name] == ["weather"]
    assert json.loads("".join(part.arguments or "" for part in parts if part)) == {"city": "Paris"}
    prompt = bytes(each for each in record.input.token_ids if each < 256).decode()
    assert '"name": "weather"' in prompt
    assert prompt.endswith("<think></think>")
    assert [verdict for verdict, _ in found] == [
        types_pb2.VERDICT_UNSPECIFIED,
        types_pb2.VERDICT_MATCH,
        types_pb2.VERDICT_MATCH,
    ]


async def test_other_doors_of_the_gateway(behind: tuple[Pair, Gateway], api: openai.AsyncOpenAI, door: Door) -> None:
    """The gateway's /v1/responses and /v1/messages make ordinary requests."""
    before = await door.last_sequence()
    said = await api.responses.create(model="scripted", input="hello", max_output_tokens=12)
    body = {"model": "scripted", "max_tokens": 12, "messages": HELLO}
    answer = await asyncio.to_thread(behind[1].post, "/v1/messages", body)
    own = [(await door.client.get(before + number))[0].result.output.text for number in (1, 2)]

    assert said.output_text == own[0]
    assert answer["content"][0]["text"] == own[1]


@pytest.mark.llama
@pytest.mark.skipif(bool(LACKING), reason=f"without {', '.join(LACKING)}")
@pytest.mark.timeout(180)
async def test_a_real_model(tmp_path: Path) -> None:
    """With the packaged model, chat and completion equal those of our own client, streamed or not, and JSON matches its
    schema."""
    service = ["--threads", "1", "--context-tokens", "512", "--runs", "4", "--self-test", "off"]
    with Pair(engine="llama", service=service, sidecar=["--vllm-face"], state=tmp_path) as pair:
        async with client(pair.start()) as (api, model), Client(pair.target) as direct:
            await real(api, model, direct)


async def real(api: openai.AsyncOpenAI, model: str, own: Client) -> None:
    question: Any = [{"role": "user", "content": "Wie heißt die Hauptstadt von 日本?"}]
    chat = types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role="user", content=question[0]["content"])]))
    expected = (await own.generate(chat, max_new_tokens=6, seed=1, temperature=0.7)).results[0].output.text
    asked: Any = {"model": model, "messages": question, "max_tokens": 6, "seed": 1, "temperature": 0.7}
    made = await api.chat.completions.create(**asked)
    stream = await api.chat.completions.create(**asked, stream=True)

    assert made.choices[0].message.content == expected
    assert "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices]) == expected

    plain = (await own.generate("Shanghai is", max_new_tokens=6, seed=1, top_k=40)).results[0].output.text
    text = await api.completions.create(model=model, prompt="Shanghai is", max_tokens=6, seed=1, extra_body={"top_k": 40})
    assert text.choices[0].text == plain

    schema: Any = {"name": "answer", "schema": {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}}
    formed = await api.chat.completions.create(
        **asked | {"max_tokens": 40}, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert (formed.choices[0].message.content or "").startswith("{")
    tool: Any = {
        "type": "function",
        "function": {"name": "f", "parameters": schema["schema"] | {"additionalProperties": False}},
    }
    named: Any = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    for more in (named, named | {"tool_choice": "required"}):
        forced = await api.chat.completions.create(**asked | {"max_tokens": 60, "temperature": 0.0}, **more)
        calls = forced.choices[0].message.tool_calls or []
        assert [(each.function.name, json.loads(each.function.arguments)) for each in calls] == [("f", {"a": "x"})]
    assert [said.comparison.verdict async for said in own.replay(1, 6)] == [types_pb2.VERDICT_MATCH] * 6


async def twin(door: Door, sequence: int) -> tuple[types_pb2.Verdict.ValueType, int]:
    """The verdict on an item and the sequence of its twin, from its COMPLETED entry."""
    (payload,) = [
        entry.payload
        async for entry in door.client.tail(payloads=True)
        if (entry.header.sequence, entry.header.kind) == (sequence, types_pb2.ENTRY_KIND_COMPLETED)
    ]
    found = sequencer_pb2.CompletedPayload.FromString(payload).twin
    return found.verdict, found.expected_sequence
