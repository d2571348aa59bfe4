"""The protocols every other room is written against. Importing this package imports no torch."""
