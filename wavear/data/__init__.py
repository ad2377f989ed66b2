"""Recordings for training: manifests and folders, shards, the index, crops, published corpora."""
