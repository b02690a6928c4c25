"""What will be rewired, and how each step will run: chains, dials, slices, transitions; a plan is data."""
