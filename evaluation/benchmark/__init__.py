"""Measurements of the engine beside its peers; nothing here is needed to run it."""
