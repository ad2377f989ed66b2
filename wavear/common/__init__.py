"""Parts that are independent of audio: atomic files, logging, the cache of compiled code."""
