"""Measure how fast networks generate on this machine."""
