"""The training programs: configuration, one loop, losses, checkpoints, samples, the report."""
