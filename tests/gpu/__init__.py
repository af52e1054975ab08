"""What only a GPU can show.

python -m tests.gpu.smoke MODEL     the engine alone, in this process: loads, four prompts, everything it says of itself
python -m tests.gpu MODEL           the real service, through gRPC: exact, stock, restart, sabotage, speed

traffic    targets, whose answers are compared, and their neighbours
stack      the programs, and two ways to ask them: the service's own stream, or a client through a sidecar
parts      what is measured
"""
