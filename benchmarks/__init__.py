"""What revwire costs and saves, measured.

Each file here is a program (`python -m benchmarks.memory --help`); code that they share is in `benchmarks.shared`, and
what they found in the folder `results`.
"""
