"""wavear: autoregressive waveform models, WaveNet first."""

import lazy_loader

__version__ = "0.1.0"
# PEP 562: the names in __init__.pyi, each imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
