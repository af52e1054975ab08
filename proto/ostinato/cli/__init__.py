"""The `ostinato` command: everything the client can do, for people and for scripts.

    session    the options of every command, and how a command ends
    show       what is printed: lines, tables, JSON, errors
    files      what is read, and the places in it that errors name
    prompts    where prompts come from
    options    options that commands share, above all how to sample
    generate   generate
    batches    prompts as requests, some at once
    bulk       generate --output
    answers    the file that it writes
    stream     generate --stream
    journal    get, tail, head
    replay     replay
    resume     what a replay has done so far
    difference two runs side by side
    control    cancel, model, tokenize
    report     report
    page       report --html
    verify     verify
    serve      serve
    running    what it runs
    launch     programs as children
    programs   service, sidecar: where the two programs are

Exit codes: 0 all well; 1 a call or an item failed, a replay diverged, a proof is unsound, an alarm is up; 2 wrong usage;
3 a replay found nothing that diverged, and something that it could not judge; 130 interrupted.
"""

import io
import os
import signal
import sys


def main() -> None:
    """The entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until a command runs: a Ctrl-C amid the imports ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is loaded: it would say in its own words what we say in ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model writes what a terminal's encoding may lack
    from ostinato.cli.app import app

    app()
