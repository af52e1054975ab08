"""Both programs on this machine: `make demo` shows what they promise, `make up` leaves them running."""
