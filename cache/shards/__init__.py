"""Shards: their files, the writer, the reader, the index of a folder."""
