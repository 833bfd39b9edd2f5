"""How the numbers of an expert's matrix are stored, and how they become numbers that can be multiplied: one file per format."""
