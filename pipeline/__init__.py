"""The offline stage: stems to HDF5 shards of spectra and teacher embeddings."""
