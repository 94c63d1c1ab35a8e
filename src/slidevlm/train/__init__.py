"""Training: the loop, the exact step, schedules, the optimizer, checkpoints."""
