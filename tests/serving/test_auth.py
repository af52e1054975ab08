"""Who may call: the files of tokens and certificates, and every kind of credentials over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ostinato import errors
from ostinato.client import tls
from serving import auth
from serving.auth import TENANT, TENANT_METADATA, Credentials, Identity, Role, caller
from serving.program import StartupError
from serving.server import Server
from serving.tls import Certificate, ServerTls, trusted_until

from tests.certificates import Authority
from tests.serving.echo import NAME, Context, Echo, register, text
from tests.waiting import eventually


@pytest.fixture(name="authority")
def _authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    """A file of tokens."""
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_files_that_cannot_serve_are_refused(authority: Authority, tmp_path: Path) -> None:
    """A missing file, the key of another certificate, an expired certificate and bad PEM are refused, with flag and path: gRPC
    would not report them."""
    (certificate, key), (_, other) = authority.sign("sidecar"), authority.sign("other")
    (tmp_path / "noise").write_bytes(b"\x00-----BEGIN NOTHING-----\xff")
    with pytest.raises(StartupError, match=r"--tls-client-ca: \S*nowhere: No such file"):
        ServerTls(certificate, key, tmp_path / "nowhere")
    with pytest.raises(StartupError, match=r"--tokens: \S*nowhere: No such file"):
        auth.load_tokens(tmp_path / "nowhere")
    with pytest.raises(StartupError, match=r"--tls-key: \S*other\.key: is not the key of the certificate"):
        ServerTls(certificate, other, None)
    with pytest.raises(StartupError, match=r"--tls-certificate: \S*old\.pem: the certificate is valid from .* not now"):
        ServerTls(*authority.sign("old", days=-1), None)
    with pytest.raises(StartupError, match="--tls-certificate: .* no certificate in PEM"):
        ServerTls(tmp_path / "noise", key, None)
    with pytest.raises(StartupError, match="--tls-key: .* no private key in PEM"):
        ServerTls(certificate, tmp_path / "noise", None)
    with pytest.raises(StartupError, match="--tls-client-ca: .* has expired"):
        ServerTls(certificate, key, authority.sign("old", days=-1)[0])


def test_a_change_that_cannot_serve_changes_nothing(authority: Authority) -> None:
    """Half a rotation is an error and leaves the old pair; the other half completes it, once."""
    certificate, key = authority.sign("sidecar")
    served = ServerTls(certificate, key, None)
    before, half = served.files.value, authority.sign("sidecar", file="new")
    certificate.write_bytes(half[0].read_bytes())
    with pytest.raises(StartupError, match="is not the key"):
        served.files.refresh()

    assert served.files.value is before
    assert not served.files.refresh(), "said once"
    key.write_bytes(half[1].read_bytes())
    assert served.files.refresh()
    assert served.files.value.not_after > datetime.now(UTC)
    assert not served.files.refresh()


def test_tokens_are_not_for_everybody(tmp_path: Path) -> None:
    """A file of tokens that others may read is refused."""
    with pytest.raises(StartupError, match="mode 0644 lets every user of this machine read it"):
        auth.load_tokens(written(tmp_path, "", 0o644))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("acme", "role is one of tenant, admin, denied"),
        ("acme king " + "0" * 64, "role is one of tenant, admin, denied"),
        ("acmé tenant " + "0" * 64, "printable ASCII"),
        (f"{'a' * 129} tenant " + "0" * 64, "1 to 128"),
        ("acme tenant 0123", "64 lower-case hexadecimal digits"),
        ("acme tenant " + "A" * 64, "64 lower-case hexadecimal digits"),
        ("acme tenant", "64 lower-case hexadecimal digits"),
        ("acme tenant certificate:", "needs a URI"),
        ("acme tenant certificate:ops", "needs a URI"),
        ("acme tenant certificate:cn:", "needs a URI"),
        ("acme tenant certificate:cn:a\0b", "no control characters"),
        ("acme tenant certificate:sha256:0123", "64 hexadecimal digits"),
        ("other tenant certificate:cn:known", "an earlier line has the same secret"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(tmp_path: Path, line: str, why: str) -> None:
    """The error has the line's number and the rule; a token put there by mistake does not reach the log."""
    with pytest.raises(StartupError, match=f"line 3: .*{why}") as raised:
        auth.load_tokens(written(tmp_path, f"# who may call\nacme tenant certificate:cn:known\n{line}\n"))

    assert "0123" not in str(raised.value)
    with pytest.raises(StartupError, match="has 1025 lines, at most 1024"):
        auth.load_tokens(written(tmp_path, "#\n" * 1025))


