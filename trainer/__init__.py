"""Train X-UMX on precomputed shards, informed by a teacher; separate; score. Needs PyTorch."""
