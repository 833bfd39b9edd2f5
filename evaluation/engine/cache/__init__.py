"""Which experts stay: traces, policies, replay. NumPy only."""
