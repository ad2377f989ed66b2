"""The CUDA engines: a graph of the model's own step, and a Triton kernel for WaveNet."""
