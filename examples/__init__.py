"""Runnable examples of revwire."""
