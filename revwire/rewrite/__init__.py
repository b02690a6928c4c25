"""From a plan to a model that runs it: generated forwards, class swaps, and the way back."""
