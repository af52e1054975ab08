"""Credential files: what is refused at start with a flag's name, and what a change may and may not do."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import auth
from serving.auth import TENANT, Identity, Role, Unusable
from serving.program import StartupError
from serving.tls import ServerTls

from tests.certificates import Authority


@pytest.fixture(name="authority")
def _authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    """A file of tokens."""
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_missing_file_is_named(authority: Authority, tmp_path: Path) -> None:
    """The error has the flag and the path."""
    certificate, key = authority.sign("sidecar")
    with pytest.raises(StartupError, match=r"--tls-key: \S*nowhere: No such file"):
        ServerTls(certificate, tmp_path / "nowhere", None)
    with pytest.raises(StartupError, match=r"--tls-client-ca: \S*nowhere: No such file"):
        ServerTls(certificate, key, tmp_path / "nowhere")
    with pytest.raises(StartupError, match=r"--tokens: \S*nowhere: No such file"):
        auth.load_tokens(tmp_path / "nowhere")


def test_files_that_cannot_serve_are_refused(authority: Authority, tmp_path: Path) -> None:
    """Another certificate's key, an expired certificate, and what is no PEM never reach gRPC, which says nothing."""
    (certificate, key), (_, other) = authority.sign("sidecar"), authority.sign("other")
    (tmp_path / "noise").write_bytes(b"\x00-----BEGIN NOTHING-----\xff")
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


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_tokens_are_not_for_everybody(tmp_path: Path, mode: int) -> None:
    """A file of tokens that others may read or write is refused."""
    with pytest.raises(StartupError, match="lets everybody on this machine in"):
        auth.load_tokens(written(tmp_path, "", mode))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("acme", "role is one of tenant, admin"),
        ("acme king " + "0" * 64, "role is one of tenant, admin"),
        ("acmé tenant " + "0" * 64, "printable ASCII"),
        (f"{'a' * 129} tenant " + "0" * 64, "1 to 128"),
        ("acme tenant 0123", "64 lower-case hexadecimal digits"),
        ("acme tenant " + "A" * 64, "64 lower-case hexadecimal digits"),
        ("acme tenant", "64 lower-case hexadecimal digits"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(tmp_path: Path, line: str, why: str) -> None:
    """The error has the line's number and the rule; a token put there by mistake does not reach the log."""
    with pytest.raises(StartupError, match=f"line 3: .*{why}") as raised:
        auth.load_tokens(written(tmp_path, f"# who may call\n\n{line}\n"))

    assert "0123" not in str(raised.value)


def test_a_secret_stands_for_one(tmp_path: Path) -> None:
    """Two lines with the same secret are refused: nobody could say whose it is."""
    _, line = auth.new_token("acme", Role.TENANT)
    with pytest.raises(StartupError, match="line 2: an earlier line has the same secret"):
        auth.load_tokens(written(tmp_path, f"{line}\n{line.replace('acme', 'other')}\n"))


@given(st.dictionaries(st.from_regex(r"[!-~]{1,20}", fullmatch=True).filter(TENANT.fullmatch), st.sampled_from(Role)))
def test_a_token_is_its_lines(roles: dict[str, Role]) -> None:
    """Whatever identities a file has, each token is that of its own line, and another one is nobody's."""
    made = {tenant: auth.new_token(tenant, role, "a comment  with spaces") for tenant, role in roles.items()}
    read = auth.parse_tokens({auth.TOKENS: "\n".join(line for _, line in made.values()).encode()})

    for tenant, (token, _) in made.items():
        assert read.bearer(token) == Identity(tenant, roles[tenant])
        assert read.bearer(token + "x") is None
    assert read.bearer("") is None


def test_a_certificates_line(tmp_path: Path) -> None:
    """A certificate's name can be given another tenant and role."""
    listed = auth.load_tokens(written(tmp_path, "ops admin certificate:spiffe://example/ops  the operators\n")).value

    assert listed.certificate("spiffe://example/ops") == Identity("ops", Role.ADMIN)
    assert listed.certificate("acme") is None


def test_too_many_lines_are_refused() -> None:
    """Every token costs every call."""
    with pytest.raises(Unusable, match="at most 1024"):
        auth.parse_tokens({auth.TOKENS: b"#\n" * 1025})


def test_the_command_makes_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What goes to stdout is a line of the file, for the token that goes to stderr; a bad tenant makes none."""
    assert auth.token_command("token", ["acme", "tenant", "night batches"]) == 0
    made = capsys.readouterr()
    assert auth.load_tokens(written(tmp_path, made.out)).value.bearer(made.err.strip()) == Identity("acme", Role.TENANT)

    with pytest.raises(SystemExit, match="2"):
        auth.token_command("token", ["two words", "tenant"])
    assert "printable ASCII" in capsys.readouterr().err
