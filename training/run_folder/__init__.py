"""What a run's folder holds, one file for each thing in it."""
