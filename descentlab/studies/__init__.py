"""One folder per research question."""