@given(st.dictionaries(st.from_regex(r"[!-~]{1,20}", fullmatch=True).filter(TENANT.fullmatch), st.sampled_from(list(Role))))
def test_a_token_is_its_lines(roles: dict[str, Role]) -> None:
    """Each token has the identity of its own line, and an unknown token has none."""
    made = {tenant: auth.new_token(tenant, role, "a comment  with spaces") for tenant, role in roles.items()}
    read = auth.parse_tokens({auth.TOKENS: "\n".join(line for _, line in made.values()).encode()})

    for tenant, (token, _) in made.items():
        assert read.get(auth.hash_of(token)) == Identity(tenant, roles[tenant])
        assert read.get(auth.hash_of(token + "x")) is None
    assert read.get(auth.hash_of("")) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("spiffe://example/ops", "uri:spiffe://example/ops"),
        ("cn:ops", "cn:ops"),
        ("cn:spiffe://example/ops", "cn:spiffe://example/ops"),
        ("sha256:" + "AB:" * 31 + "AB", "sha256:" + "ab" * 32),
    ],
)
def test_a_certificates_line(tmp_path: Path, name: str, key: str) -> None:
    """A line stands for a URI, for a common name that is called one, or for a fingerprint as openssl prints it."""
    listed = auth.load_tokens(written(tmp_path, f"ops admin certificate:{name}  the operators\n")).value

    assert listed == {key: Identity("ops", Role.ADMIN)}


