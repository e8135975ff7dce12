"""A run's directory: the run itself, its checkpoints, metrics, progress, report and pages."""
