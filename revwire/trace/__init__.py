"""One module's forward as an fx graph, with example values at every node and a guard for all that it read."""
