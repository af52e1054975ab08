"""The `ostinato` command.

    app        all commands
    session    options and exit codes that commands share
    documents  JSON that is read: prompts, and what the commands print
    show       what is printed: lines, tables, JSON, errors
    generate   generate
    chat       chat
    journal    get, tail, head, cancel, model, tokenize
    replay     replay
    report     report; its charts are in charts
    verify     verify
    challenge  challenge
    serve      serve, service, sidecar

docs/using.md has the exit codes.
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
