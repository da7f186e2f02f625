"""Machinery of the loop: the model and its checkpoints, ranks and sharding, warm-up, evaluation."""
