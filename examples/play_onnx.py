"""Synthesize audio from a mel with an exported model, by onnxruntime and NumPy alone.

    wavear export runs/mine/best out.onnx
    wavear mel speech.wav --checkpoint runs/mine/best --out mels --npy
    python examples/play_onnx.py out.onnx mels/speech.npy out.wav

The same seed gives the audio of `wavear synthesize` until rounding moves a code.
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime

FRAMES = 16  # mel frames at once: memory, and the delay of a live program


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the matrices are too small to share
    options.log_severity_level = 3  # without a warning for each input that has a default
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def synthesize(path, mel, seed=0):
    """Yield the audio of a mel (bands, frames), float32 in [-1, 1], block by block."""
    path = Path(path)
    block, conditioning = session(path), session(path.with_name(f"{path.stem}-conditioning.onnx"))
    about = json.loads(block.get_modelmeta().custom_metadata_map["wavear"])
    before, after, hop = about["lookback"], about["lookahead"], about["mel"]["hop_length"]
    frames = mel.shape[1]
    padded = np.pad(mel.astype(np.float32), ((0, 0), (before, after)), mode="edge")
    words = np.random.Philox(key=seed).random_raw(frames * hop)
    uniforms = (words >> np.uint64(11)) * 2.0**-53
    names = [output.name for output in block.get_outputs()]
    state = {}  # the first block begins in silence
    for first in range(0, frames, FRAMES):
        last = min(first + FRAMES, frames)
        window = padded[None, :, first : last + before + after]
        (cond,) = conditioning.run(None, {"mel": window})
        given = {"uniforms": uniforms[None, first * hop : last * hop], "cond": cond, **state}
        made = dict(zip(names, block.run(None, given), strict=True))
        state = {name[5:]: made[name] for name in names if name.startswith("next_")}
        yield about["sample_rate"], made["audio"][0]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: play_onnx.py OUT.onnx MEL.npy OUT.wav")
    model, mel, out = sys.argv[1:]
    rate, audio = zip(*synthesize(model, np.load(mel)), strict=True)
    samples = np.round(np.concatenate(audio) * 32768).clip(-32768, 32767).astype("<i2")
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate[0], len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
