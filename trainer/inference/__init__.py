"""Separate audio files with a trained model."""
