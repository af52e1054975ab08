"""Wrong usage of every command, and the options that all have."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from ostinato.cli.app import app

from tests.ostinato.fake import Terminal


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("generate", "no prompt"),
        ("generate a --stream -n 2", "--stream: shows one prompt, not 2"),
        ("generate a --require-grade best", "--require-grade: 'best' is not one of exact, serial, best-effort"),
        ("generate a --seed -1", "--seed: -1 is not from 0 to 18446744073709551615"),
        ("generate a --seed x", "--seed"),
        ("generate a --regex a --json-schema {}", "give one of them"),
        ("generate a --json-schema @/nowhere", "--json-schema: "),
        ("generate a --tools @/nowhere", "--tools: "),
        ("generate --messages {", "--messages: is not JSON"),
        ("""generate --messages '[{"role": "user", "role": "user"}]'""", "--messages: role: given twice"),
        (
            """generate --messages '[{"role": "user", "content": [{"type": "image_url"}]}]'""",
            "images, audio and files are not supported",
        ),
        ("generate a --tools []", "--tools: for chats: add --chat"),
        ("generate a --key=", "Invalid value for '--key': is empty"),
        ("generate a --parse x", "--parse: 'x' is not one of tools, reasoning"),
        ("generate --file /dev/null", "--file: /dev/null has no prompt"),
        ("generate --file /nowhere", "/nowhere: No such file"),
        ("generate a --timeout 0", "--timeout: must be above 0 and at most 1e+09 seconds, not 0.0"),
        ("generate a --timeout 1e10", "--timeout: must be above 0"),
        ("generate a --concurrency 100000000000000000000", "--concurrency"),
        ("generate a --batch 0", "--batch"),
        ("generate a --nonsense", "--nonsense"),
        ("chat --stop-token-id -1", "--stop-token-id: -1 is not from 0 to"),
        *((f"{each} -t localhost", "--target: must be host:port") for each in ("head", "generate -", "verify /")),
        ("--tls-ca /nowhere head", "--tls-ca: /nowhere: No such file"),
        ("--tls-key /dev/null head", "--tls-certificate, key: one needs the other"),
        ("--token-file /nowhere head", "--token-file: /nowhere: No such file"),
        ("--token-file /dev/null head", "--token-file /dev/null: token: must be printable ASCII"),
        ("--traces x head", "--traces: 'x' is not otlp:http://host:port"),
        ("cancel", "a sequence or a key: give one of them"),
        ("cancel 1 --key k", "a sequence or a key: give one of them"),
        ("cancel 5..3", "5..3: last: 3 is not from 5"),
        ("cancel 0", "0: first: 0 is not from 1"),
        ("get", "a sequence or a key: give one of them"),
        ("get 0", "sequence: 0 is not from 1"),
        ("get --key=", "'--key': is empty"),
        ("get 1 --last", "--last: give no sequence and no --key with it"),
        ("get --last --key k", "--last: give no sequence and no --key with it"),
        ("tail --from -1", "--from"),
        ("replay", "A..B"),
        *((f"replay {each}", "is not a sequence or a range of sequences") for each in ("a..b", "1...3")),
        ("replay 0..3", "0..3: first: 0 is not from 1"),
        ("replay 3..2", "3..2: last: 2 is not from 3"),
        (f"replay 1..{2**64}", f"last: {2**64} is not from 1"),
        ("replay 1..2 --concurrency 65", "--concurrency"),
        *((f"replay 1 --against {each}", "--against: must be host:port") for each in ("localhost", "a:0")),
        *((f"report --confidence {each}", "--confidence") for each in ("0", "1", "95", "nan", "-1")),
        ("verify /", "/: Is a directory"),
        ("verify / --key /nowhere", "--key: /nowhere: No such file"),
        ("verify / --witness /nowhere", "--witness: /nowhere: No such file"),
        ("verify / --witness http://127.0.0.1:1/", "--witness: http://127.0.0.1:1/: [Errno 111] Connection refused"),
        ("verify / --witness 'http://a b/'", "--witness: http://a b/: URL can't contain control characters"),
    ],
)
def test_wrong_usage_is_two(ostinato: Terminal, command: str, why: str) -> None:
    """Wrong usage, a missing or bad value, and a file that cannot be read exit 2; stderr names the option or argument, and
    nothing is sent."""
    result = ostinato(*shlex.split(command))
    assert (result.exit_code, result.stdout) == (2, "")
    assert why in " ".join(result.stderr.split())
    assert ostinato.fake.calls == []


def test_global_options_stand_anywhere(ostinato: Terminal) -> None:
    """Target, --json and --timeout may stand before or after the command; the later wins, and both override OSTINATO_TARGET."""
    elsewhere = Terminal(ostinato.fake, "127.0.0.1:1")

    assert json.loads(elsewhere("head", "-t", ostinato.target, "--json", "--timeout", 9).stdout)["writer"] == "fake"
    assert ostinato("head", OSTINATO_TARGET="127.0.0.1:1").exit_code == 0
    assert CliRunner().invoke(app, ["head"], env={"OSTINATO_TARGET": ostinato.target}).exit_code == 0
    assert ostinato.fake.calls[0].seconds_left == pytest.approx(9, abs=3)


@pytest.mark.parametrize("command", ["replay 1", "challenge -"])
def test_the_sidecar_that_is_away_is_named(ostinato: Terminal, command: str) -> None:
    """If the other sidecar cannot be reached, the hint names it and its option."""
    assert ostinato("generate", "a").exit_code == 0
    result = ostinato(*command.split(), "--against", "127.0.0.1:1", stdin=ostinato("--json", "get", 1).stdout)
    hint = result.stderr.splitlines()[-1]
    assert (result.exit_code, hint) == (1, "  Is a sidecar running at 127.0.0.1:1? Choose another with --against.")
