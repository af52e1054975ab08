"""How a program of ours is run. The two programs use it; clients never do.

    settings     a frozen dataclass from flags, environment and a file, checked once
    logs         one line per event, for people or for machines
    metrics      our own registry, and the page it is scraped from
    guard        what stands between gRPC and every handler: identity, bad bytes, errors, counts
    identity     who calls, and what they may see
    credentials  what a server shows of itself and asks of callers; tls and tokens are its parts, files what they are read from
    handlers     RPC handlers taken apart, for what stands around them
    server       a gRPC server: start, health, stop
    addresses    where it listens, and why it cannot
    standard     gRPC's own services beside ours, and how they end
    turns        what leaves together
    program      one event loop, signals, exit codes
    probe        health, asked by a command

A program's __main__ loads its settings, sets up its logs, and hands an async main to program.run.
"""

import os

# gRPC's core writes lines of its own to stderr; what matters of them reaches us as errors. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