def test_the_command_makes_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What goes to stdout is a line of the file, for the token that goes to stderr; a bad tenant or role makes none."""
    assert auth.token_command("token", ["acme", "tenant", "night batches"]) == 0
    made = capsys.readouterr()
    assert auth.load_tokens(written(tmp_path, made.out)).value.get(auth.hash_of(made.err.strip())) == Identity(
        "acme", Role.TENANT
    )

    with pytest.raises(SystemExit, match="2"):
        auth.token_command("token", ["two words", "tenant"])
    assert "printable ASCII" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        auth.token_command("token", ["acme", "boss"])
    assert "Role." not in capsys.readouterr().err


Metadata = Sequence[tuple[str, str]]


class Door:
    """A server with credentials, and who was seen behind them."""

    def __init__(self, credentials: Credentials, hold: asyncio.Event | None = None, **kwargs: Any) -> None:
        """`hold`: what a message "wait" waits for."""
        self.registry, self.seen, self._hold = CollectorRegistry(), list[Identity](), hold
        self.server = Server(["127.0.0.1:0"], registry=self.registry, credentials=credentials, **kwargs)
        self.server.add(register, Echo(self._see), NAME)

    def _see(self, content: str, _context: Context) -> Any:
        self.seen.append(caller())
        return self._hold.wait() if self._hold is not None and content == "wait" else None

    async def __aenter__(self) -> Self:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(grace=0)

    @contextlib.asynccontextmanager
    async def channel(self, trust: grpc.ChannelCredentials | None = None) -> AsyncIterator[Any]:
        """A connection of its own."""
        address, options = self.server.addresses[0], [("grpc.use_local_subchannel_pool", 1)]
        plain = grpc.aio.insecure_channel(address, options)
        async with plain if trust is None else grpc.aio.secure_channel(address, trust, options) as channel:
            yield channel

    async def call(self, *metadata: tuple[str, str], trust: grpc.ChannelCredentials | None = None) -> Identity:
        """As whom a call was handled. Raises what refused it."""
        async with self.channel(trust) as channel:
            try:
                await channel.unary_unary(f"/{NAME}/UnaryUnary")(text("x"), metadata=metadata, timeout=10)
            except grpc.aio.AioRpcError as error:
                raise errors.from_rpc_error(error) from error
        return self.seen[-1]


def bearer(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


def file_of(folder: Path, *lines: str) -> Path:
    """A file of tokens."""
    return written(folder, "\n".join(lines) + "\n")


async def test_a_token_is_who_calls(tmp_path: Path) -> None:
    """Tenant and role are those of the token's line, on every kind of method; the scheme's case does not matter."""
    (token, line), (admin, other) = auth.new_token("acme", Role.TENANT), auth.new_token("ops", Role.ADMIN)
    async with Door(Credentials(tokens=auth.load_tokens(file_of(tmp_path, line, other)))) as door:
        assert await door.call(bearer(token)) == Identity("acme", Role.TENANT)
        assert await door.call(("authorization", f"bearer {admin}")) == Identity("ops", Role.ADMIN)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [bearer("wrong")],
        [bearer("")],
        [("authorization", "wrong")],
        [("authorization", "Basic d3Jvbmc=")],
        [(TENANT_METADATA, "acme")],
        [bearer("wrong"), bearer("wrong")],
    ],
)
async def test_other_callers_are_refused(tmp_path: Path, metadata: Metadata) -> None:
    """No token, a wrong one, another scheme, two at once, or a mere claim: UNAUTHENTICATED, which is counted, and the handler
    never runs."""
    async with Door(Credentials(tokens=auth.load_tokens(file_of(tmp_path, auth.new_token("acme", Role.TENANT)[1])))) as door:
        with pytest.raises(errors.Unauthenticated):
            await door.call(*metadata)

        assert door.seen == []
        labels = {"service": NAME, "method": "UnaryUnary", "code": "UNAUTHENTICATED"}
        await eventually(lambda: door.registry.get_sample_value("ostinato_rpc_handled_total", labels) == 1, "it is counted")


async def test_without_credentials_everybody_is_an_admin() -> None:
    """Without credentials every caller is an admin: a token is ignored, and a claimed tenant is not trusted."""
    async with Door(Credentials()) as door:
        assert await door.call(bearer("any"), (TENANT_METADATA, "acme")) == Identity("", Role.ADMIN)


async def test_a_gateways_word() -> None:
    """If it is trusted, the metadata names the tenant; a call without it is refused, as is a name that no tenant can have."""
    async with Door(Credentials(trust_tenant_metadata=True)) as door:
        assert await door.call((TENANT_METADATA, "acme")) == Identity("acme", Role.TENANT)
        with pytest.raises(errors.Unauthenticated, match=f"metadata {TENANT_METADATA} is missing"):
            await door.call()
        for bad in ("", "two words", "x" * 129):
            with pytest.raises(errors.InvalidRequest, match=f"metadata.{TENANT_METADATA}"):
                await door.call((TENANT_METADATA, bad))
        with pytest.raises(errors.Unauthenticated, match="2 times"):
            await door.call((TENANT_METADATA, "acme"), (TENANT_METADATA, "other"))


async def test_an_admin_beside_a_gateway(tmp_path: Path) -> None:
    """Where the metadata is trusted too, a token still is who calls, and a wrong one is refused whatever the metadata say."""
    token, line = auth.new_token("ops", Role.ADMIN)
    async with Door(Credentials(tokens=auth.load_tokens(file_of(tmp_path, line)), trust_tenant_metadata=True)) as door:
        assert await door.call((TENANT_METADATA, "acme")) == Identity("acme", Role.TENANT)
        assert await door.call((TENANT_METADATA, "acme"), bearer(token)) == Identity("ops", Role.ADMIN)
        for metadata in ([], [bearer("wrong"), (TENANT_METADATA, "acme")]):
            with pytest.raises(errors.Unauthenticated):
                await door.call(*metadata)


def client(authority: Authority, name: str, *uris: str) -> grpc.ChannelCredentials:
    """What a client with this common name and these URIs connects with."""
    certificate, key = authority.sign(name, file="client", uris=uris)
    return tls(authority.file, certificate=certificate, key=key)


async def test_a_certificate_is_who_calls(authority: Authority, tmp_path: Path) -> None:
    """The URI of a client's certificate is its tenant, else the common name; a line says otherwise, and a token wins."""
    token, line = auth.new_token("acme", Role.TENANT)
    lines = ("ops admin certificate:spiffe://test/ops", "build admin certificate:cn:two")
    listed = auth.load_tokens(file_of(tmp_path, line, *lines))
    served = ServerTls(*authority.sign("sidecar"), authority.file)
    async with Door(Credentials(served, listed)) as door:
        for seen, trust in (
            (Identity("acme", Role.TENANT), client(authority, "acme")),
            (Identity("spiffe://test/x", Role.TENANT), client(authority, "x", "spiffe://test/x")),
            (Identity("ops", Role.ADMIN), client(authority, "x", "spiffe://test/ops")),
            (Identity("build", Role.ADMIN), client(authority, "two")),
            (Identity("spiffe://test/two", Role.TENANT), client(authority, "two", "spiffe://test/two")),
            (Identity("cn:two", Role.TENANT), client(authority, "x", "cn:two")),
        ):
            assert await door.call(trust=trust) == seen
        assert await door.call(bearer(token), trust=client(authority, "other")) == Identity("acme", Role.TENANT)


