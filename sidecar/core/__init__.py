"""The core of the order. Pure: no clock, disk, network or randomness, so the simulation runs these classes.

`step(event, now)` takes one event and returns the effects, which the caller performs in that order. `AdmissionQueue.step` (in
`fairness`) puts batches of several tenants in a fair order and passes all else to `Sequencer.step`, which decides the order of
submission. `events` has the events and effects, `window` the bounds and the engine's capacity, `reruns` the runs without a
sequence.
"""
