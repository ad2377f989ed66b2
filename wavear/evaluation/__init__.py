"""Evaluation of models; docs/evaluation.md has the definitions."""

import lazy_loader

# `wavear.display` is found here, and imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["display"])
