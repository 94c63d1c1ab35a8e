"""Other projects' checkpoints, under our names. One file a project."""
