"""A pair with TLS and tokens, two tenants and an admin: no tenant sees another one's items."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato import Client, errors, tls
from serving import auth
from serving.auth import Role

from tests.certificates import Authority
from tests.e2e.kit import Tenants, ostinato, scripted, tokens_file
from tests.pair import Pair, running_pair
from tests.waiting import eventually


@dataclass(frozen=True)
class Guarded(Tenants):
    """Tenants of a pair under TLS."""

    authority: Authority
    certificate: Path
    key: Path

    def client(self, name: str) -> Client:
        """On a connection of its own."""
        return Client(f"https://{self.pair.target}", credentials=tls(self.authority.file), token=self.tokens[name])


@pytest.fixture(scope="module", name="guarded")
def _guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("credentials")
    authority = Authority(folder)
    certificate, key = authority.sign("sidecar")
    listed, tokens = tokens_file(folder, "acme", "zeta")
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key), "--tokens", str(listed)]
    with Pair(sidecar=[*flags, "--health-listen", "127.0.0.1:0"]) as pair:
        pair.start()
        yield Guarded(pair, tokens, authority, certificate, key)


async def test_the_same_key_of_two_tenants_is_two_requests(guarded: Guarded) -> None:
    """Keys are scoped by tenant: the same key and request get numbers of their own, and each its own answer again, also after
    a crash of the sidecar."""
    answers = {}
    for tenant in ("acme", "zeta"):
        async with guarded.client(tenant) as client:
            answers[tenant] = await client.generate("one", key="night", max_new_tokens=4)
            assert await client.generate("one", key="night", max_new_tokens=4) == answers[tenant]
    guarded.pair.sidecar.kill()
    guarded.pair.start_sidecar().wait_for("engine connected")

    assert answers["acme"].stamp.first_sequence != answers["zeta"].stamp.first_sequence
    for tenant, answer in answers.items():
        async with guarded.client(tenant) as client:
            assert await client.generate("one", key="night", max_new_tokens=4) == answer
            (record,) = await client.get(key="night")
            assert record.result == answer.results[0]
            assert record.input.tenant == tenant


async def test_another_tenants_items_do_not_exist(guarded: Guarded) -> None:
    """Get, Cancel and Replay of another tenant's item, alone or in a range, are NOT_FOUND; the owner's and the admin's work."""
    async with guarded.client("acme") as acme, guarded.client("zeta") as zeta, guarded.client("ops") as ops:
        own = (await acme.generate("mine", max_new_tokens=4)).stamp.first_sequence
        other = (await zeta.generate("theirs", max_new_tokens=4, key="theirs")).stamp.first_sequence
        assert other == own + 1
        for first, last in ((other, other), (own, other)):
            with pytest.raises(errors.NotFound):
                _ = [verdict async for verdict in acme.replay(first, last)]
            with pytest.raises(errors.NotFound):
                await acme.cancel(first, last)
        with pytest.raises(errors.NotFound):
            await acme.get(other)
        with pytest.raises(errors.NotFound):
            await acme.get(key="theirs")
        with pytest.raises(errors.NotFound):
            await acme.cancel(key="theirs")

        assert [record.input.tenant for record in await acme.get(own)] == ["acme"]
        assert (await acme.cancel(own)).ended == 1
        assert len([verdict async for verdict in acme.replay(own)]) == 1
        assert [record.input.tenant for record in await ops.get(other)] == ["zeta"]
        assert len([verdict async for verdict in ops.replay(own, other)]) == 2


async def test_what_is_an_admins(guarded: Guarded) -> None:
    """Tail, Head and Report, and Replay with `alone`, also of own items, are PERMISSION_DENIED for tenants and allowed for
    admins."""
    async with guarded.client("acme") as acme, guarded.client("ops") as ops:
        own = (await acme.generate("mine", max_new_tokens=4)).stamp.first_sequence
        for refused in (acme.head(), acme.report(), anext(acme.tail()), anext(acme.replay(own, alone=True))):
            with pytest.raises(errors.PermissionDenied):
                await refused
        assert (await ops.head()).index > 0
        assert (await anext(ops.tail())).header.index == 1
        assert len([verdict async for verdict in ops.replay(own, alone=True)]) == 1


