"""The networks that separate."""
