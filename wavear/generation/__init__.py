"""Generation and scoring: engines, streams, files, pipes."""