@pytest.mark.parametrize(
    ("name", "uris", "why"),
    [
        ("spiffe://test/ops", (), "a common name has none"),
        ("acme\0x", (), "control characters"),
        ("acme\n", (), "control characters"),
        ("acme", ("spiffe://test/ops\0",), "control characters"),
        ("acme", ("ops",), "a URI has a scheme"),
        ("two words", (), "printable ASCII"),
        ("x", ("urn:a", "urn:b"), "one URI"),
    ],
)
async def test_a_name_does_not_pass_for_another(
    authority: Authority, tmp_path: Path, name: str, uris: tuple[str, ...], why: str
) -> None:
    """A common name in the form of a listed URI, one that ends at a NUL byte for gRPC, and a URI in the form of a listed common
    name are refused, and no handler runs."""
    lines = ("ops admin certificate:spiffe://test/ops", "ops admin certificate:cn:ops")
    served = ServerTls(*authority.sign("sidecar"), authority.file)
    async with Door(Credentials(served, auth.load_tokens(file_of(tmp_path, *lines)))) as door:
        with pytest.raises(errors.Unauthenticated, match=why):
            await door.call(trust=client(authority, name, *uris))

        assert door.seen == []


NAMES = st.from_regex(r"([a-c]:)?[a-c]", fullmatch=True)


@given(NAMES, NAMES)
def test_a_common_name_is_never_a_uris_tenant(uri: str, common: str) -> None:
    """Whatever two certificates are called, one by a URI and one by a common name, they are not the same tenant."""

    def tenant(*uris: str) -> str | None:
        try:
            return auth.certificate_identity(Certificate(uris, (common,), "", 0, 0), {}).tenant
        except errors.Unauthenticated:
            return None

    assert tenant(uri) in (uri, None)
    assert tenant() in (common, None)
    assert tenant(uri) is None or tenant(uri) != tenant()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_chain_lasts_as_long_as_its_best_path(data: st.DataObject) -> None:
    """Of authorities that sign each other at random, in whatever order they are sent: a certificate is trusted until the first
    expiry on its best path to one in the bundle."""
    with tempfile.TemporaryDirectory() as folder:
        authorities = [Authority(Path(folder), str(number)) for number in range(4)]
    number, days = st.integers(0, 3), st.integers(1, 9)
    leaf = authorities[0].authority("leaf", authorities[1].key, data.draw(days))
    signed = [
        (subject, issuer, authorities[issuer].authority(str(subject), authorities[subject].key, until))
        for subject, issuer, until in data.draw(st.lists(st.tuples(number, number, days), min_size=4, max_size=8))
    ]
    bundle = data.draw(st.lists(st.sampled_from([leaf, *(made for _, _, made in signed)]), min_size=1, max_size=2))
    sent = data.draw(st.permutations([made for _, _, made in signed]))

    def lasts(certificate: x509.Certificate, issuer: int, passed: list[x509.Certificate]) -> float:
        own = certificate.not_valid_after_utc.timestamp()
        above = [
            lasts(made, next_issuer, [*passed, made])
            for subject, next_issuer, made in signed
            if subject == issuer and made not in passed
        ]
        return own if certificate in bundle else min(own, max(above, default=0.0))

    assert trusted_until(leaf, sent, bundle) == lasts(leaf, 0, [leaf])


