"""Data: cohorts on disk, splits, reports, tokens, batches. See docs/architecture.md."""
