"""Score estimates against their references."""
