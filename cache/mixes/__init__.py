"""Random mixes: what is drawn, the files, the folder."""