async def test_what_is_denied(authority: Authority, tmp_path: Path) -> None:
    """A denied token, and a certificate that is denied by its URI, its common name or its fingerprint, are refused although the
    CA is good, with a valid token too; others go on."""
    (token, line), (lost, lost_line) = auth.new_token("acme", Role.TENANT), auth.new_token("acme", Role.DENIED)
    served, (leaked, leaked_key) = ServerTls(*authority.sign("sidecar"), authority.file), authority.sign("leaked")
    fingerprint = x509.load_pem_x509_certificate(leaked.read_bytes()).fingerprint(SHA256()).hex()
    names = ("urn:gone", "cn:gone", f"sha256:{fingerprint}")
    listed = auth.load_tokens(file_of(tmp_path, line, lost_line, *(f"x denied certificate:{name}" for name in names)))
    async with Door(Credentials(served, listed)) as door:
        for trust in (
            client(authority, "x", "urn:gone"),
            client(authority, "x", "urn:gone", "urn:other"),
            client(authority, "gone"),
            client(authority, "gone", "urn:other"),
            tls(authority.file, certificate=leaked, key=leaked_key),
        ):
            for metadata in ([], [bearer(token)]):
                with pytest.raises(errors.Unauthenticated, match="client certificate is denied"):
                    await door.call(*metadata, trust=trust)
        with pytest.raises(errors.Unauthenticated, match="token is denied"):
            await door.call(bearer(lost), trust=client(authority, "good"))
        assert door.seen == []
        assert await door.call(trust=client(authority, "leaked")) == Identity("leaked", Role.TENANT)


async def test_a_chain_leads_to_the_authority(authority: Authority, tmp_path: Path) -> None:
    """Certificates that the client sends along are part of the chain; without them TLS refuses it, as ever."""
    middle = Authority(tmp_path, "middle", authority)
    certificate, key = Authority(tmp_path, "issuing", middle).sign("acme")
    served = ServerTls(*authority.sign("sidecar"), authority.file)
    whole = tmp_path / "whole.pem"
    whole.write_bytes(b"".join(path.read_bytes() for path in (certificate, tmp_path / "issuing.pem", middle.file)))
    async with Door(Credentials(served)) as door:
        assert await door.call(trust=tls(authority.file, certificate=whole, key=key)) == Identity("acme", Role.TENANT)
        with pytest.raises(errors.Disconnected):
            await door.call(trust=tls(authority.file, certificate=certificate, key=key))


async def test_only_the_authoritys_clients_connect(authority: Authority, tmp_path: Path) -> None:
    """No certificate, an expired one, one of another CA, plain text, and a client that does not trust the server: no call."""
    strangers = Authority(tmp_path, "strangers")
    async with Door(Credentials(ServerTls(*authority.sign("sidecar"), authority.file))) as door:
        certificate, key = authority.sign("late", days=-1)
        stranger, strange_key = strangers.sign("acme", file="stranger")
        good, good_key = authority.sign("acme")
        for trust in (
            tls(authority.file),
            tls(authority.file, certificate=certificate, key=key),
            tls(authority.file, certificate=stranger, key=strange_key),
            tls(strangers.file, certificate=good, key=good_key),
            None,
        ):
            with pytest.raises(errors.Disconnected):
                await door.call(trust=trust)

        assert await door.call(trust=tls(authority.file, certificate=good, key=good_key)) == Identity("acme", Role.TENANT)


