"""Find the tracks of a corpus and decode their audio."""
