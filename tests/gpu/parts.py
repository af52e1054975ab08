"""What is measured. Each part prints as it goes, and returns lines for the table at the end."""

from __future__ import annotations

import hashlib
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ostinato.digest import logprobs_digest, output_digest
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.stack import Answers, Front, Stack, running
from tests.gpu.traffic import Ask, fillers, long_prompts, mixed, targets

SPEED_TOKENS = 192


@dataclass
class Plan:
    """What was asked for on the command line."""

    model: Path
    state: Path
    flags: tuple[str, ...]
    targets: int
    totals: tuple[int, ...]
    trials: int
    batches: tuple[int, ...]
    sidecar: bool
    engine: str
    deadline: float
    """By time.monotonic; nothing new is begun after it."""
    bad: list[str] = field(default_factory=list)
    """What is not as it should be."""

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def say(text: str) -> None:
    print(text, flush=True)


async def introduce(stack: Stack, title: str) -> types_pb2.Model:
    """Who answers."""
    model = await stack.front.describe()
    grade = types_pb2.Grade.Name(model.grade).removeprefix("GRADE_")
    say(f"== {title}: up after {stack.started_seconds:.1f} s, {grade}: {model.grade_reason}")
    for record in stack.service.records():
        if record.get("message") in ("product measured", "KV cache", "not exact", "model loaded", "grade lost", "grade earned"):
            say(f"   { ({key: record[key] for key in record if key not in ('time', 'level', 'logger')}) }")
    return model


async def alone(front: Front, asks: list[Ask]) -> Answers:
    """One at a time: what all else is compared with."""
    began = time.monotonic()
    answers: Answers = {}
    for ask in asks:
        answers |= await front.ask([ask])
    broken = {name: str(answer) for name, answer in answers.items() if isinstance(answer, OstinatoError)}
    seconds = time.monotonic() - began
    say(
        f"   alone: {len(asks)} targets in {seconds:.1f} s, digest {digest(answers)}" + (f", FAILED {broken}" if broken else "")
    )
    return answers


def digest(answers: Answers) -> str:
    """Of all tokens and logprob bits."""
    whole = hashlib.sha256()
    for name in sorted(answers):
        answer = answers[name]
        if isinstance(answer, types_pb2.Output):
            whole.update(output_digest(answer) + logprobs_digest(answer))
    return whole.hexdigest()[:16]


