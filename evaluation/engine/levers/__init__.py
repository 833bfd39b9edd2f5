"""Levers: opt-in rules by which a router's choice takes account of what is resident. They change outputs."""
