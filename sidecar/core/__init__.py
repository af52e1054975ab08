"""The sequencing core: what happens next, decided purely.

`Sequencer.step(event, now)` takes one event and returns effects in the order in which they are to be performed. It has no
clock, no disk, no network and no randomness, so a simulation runs this very class.
"""
