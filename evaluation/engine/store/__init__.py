"""Experts in the files of a checkpoint. No torch."""
