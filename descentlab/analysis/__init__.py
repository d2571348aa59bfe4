"""Paired statistics, planned contrasts and the measures studies report. Imports no torch."""
