"""The command line: ``descentlab …``."""
