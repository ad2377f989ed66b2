"""Recordings for training: manifests and folders, shards, the index, crops, published corpora."""

from wavear.data import corpora

__all__ = ["corpora"]  # where `wavear.corpora` finds it
