"""Several processes that train or evaluate together: this process among them, and one model spread over all."""
