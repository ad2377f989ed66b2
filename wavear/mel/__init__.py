"""Mel spectrograms: configuration, computation, presets, conversion, detection of foreign mels."""
