"""What only a GPU can show.

python -m tests.gpu MODEL               the programs, through gRPC: exact, prefix cache, stock, crash, speed and others
python -m tests.gpu.rows MODEL FOLDER   models and settings, two starts and one line each
python -m tests.gpu.tp MODEL            two GPUs that share a model
python -m tests.gpu.preempted MODEL     promises more memory than there is, to test that preemptions are detected
python -m tests.gpu.scoreboard MODEL    determinism tests of other projects; with --engine llama, on CPUs
python -m tests.gpu.bare MODEL          LMDeploy's own pipeline, measured in the same way: the baseline of `speed`

traffic    targets, whose answers are compared, and background requests
fronts     how requests are sent: over the service's stream, or by a client through a sidecar
stack      starts the programs
plan       what the command line asks for, and the results
compare    compares answers
parts      the parts of the check; speed, crash, gap, grammars: further ones
prefix     the prefix cache, compared with a service without one; worth: its gain
shapes     models with random weights
"""
