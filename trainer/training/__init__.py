"""Train a separator."""
