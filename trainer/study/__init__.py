"""Compare scored runs."""
