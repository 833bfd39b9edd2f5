"""What measures the engine beside its peers; nothing here is needed to run it."""
