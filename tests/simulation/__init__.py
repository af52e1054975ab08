"""Sidecar and service, as they are, in a world whose clock, network, disk and misfortunes come from one seed.

loop        an event loop whose time passes when nothing is left to do; processes that stop where they stand
network     calls and streams that are late, cut off and half-open
edges       what the programs are given in place of a door, a thread and a channel
stores      journals that outlive their sidecars: SQLite on a simulated disk, and a log that many sidecars share
history     what clients saw, what the engine saw, what the disk held, and when
plan        what a seed means: who asks for what, and what goes wrong when
clients     those who ask, and how they try again
watching    the service, with notes of what reaches its engine and what passes on its stream
world       all of it, from the first start to the last look at the disk
promises    one checker for each promise of docs/order.md
mutations   faults put into the product on purpose, and the promise that each breaks
points      the places where a process can die, and a run that dies there

`python -m tests.simulation` runs seeds; `make sim` runs thousands.
"""