async def test_files_change_under_way(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new certificate serves new connections while calls go on, a revoked token stops, and bad files are counted only."""
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.01)
    (token, line), (admin, other) = auth.new_token("acme", Role.TENANT), auth.new_token("ops", Role.ADMIN)
    path, (certificate, key) = file_of(tmp_path, line, other), authority.sign("sidecar")
    credentials = Credentials(ServerTls(certificate, key, None), auth.load_tokens(path))
    rotated = Authority(tmp_path, "rotated")
    async with Door(credentials) as door, door.channel(tls(authority.file)) as old:
        watching = asyncio.create_task(credentials.watch(door.registry))

        async def reloaded(kind: str, outcome: str) -> None:
            labels = {"kind": kind, "outcome": outcome}
            await eventually(lambda: door.registry.get_sample_value("ostinato_credential_reloads_total", labels))

        method = old.unary_unary(f"/{NAME}/UnaryUnary")
        await method(text("x"), metadata=[bearer(admin)])
        path.write_text(other + "\n")
        await reloaded("tokens", "used")
        with pytest.raises(errors.Unauthenticated):
            await door.call(bearer(token), trust=tls(authority.file))
        path.write_text("nonsense\n")
        await reloaded("tokens", "unusable")
        for file, change in zip((certificate, key), rotated.sign("sidecar", file="next"), strict=True):
            file.write_bytes(change.read_bytes())
        await reloaded("tls", "used")
        assert await door.call(bearer(admin), trust=tls(rotated.file)) == Identity("ops", Role.ADMIN)
        with pytest.raises(errors.Disconnected):
            await door.call(bearer(admin), trust=tls(authority.file))
        await method(text("x"), metadata=[bearer(admin)])
        watching.cancel()


async def test_another_authority_takes_over(authority: Authority, tmp_path: Path) -> None:
    """A new client CA lets its clients in and the old one's out, also on a connection that is there already; a CA that signed
    the old one, or the old one beside it, keeps them."""
    root = Authority(tmp_path, "root")
    late, early = Authority(tmp_path, "late"), Authority(tmp_path, "early", root)
    (old, old_key), (new, new_key), trusted = early.sign("acme"), late.sign("zeta"), tmp_path / "trusted.pem"
    old.write_bytes(old.read_bytes() + early.file.read_bytes())
    served = ServerTls(*authority.sign("sidecar"), Path(shutil.copy(early.file, trusted)))
    before = tls(authority.file, certificate=old, key=old_key)
    async with Door(Credentials(served)) as door, door.channel(before) as there:
        method = there.unary_unary(f"/{NAME}/UnaryUnary")
        for files in ((early.file,), (root.file,), (late.file, early.file)):
            trusted.write_bytes(b"".join(file.read_bytes() for file in files))
            served.files.refresh()
            await method(text("x"))
        shutil.copy(late.file, trusted)
        assert served.files.refresh()
        with pytest.raises(grpc.aio.AioRpcError, match="CA is not trusted here") as raised:
            await method(text("x"))
        with pytest.raises(errors.Disconnected):
            await door.call(trust=before)
        assert await door.call(trust=tls(authority.file, certificate=new, key=new_key)) == Identity("zeta", Role.TENANT)

    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [identity.tenant for identity in door.seen] == ["acme", "acme", "acme", "zeta"]


async def test_a_certificate_expires_under_way(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection outlives its certificate, and its calls do not: the next one is refused, and the open stream ends."""
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.01)
    credentials = Credentials(ServerTls(*authority.sign("sidecar"), authority.file))
    async with Door(credentials) as door, door.channel(client(authority, "acme")) as channel:
        watching = asyncio.create_task(credentials.watch(door.registry))
        stream = await opened(channel)
        monkeypatch.setattr("serving.tls.time", SimpleNamespace(time=lambda: time.time() + 31 * 86400))
        ended = [await refused(stream), await refused(channel.unary_unary(f"/{NAME}/UnaryUnary")(text("x")))]
        watching.cancel()

    assert ended == ["the client certificate has expired"] * 2
    assert {identity.tenant for identity in door.seen} == {"acme"}


