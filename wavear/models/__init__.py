"""Autoregressive models behind one contract, `AutoregressiveModel`."""
