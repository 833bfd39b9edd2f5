"""Exact decoding of a mixture-of-experts checkpoint whose experts stay on disk; `loading.load` is the door."""
