"""Pretrained models whose embeddings inform the separator."""
