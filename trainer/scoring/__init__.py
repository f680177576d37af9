"""Score estimates."""
