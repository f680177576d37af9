"""The commands of flsep-precompute."""
