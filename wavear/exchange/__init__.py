"""Exchange with other programs: export to ONNX, import of other projects' checkpoints."""