def divergence(expected: Answers, actual: Answers, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Targets whose tokens differ (or that failed), and those whose tokens are equal but logprob bits are not."""
    tokens, bits = [], []
    for name in names:
        left, right = expected.get(name), actual.get(name)
        if (
            not isinstance(left, types_pb2.Output)
            or not isinstance(right, types_pb2.Output)
            or output_digest(left) != output_digest(right)
        ):
            tokens.append(name)
        elif logprobs_digest(left) != logprobs_digest(right):
            bits.append(name)
    return tokens, bits


def worded(tokens: list[str], bits: list[str]) -> str:
    """Target and kind of the first of them."""
    return f"{len(tokens)} differ in tokens {tokens[:12]}, {len(bits)} in logprob bits only {bits[:12]}"


async def company(front: Front, asks: list[Ask], expected: Answers, plan: Plan, *, must_match: bool, title: str) -> list[str]:
    """Targets among others, several times."""
    lines = []
    for total in plan.totals:
        cells = []
        for trial in range(plan.trials):
            if plan.late():
                say("   out of time")
                break
            began = time.monotonic()
            answers = await front.ask(mixed(asks, total, seed=1000 * total + trial))
            tokens, bits = divergence(expected, answers, [ask.name for ask in asks])
            say(f"   {total} in all, trial {trial}, {time.monotonic() - began:.1f} s: {worded(tokens, bits)}")
            cells.append(f"{len(tokens)}+{len(bits)}")
            if must_match and (tokens or bits):
                plan.bad.append(f"{title}: {len(tokens)}+{len(bits)} of {len(asks)} diverged among {total}")
        lines.append(f"{title:8} {total:5} in all: {' '.join(cells)} of {len(asks)} (tokens + logprobs only)")
    return lines


async def speed(front: Front, plan: Plan, title: str) -> dict[str, float]:
    """Tokens a second by batch, nobody streaming; streamed once at the largest; prompts' tokens a second."""
    found: dict[str, float] = {}
    await front.ask(fillers(4, 8))
    for batch in plan.batches:
        if plan.late():
            break
        best = 0.0
        for _ in range(2):
            answers = await front.ask(fillers(batch, SPEED_TOKENS))
            made = sum(len(answer.token_ids) for answer in answers.values() if isinstance(answer, types_pb2.Output))
            best = max(best, made / front.seconds)
        found[str(batch)] = best
    if not plan.late():
        largest = plan.batches[-1]
        if not plan.sidecar:
            await front.ask(fillers(largest, SPEED_TOKENS), stream=True)
            found[f"{largest} streamed"] = largest * SPEED_TOKENS / front.seconds
        answers = await front.ask(long_prompts(64, 1200))
        read = sum(answer.prompt_tokens for answer in answers.values() if isinstance(answer, types_pb2.Output))
        found["prefill"] = read / front.seconds
        failed = [str(answer) for answer in answers.values() if isinstance(answer, OstinatoError)]
        if failed:
            plan.bad.append(f"{title}: {len(failed)} long prompts failed: {failed[0]}")
    say(f"   {title} tokens/s: " + ", ".join(f"{key} {value:.0f}" for key, value in found.items()))
    return found


def overrides_of(stack: Stack) -> str:
    """The counters, as Prometheus sees them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{stack.metrics_port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return "; ".join(line for line in lines if line.startswith(("ostinato_engine_override", "ostinato_service_grade")))


async def exact(plan: Plan, *, with_speed: bool) -> tuple[list[str], dict[str, float]]:
    """The promise: no answer knows its company. With tokens a second, if wanted."""
    asks = targets(plan.targets)
    async with running(
        plan.model, plan.state, "--self-test", "full", *plan.flags, sidecar=plan.sidecar, engine=plan.engine
    ) as stack:
        model = await introduce(stack, "exact")
        if model.grade != types_pb2.GRADE_EXACT:
            plan.bad.append(f"the self-test earns no EXACT: {model.grade_reason}")
        expected = await alone(stack.front, asks)
        again = await stack.front.ask(asks)
        tokens, bits = divergence(expected, again, [ask.name for ask in asks])
        say(
            f"   all {len(asks)} at once: {len(tokens)} differ in tokens {tokens[:12]}, {len(bits)} in logprob bits {bits[:12]}"
        )
        if tokens or bits:
            plan.bad.append(f"exact: {len(tokens)}+{len(bits)} of {len(asks)} diverged at once")
        lines = await company(stack.front, asks, expected, plan, must_match=True, title="exact")
        rates = await speed(stack.front, plan, "exact") if with_speed else {}
        say(f"   {overrides_of(stack)}")
        grade = (await stack.front.describe()).grade
        if grade != model.grade:
            plan.bad.append("exact: the grade was lost on the way")
        lines.append(f"exact    alone digest {digest(expected)}, fingerprint {model.fingerprint.digest.hex()[:16]}")
    return lines, rates


async def stock(plan: Plan, *, with_speed: bool, compare: bool) -> tuple[list[str], dict[str, float]]:
    """TurboMind as it comes, for scale."""
    asks, lines = targets(plan.targets), list[str]()
    async with running(
        plan.model, plan.state, "--no-exact", "--self-test", "off", *plan.flags, sidecar=plan.sidecar, engine=plan.engine
    ) as stack:
        await introduce(stack, "stock")
        if compare:
            expected = await alone(stack.front, asks)
            one = Plan(**{**vars(plan), "trials": 1, "bad": plan.bad})
            lines = await company(stack.front, asks, expected, one, must_match=False, title="stock")
        rates = await speed(stack.front, plan, "stock") if with_speed else {}
    return lines, rates


async def restart(plan: Plan) -> list[str]:
    """Two processes, one answer, and the second takes the first one's word for its kernels and its grade."""
    asks, found, fields = targets(plan.targets), [], dict[str, str]()
    for title in ("first process", "second process"):
        async with running(plan.model, plan.state, *plan.flags, sidecar=plan.sidecar, engine=plan.engine) as stack:
            model = await introduce(stack, title)
            answers = await alone(stack.front, asks)
            found.append((digest(answers), model.fingerprint.digest.hex()[:16], stack.started_seconds))
            fields = dict(model.fingerprint.fields)
    say(f"   {fields}")
    if found[0][:2] != found[1][:2]:
        plan.bad.append(f"restart: {found[0][:2]} is not {found[1][:2]}")
    return [f"restart  answers {found[0][0]} {found[1][0]}, fingerprints {found[0][1]} {found[1][1]},"
            f" up after {found[0][2]:.1f} and {found[1][2]:.1f} s"]  # fmt: skip


async def sabotage(plan: Plan) -> list[str]:
    """With one override left out, the self-test must notice: no EXACT."""
    lines = []
    for name in ("split_count", "top_k", "gemm"):
        if plan.late():
            break
        env = {"OSTINATO_TURBOMIND_OMIT": name}
        async with running(plan.model, plan.state, "--self-test", "full", *plan.flags, env=env, engine=plan.engine) as stack:
            model = await introduce(stack, f"without {name}")
        grade = types_pb2.Grade.Name(model.grade).removeprefix("GRADE_")
        if model.grade == types_pb2.GRADE_EXACT:
            plan.bad.append(f"sabotage: without {name} the self-test still says EXACT")
        lines.append(f"sabotage without {name}: {grade}, {model.grade_reason[:80]}")
    return lines
