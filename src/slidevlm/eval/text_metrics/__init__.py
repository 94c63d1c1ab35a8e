"""Scores of generated reports, computed from per-report statistics."""
