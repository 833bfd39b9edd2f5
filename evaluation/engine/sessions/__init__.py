"""Conversations and plans on top of the engine."""
