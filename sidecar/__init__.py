"""The sidecar: admits, orders, tags, journals, dispatches in order, compares, replays. The only public door.

    generation, reading   the public services
    access                which items a caller may see
    admission             what can refuse a request before it has a number
    core/                 what happens next, decided purely
    dispatcher            performs what the core decides
    work, calls           an admitted item, and who waits for it (what they were sent: ostinato.progress)
    link                  the one ordered stream to the service
    outcomes              from an item's end to what its callers are told
    rerun                 runs of recorded inputs, and their comparison with the record
    checks                what asks for them: audits, canaries, replays
    collisions            how an answer was sampled; unseeded answers that are equal
    divergence/           verdicts, counted and tested
    gateway               an OpenAI gateway's protocol over Generation
    journal/              what is durable
    observer, metrics     what is seen of it all
    high_water            where the journal stood, outside of it
    commands              what an operator does to a journal
    config, opening, __main__   settings and wiring

A request's way: admission → core (its turn among tenants) → journal (its numbers are durable) → core (its turn among numbers)
→ link → service → link → journal (its outcome is durable) → caller.
"""

import serving  # noqa: F401  # before any import of gRPC, which it tells to be silent