async def test_a_certificate_changes_under_load(guarded: Guarded) -> None:
    """While callers come and go on new connections, the server's certificate is replaced twice, and no call fails."""
    reloads = 'ostinato_credential_reloads_total{kind="tls",outcome="used"}'
    over = asyncio.Event()

    async def caller() -> int:
        done = 0
        while not over.is_set():
            async with guarded.client("acme") as client:
                done += len((await client.generate("load", max_new_tokens=2)).results)
        return done

    callers = [asyncio.create_task(caller()) for _ in range(3)]
    before = guarded.pair.metrics()[reloads]
    for number in (1, 2):
        for file, change in zip(
            (guarded.certificate, guarded.key), guarded.authority.sign("sidecar", file="next"), strict=True
        ):
            change.rename(file)
        seen = before + number
        await eventually(partial(lambda least: guarded.pair.metrics()[reloads] >= least, seen), "the certificate is read again")
    over.set()

    assert min(await asyncio.gather(*callers)) > 0


async def test_a_probe_needs_nothing(guarded: Guarded) -> None:
    """The port for probes says in plain text that the sidecar can admit."""
    address = str(guarded.pair.sidecar.wait_for("listening")["health_address"])
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="ostinato.v1.Generation")
        health = await health_pb2_grpc.HealthStub(channel).Check(request)

    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_the_command_has_credentials(guarded: Guarded, tmp_path: Path) -> None:
    """`ostinato` takes a CA and a token, from files or from the environment; without them it fails and says why."""

    def head(*options: str, **environment: str) -> tuple[int, str]:
        done = ostinato("--target", f"https://{guarded.pair.target}", *options, "head", **environment)
        return done.exit_code, done.stderr

    token = tmp_path / "token"
    token.write_text(guarded.tokens["ops"] + "\n")
    trust = ("--tls-ca", str(guarded.authority.file))

    assert head(*trust, "--token-file", str(token)) == (0, "")
    for options, environment, code, said in (
        (trust, {"OSTINATO_TOKEN": "no"}, 1, "UNAUTHENTICATED"),
        (("--tls-ca", str(tmp_path / "nowhere")), {}, 2, "nowhere"),
        ((*trust, "--tls-key", trust[1]), {}, 2, "one needs the other"),
    ):
        told = head(*options, **environment)
        assert (told[0], said in told[1]) == (code, True), told


def test_the_command_sends_no_token_in_clear_text() -> None:
    """To a target on a network a token needs TLS or the flag, also by --against; wrong usage, and the token is not shown."""
    far, allowed = ("--target", "host.invalid:7001"), {"OSTINATO_ALLOW_PLAINTEXT_TOKEN": "1"}
    for options, environment, code in (
        ((*far, "head"), {}, 2),
        (("head", *far), {}, 2),
        (("replay", "1", "--against", far[1]), {}, 2),
        ((*far, "--allow-plaintext-token", "head"), {}, 1),
        ((*far, "head"), allowed, 1),
    ):
        done = ostinato("--timeout", "1", *options, OSTINATO_TOKEN="secret", **environment)
        told = (done.exit_code, "allow-plaintext-token" in done.stderr, "secret" in done.output)
        assert told == (code, code == 2, False), done.output


async def test_a_secret_is_rotated_as_a_kubelet_does(tmp_path: Path) -> None:
    """The Secret's folder is replaced by a link: streams of a token that is gone end with UNAUTHENTICATED within ten seconds,
    the new token is valid, and the sidecar is the same process."""
    made = {name: auth.new_token(name, Role.ADMIN if name == "ops" else Role.TENANT) for name in ("old", "new", "ops")}

    def write(version: str, *names: str) -> None:
        folder = tmp_path / version
        folder.mkdir()
        file = folder / "tokens"
        file.write_text("\n".join(made[name][1] for name in names))
        file.chmod(0o440)
        link = tmp_path / "..data_tmp"
        link.symlink_to(version)
        link.rename(tmp_path / "..data")

    write("..1", "old", "ops")
    (tmp_path / "tokens").symlink_to("..data/tokens")
    with running_pair(service=scripted(delay_seconds=0.05), sidecar=["--tokens", str(tmp_path / "tokens")]) as pair:
        pid = pair.sidecar.pid
        async with Client(pair.target, token=made["old"][0]) as old, Client(pair.target, token=made["ops"][0]) as ops:
            stream, tail = old.stream("one", max_new_tokens=2000, ignore_eos=True), ops.tail(follow=True)
            await anext(stream)
            await anext(tail)
            write("..2", "new")
            started = time.monotonic()
            for each in (stream, tail):
                with pytest.raises(errors.Unauthenticated, match="this token is not valid here"):
                    _ = [event async for event in each]
            assert time.monotonic() - started < 10
        async with Client(pair.target, token=made["new"][0]) as new:
            assert (await new.generate("one", max_new_tokens=1)).results[0].HasField("output")
        assert pair.sidecar.pid == pid
