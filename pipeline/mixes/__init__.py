"""Render random mixes for the teacher."""
