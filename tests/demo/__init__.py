"""`make demo`: both programs on this machine, and what they promise, shown."""
