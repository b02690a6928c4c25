"""Written and tested, but not yet shown to pay. Nothing of it runs unless it is asked for."""
