"""A campaign of spoilt checkpoints; see `tests.fuzz.__main__`."""
