"""The parts of the check, for one model with one set of flags. Each part prints its progress and adds to the plan's table."""

from __future__ import annotations

from ostinato.v1 import types_pb2

from service.engines.turbomind import model
from tests.gpu import speed, worth
from tests.gpu.compare import alone, company, digest, divergence, grade, introduce
from tests.gpu.plan import Plan, Reference, say
from tests.gpu.stack import Stack, running
from tests.pair import samples

COUNTED = (
    "ostinato_engine_override",
    "ostinato_engine_preemptions",
    "ostinato_service_grade",
    "lmdeploy_num",
    "lmdeploy_cached",
)
FIELDS = ("device", "driver", "engine_version", "cublas", "kernel_plan", "overrides", "attention_splits", "dtype")


def overrides_of(stack: Stack) -> str:
    """The counters, as Prometheus sees them."""
    return "; ".join(f"{name} {value:g}" for name, value in samples(stack.metrics_port).items() if name.startswith(COUNTED))


def fingerprint(told: types_pb2.Model) -> str:
    return told.fingerprint.digest.hex()[:16]


async def exact(plan: Plan, *, with_path: bool) -> None:
    """EXACT's promise: no answer depends on the other runs."""
    flags = ("--self-test", "full", *plan.flags)
    async with running(plan.model, plan.state, *flags, sidecar=plan.sidecar, engine=plan.engine) as stack:
        found = await introduce(stack, "exact")
        if found.grade != types_pb2.GRADE_EXACT:
            plan.bad.append(f"the self-test earns no EXACT: {found.grade_reason}")
        plan.reference = reference = await alone(stack, plan)
        plan.tell(identity(reference))
        await company(stack.front, reference, plan, "exact", trials=plan.trials, must_match=True)
        if with_path:
            await speed.path(stack, plan, "whole")
        say(f"   {overrides_of(stack)}")
        if (await stack.front.describe()).grade != found.grade:
            plan.bad.append("exact: the grade was lost on the way")


def identity(reference: Reference) -> str:
    """One line with the digest of the answers, and what produced them."""
    fields = reference.model.fingerprint.fields
    told = ", ".join(
        f"{name} {fields[name][:16] if name == 'kernel_plan' else fields[name]}" for name in FIELDS if name in fields
    )
    answers = f"{reference.digest} of {len(reference.asks)} alone"
    return f"digest   {answers}, fingerprint {fingerprint(reference.model)}, {grade(reference.model)}; {told}"


async def digest_only(plan: Plan) -> None:
    """Prints one line, to compare machines."""
    async with running(plan.model, plan.state, *plan.flags, engine=plan.engine) as stack:
        await introduce(stack, "digest")
        plan.tell(identity(await alone(stack, plan)))


async def second(plan: Plan, *, with_speed: bool, with_worth: bool, with_path: bool) -> None:
    """Another process, driven over its stream, that uses the first one's proofs. All targets at once must have the answers
    that they had alone in the first process."""
    async with running(plan.model, plan.state, *plan.flags, engine=plan.engine) as stack:
        told = await introduce(stack, "second process")
        if plan.reference is not None:
            expected = plan.reference
            answers = await stack.front.ask(expected.asks)
            tokens, bits = divergence(expected.answers, answers, [ask.name for ask in expected.asks])
            found = (digest(answers), fingerprint(told))
            plan.tell(
                f"restart  digest {expected.digest} alone in one process, {found[0]} at once in another, fingerprints"
                f" {fingerprint(expected.model)} {found[1]}, up after {stack.started_seconds:.1f} s"
            )
            if found != (expected.digest, fingerprint(expected.model)):
                plan.bad.append(f"restart: {len(tokens)}+{len(bits)} differ {(tokens + bits)[:12]}, fingerprint {found[1]}")
            await company(stack.front, expected, plan, "direct", trials=1, must_match=True)
        if with_speed:
            plan.rates["exact"] = await speed.measure(stack.front, plan, "exact")
        if with_worth:
            plan.rates["exact worth"] = await worth.worth(stack.front, plan, "exact")
        if with_path:
            await speed.path(stack, plan, "direct")


async def stock(plan: Plan, *, compare: bool, with_speed: bool) -> None:
    """Stock TurboMind, as a control: if nothing diverges there, the check shows nothing."""
    flags = ("--no-exact", "--self-test", "off", *plan.flags) if plan.engine == "turbomind" else plan.flags
    async with running(plan.model, plan.state, *flags, engine=plan.engine) as stack:
        await introduce(stack, "stock")
        if with_speed:
            plan.rates["stock"] = await speed.measure(stack.front, plan, "stock")
        if compare:
            reference = await alone(stack, plan)
            diverged = await company(stack.front, reference, plan, "stock", trials=1, must_match=False)
            if not diverged and plan.engine == "turbomind":
                plan.bad.append("stock: nothing diverges, so that EXACT would show nothing here")


async def sabotage(plan: Plan) -> None:
    """With one override left out there must be no EXACT, and with none there must be."""
    own_kernels = plan.engine == "turbomind" and model.read(plan.model).own_kernels
    for name in ("gemm", "split_count", "top_k", "resume", "piece", *(["lookup"] if own_kernels else []), ""):
        if plan.late():
            break
        flags, env = ("--self-test", "full", *plan.flags), {"OSTINATO_TURBOMIND_OMIT": name} if name else {}
        title = f"without {name or 'nothing'}"
        async with running(plan.model, plan.state, *flags, env=env, engine=plan.engine) as stack:
            found = await introduce(stack, title)
        if (found.grade == types_pb2.GRADE_EXACT) is bool(name):
            plan.bad.append(f"sabotage: {title} the grade is {grade(found)}")
        plan.tell(f"sabotage {title} on {plan.model.name}: {grade(found)}, {found.grade_reason[:90]}")
