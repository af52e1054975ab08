"""The `ostinato` command.

    app        all commands
    session    options and exit codes that commands share
    show       what is printed: lines, tables, JSON, errors
    generate   generate
    chat       chat
    journal    get, tail, head, cancel, model, tokenize
    replay     replay
    report     report; its charts are in charts
    verify     verify
    challenge  challenge
    serve      serve, service, sidecar

Exit codes: 0 success; 1 a call or an item failed, a replay diverged, a proof is not consistent, an alarm is up; 2 wrong usage,
or a request that the sidecar calls invalid; 3 a replay found no divergence, but could not compare every item, or a proof is
consistent and not proved; 4, 5 and 6 a proof is not chained, not signed, contradicted by a witness; 130 interrupted.
"""

import io
import os
import signal
import sys


def main() -> None:
    """The entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until a command runs, so that a Ctrl-C during the imports ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is loaded: its own messages repeat ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    from ostinato.cli.app import app

    app()
