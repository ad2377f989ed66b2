"""Address and limits of the page."""

from __future__ import annotations

from dataclasses import dataclass

from wavear.common.errors import WavearError


@dataclass(frozen=True)
class ServeConfig:
    """Where the page is served, and what a client can ask for."""

    host: str = "127.0.0.1"
    """Address to listen on. With any but this machine's own, everybody who reaches it can use the
    page: there is no password and no encryption."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    clients: int = 8
    """Live streams at once, and recordings that are kept."""
    max_megabytes: float = 20.0
    """Largest recording to upload, MB."""
    max_seconds: float = 60.0
    """Longest recording to upload, seconds of audio."""
    upload_timeout: float = 30.0
    """Seconds that an upload may take."""
    buffer: float = 0.3
    """Seconds of audio that are made ahead of what a client has heard: less reacts sooner, more
    bridges longer gaps."""
    weights: str = "float32"
    """float32, or rounded: bfloat16, int8."""
    threads: int | None = None
    """CPU cores to use; all by default."""
    tacotron2: str | None = None
    """Speak texts: a bundle of torchaudio.pipelines, such as TACOTRON2_GRIFFINLIM_CHAR_LJSPEECH.
    Its weights are downloaded the first time. Needs wavear[tts]."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise WavearError(f"port is {self.port}; it must be 0 to 65535")
        if self.clients < 1:
            raise WavearError(f"clients is {self.clients}; it must be at least 1")
        for name in ("max_megabytes", "max_seconds", "upload_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise WavearError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0.05 <= self.buffer <= 10:
            raise WavearError(f"buffer is {self.buffer}; it must be 0.05 to 10 seconds")
