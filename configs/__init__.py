"""Configuration: one strict loader and the YAML files it reads."""
