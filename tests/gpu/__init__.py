"""What only a GPU can show.

python -m tests.gpu.smoke MODEL         the engine alone, in this process: loads, four prompts, everything it says of itself
python -m tests.gpu MODEL               the real programs, through gRPC: exact, prefix cache, stock, crash, speed and others
python -m tests.gpu.rows MODEL FOLDER   models and settings, one start and one line each
python -m tests.gpu.tp MODEL            two GPUs that share a model
python -m tests.gpu.preempted MODEL     more memory is promised than there is: are preemptions seen?
python -m tests.gpu.scoreboard MODEL    others' determinism tests; with --engine llama, on CPUs
python -m tests.gpu.bare MODEL          LMDeploy's own pipeline, measured like ours: the yardstick of `speed`

traffic    targets, whose answers are compared, and their neighbours
fronts     two ways to ask: the service's own stream, or a client through a sidecar
stack      the programs
plan       what was asked for, and what was found
compare    answers side by side
parts      what is measured of one model; speed, crash: likewise
prefix     the prefix cache: prompts that begin alike, held against those without it; worth: what it is worth
shapes     models with random weights
"""
