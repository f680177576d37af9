"""Networks that separate: the interface, and one file for each separator."""
