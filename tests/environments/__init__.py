"""The wheel in clean environments: `python -m tests.environments --help`."""
