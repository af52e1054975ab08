"""The journal: every durable entry, in one order. No module outside this package imports a database.

Read in this order: `model` (drafts, entries, errors), `ledger` (turns drafts into chained entries; pure), `writer` (the group
commit: what the rest of the sidecar calls), `store` (what is read and written in the tables), `sql` (their schema, start and
maintenance), `sqlite` (a file for one sidecar), `postgres` (a log that several sidecars share). `mark` finds a journal that
lost its end, and `derived` tables that are not what the entries say.

For the operator: `maintenance` (verify, rebuild, prune, redact), `transfer` (export, import), `diagnosis` (why a file cannot
be used).
"""
