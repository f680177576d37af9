"""Compose and render a small corpus to try flsep on."""
