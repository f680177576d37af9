"""Train separators on precomputed shards, informed by a teacher; separate; score."""
