"""What revwire costs and saves, measured: each module is a program (`python -m benchmarks.memory --help`)."""
