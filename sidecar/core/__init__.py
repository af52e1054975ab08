"""The sequencing core: what happens next, decided purely.

`Entrance.step(event, now)` takes one event and returns effects in the order in which they are to be performed; behind it stands
`Sequencer`, whose `step` is alike. Neither has a clock, disk, network or randomness in it, so a simulation runs these very
classes.
"""
