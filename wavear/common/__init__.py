"""Parts that know nothing about audio: atomic files, the cache of compiled code."""
