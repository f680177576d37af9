"""Plan and build shards from a corpus."""
