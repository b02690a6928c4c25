"""Decides what will be rewired and how each step will run: chains, dials, slices, transitions. The result is data."""
