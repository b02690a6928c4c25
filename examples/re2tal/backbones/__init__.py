"""Video backbones: from a clip to features over time. Each comes from its own source and knows nothing of rewiring."""
