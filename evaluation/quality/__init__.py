"""Quality through lm-evaluation-harness: the model it asks, the tasks it asks, and what two models' answers differ by."""
