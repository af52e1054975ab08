"""The sidecar: the public door in front of one service. It gives each request its place in a durable order.

    pipeline              the life of a request; performs what the core decides
    core/                 what happens next: a pure state machine
    item, answers         an admitted item; those who wait for it, and what they are answered
    api, admission        the public services, and what refuses a request before it has a sequence
    link, preparing       the one ordered stream to the service, and the requests to prepare on it
    turns                 long work, a few at a time, in turns between tenants
    journal/              what is durable
    observe               metrics, log lines and spans
    rerun, checks         runs without a sequence, compared with the record: replays, audits, canaries
    collisions            equal answers of different seeds
    divergence/           verdicts, counted and judged
    gateway               an OpenAI gateway's protocol over Generation
    held                  bytes held for callers, and their bounds
    quota                 bytes of the journal by tenant
    witness               publishes signed heads
    fingerprints          those of the engine, by digest
    commands              the operator's commands for a journal
    config, opening, __main__   settings and wiring

A request passes api, pipeline, link (prepare), core (its turn among tenants), journal (its sequences are durable), core (its
turn in the order), link, service, link, journal (its outcome is durable) and answers.
"""

import serving  # noqa: F401  # before any import of gRPC, which it tells to be silent
