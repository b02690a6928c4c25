"""Written, tested, and not yet shown to pay: nothing outside of this room depends on it being right to use."""