@pytest.mark.parametrize(
    ("to", "why"),
    [
        ("", "this token is not valid here"),
        ("acme denied {}", "this token is denied"),
        ("acme admin {}", "the tenant or role of these credentials has changed"),
        ("other tenant {}", "the tenant or role of these credentials has changed"),
    ],
)
async def test_a_stream_ends_with_its_token(tmp_path: Path, to: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running stream and a waiting call end with UNAUTHENTICATED when the line is taken out, denied, or given another role or
    tenant; those of another token go on."""
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0.01)
    (token, line), (other, kept) = auth.new_token("acme", Role.TENANT), auth.new_token("zeta", Role.TENANT)
    path = file_of(tmp_path, line, kept)
    credentials, hold = Credentials(tokens=auth.load_tokens(path)), asyncio.Event()
    async with Door(credentials, hold=hold) as door, door.channel() as channel:
        watching = asyncio.create_task(credentials.watch(door.registry))
        streams = [await opened(channel, bearer(each)) for each in (token, other)]
        waits = asyncio.ensure_future(channel.unary_unary(f"/{NAME}/UnaryUnary")(text("wait"), metadata=[bearer(token)]))
        await eventually(lambda: len(credentials._running) == 3)
        path.write_text("\n".join([to.format(auth.hash_of(token)), kept]))
        ended = [await refused(streams[0]), await refused(waits)]
        await streams[1].write(text("still"))
        assert await streams[1].read() == text("still")
        watching.cancel()

    assert ended == [why] * 2
    await eventually(lambda: not credentials._running, "ended calls are forgotten")


async def opened(channel: Any, *metadata: tuple[str, str]) -> Any:
    """A stream that has had one answer and stays open."""
    stream = channel.stream_stream(f"/{NAME}/ReaderWriter")(metadata=metadata)
    await stream.write(text("x"))
    assert await stream.read() == text("x")
    return stream


async def refused(call: Any) -> str:
    """Why this call ends with UNAUTHENTICATED."""
    async with asyncio.timeout(10):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (call.read() if hasattr(call, "read") else call)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    return str(raised.value.details())


async def test_grpcs_own_services_are_an_admins(tmp_path: Path) -> None:
    """With credentials, reflection answers an admin and refuses a tenant and a stranger; health answers all."""
    (token, line), (admin, other) = auth.new_token("acme", Role.TENANT), auth.new_token("ops", Role.ADMIN)
    async with Door(Credentials(tokens=auth.load_tokens(file_of(tmp_path, line, other)))) as door, door.channel() as channel:

        async def reflect(*metadata: tuple[str, str]) -> list[str]:
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), metadata=metadata)
            return [found.name async for answer in answers for found in answer.list_services_response.service]

        assert NAME in await reflect(bearer(admin))
        for metadata, code in (((bearer(token),), "PERMISSION_DENIED"), ((), "UNAUTHENTICATED")):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await reflect(*metadata)
            assert raised.value.code().name == code
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_for_probes(authority: Authority) -> None:
    """Beside a door under mTLS, the port for probes tells health in plain text and knows no other service."""
    served = ServerTls(*authority.sign("sidecar"), authority.file)
    async with Door(Credentials(served), health_address="127.0.0.1:0") as door:
        door.server.set_health(NAME, serving=True)
        async with grpc.aio.insecure_channel(door.server.health_address) as probe:
            channel: Any = probe
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=NAME))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(f"/{NAME}/UnaryUnary")(text("x"))

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_address_beyond_loopback_needs_credentials(authority: Authority, tmp_path: Path) -> None:
    """TLS alone, and a gateway's word, do not say who calls; a client CA does, and so does a token if it cannot be read on
    the way or a flag allows it."""
    certificate, key = authority.sign("sidecar")
    served, listed = ServerTls(certificate, key, None), auth.load_tokens(file_of(tmp_path))

    def refusal(credentials: Credentials, address: str = "0.0.0.0:0", **flags: Any) -> str:
        try:
            Server([address], registry=CollectorRegistry(), credentials=credentials, **flags)
        except StartupError as error:
            return str(error)
        return ""

    for unproven in (Credentials(), Credentials(served), Credentials(trust_tenant_metadata=True)):
        assert "--open" in refusal(unproven)
        assert "--open" in refusal(unproven, plaintext_tokens=True)
        assert refusal(unproven, open_to_all=True) == ""
    for address in ("[::]:0", "192.0.2.1:7000"):
        assert "anyone who reaches it could do everything" in refusal(Credentials(), address)
    in_clear = Credentials(tokens=listed)
    assert "--allow-plaintext-tokens" in refusal(in_clear)
    assert "--allow-plaintext-tokens" in refusal(in_clear, open_to_all=True)
    assert refusal(in_clear, plaintext_tokens=True) == ""
    for proven in (Credentials(served, listed), Credentials(ServerTls(certificate, key, authority.file))):
        assert refusal(proven) == ""
