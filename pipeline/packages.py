"""Versions of the packages that decide what is stored."""

import importlib.metadata

_PACKAGES = ("flsep", "numpy", "h5py", "scipy", "soxr", "av", "soundfile", "tensorflow")


def list_packages() -> dict[str, str]:
    """Return those versions by package name."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
