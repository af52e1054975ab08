"""Sidecar and service, unchanged, in a simulated world: clock, network, disk and faults come from one seed.

loop        an event loop with a virtual clock; processes that can be stopped at any step
network     calls and streams with delays, partitions and half-open connections
edges       what the programs get in place of a server, a channel, a thread and a clock
stores      journals that outlive their sidecars: SQLite on a simulated disk, and a log that many sidecars share
history     what clients saw, what the engine saw, what the disk held, and when
plan        a seed, unfolded: jobs and faults
clients     clients that retry
recording   the service, with a record of what reaches its engine and what passes on its stream
world       all of it, from the first start to the last read of the disk
promises    one checker for each promise of docs/order.md
coverage    what a run has come across
mutations   faults in the product, and the promise that each breaks
points      the places where a process can die, and a run that dies there

`python -m tests.simulation` runs seeds; `make sim` runs thousands.
"""
