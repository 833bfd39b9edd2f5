"""Launchers: the command line and the whole pipeline."""
