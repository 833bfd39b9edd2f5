"""Frozen weights over several processes."""
