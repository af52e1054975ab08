"""The server framework of the two programs. The client's package never imports it.

    settings  a frozen dataclass from flags, environment and a file, checked once
    logs      one line an event, as text or as JSON
    files     files that are used only if no other user can have changed them, and read again when they change
    metrics   a registry, and the page it is scraped from
    program   one event loop, signals, exit codes
    auth      who calls: identities, tokens, certificates (tls)
    hop       how service and sidecar prove to each other who they are
    handlers  what stands between gRPC and every handler: identity, bad bytes, errors, writes, counts
    intake    what a server lets in: connections, calls, requests and their memory
    server    a gRPC server: addresses, health, start, stop; and the probe that asks for its health

A program's __main__ loads its settings, sets up its logs, and passes an async main to program.run.
"""

import os

# gRPC's core writes to stderr by itself; what matters reaches us as errors. It reads this variable when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
