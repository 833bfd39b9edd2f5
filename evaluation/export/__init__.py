"""Tuned routers in files that other programs read."""
