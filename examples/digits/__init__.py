"""Real handwritten digits, a small vision transformer trained on them, and what rewiring it does."""
