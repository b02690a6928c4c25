"""The command `revwire`: parse, call, print."""
