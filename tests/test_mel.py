"""Log-mel spectrograms equal librosa's, and the mel of a crop is the crop of the mel."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavear import audio
from wavear.mel import spectrogram
from wavear.mel.spectrogram import MelConfig, log_mel, mel_filter_bank

# Both sides compute in float64; ours rounds to float32 at the end: half a bit of the largest
# values (16: 9.5e-7).
ROUNDING = 2e-6

CONFIGS = {
    "default": MelConfig(),
    "r9y9": MelConfig(centre="start", log_base="10", floor=1e-10, fmin=125, fmax=7600),
    "librosa-default": MelConfig(
        n_fft=2048,
        window_length=2048,
        hop_length=512,
        centre="start",
        padding="zeros",
        bands=128,
        fmax=None,
        power=2,
        log_base="db",
        floor=1e-10,
    ),
    "fatchord": MelConfig(
        n_fft=2048,
        window_length=1100,
        hop_length=275,
        centre="start",
        fmin=40,
        fmax=None,
        log_base="db",
        scale=0.01,
        shift=1,
        clip=(0, 1),
    ),
    "short-window-odd-hop": MelConfig(
        n_fft=512, window_length=399, hop_length=111, bands=40, window="hamming"
    ),
    "odd-everything": MelConfig(
        n_fft=501, window_length=501, hop_length=100, bands=17, window="blackman"
    ),
    "htk-no-norm": MelConfig(
        sample_rate=8000, fmax=4000, mel_scale="htk", norm=None, bands=20, log_base="none"
    ),
    "hop-is-window": MelConfig(
        n_fft=256, window_length=256, hop_length=256, bands=20, window="rectangular"
    ),
    "raised-bins": MelConfig(power_offset=1e-3),
    "floored-bins": MelConfig(power_floor=1e-2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def sound(samples: int, batch: int = 1) -> torch.Tensor:
    """Return a sweep that fades over faint noise, so that loud and quiet bands are neighbours."""
    time = torch.arange(samples, dtype=torch.float64) / 22050
    sweep = 0.7 * torch.sin(2 * torch.pi * (100 * time + 800 * time**2)) * torch.exp(-3 * time)
    return (sweep + 1e-3 * torch.randn(batch, samples, dtype=torch.float64)).float()


def from_librosa(waveform: np.ndarray, config: MelConfig) -> np.ndarray:
    """Compute the same mel with librosa and NumPy's padding, in float64."""
    window = {"rectangular": "boxcar"}.get(config.window, config.window)
    before = (
        config.n_fft // 2 if config.centre == "start" else (config.n_fft - config.hop_length) // 2
    )
    mode = "reflect" if config.padding == "reflect" else "constant"
    padded = np.pad(waveform.astype(np.float64), (before, config.n_fft), mode=mode)
    spectrum = librosa.stft(
        padded,
        n_fft=config.n_fft,
        hop_length=config.hop_length,
        win_length=config.window_length,
        window=window,
        center=False,
        dtype=np.complex128,
    )
    bins = np.maximum(np.abs(spectrum) ** 2 + config.power_offset, config.power_floor) ** (
        config.power / 2
    )
    filters = librosa.filters.mel(
        sr=config.sample_rate,
        n_fft=config.n_fft,
        n_mels=config.bands,
        fmin=config.fmin,
        fmax=config.fmax,
        htk=config.mel_scale == "htk",
        norm=config.norm,
        dtype=np.float64,
    )
    value = np.maximum(filters @ bins, config.floor)
    log = {
        "e": np.log,
        "10": np.log10,
        "db": lambda x: 20 / config.power * np.log10(x),
        "none": lambda x: x,
    }[config.log_base]
    result = log(value) * config.scale + config.shift
    if config.clip:
        result = result.clip(*config.clip)
    return result[:, : len(waveform) // config.hop_length]


@configs
def test_filter_bank_equals_librosa(config):
    theirs = librosa.filters.mel(
        sr=config.sample_rate,
        n_fft=config.n_fft,
        n_mels=config.bands,
        fmin=config.fmin,
        fmax=config.fmax,
        htk=config.mel_scale == "htk",
        norm=config.norm,
        dtype=np.float64,
    )
    # The largest weight is near 0.05 (normalised) or 1: float64 with some digits lost to 10**x and
    # exp.
    np.testing.assert_allclose(mel_filter_bank(config).numpy(), theirs, rtol=0, atol=1e-13)


@configs
@pytest.mark.parametrize("samples", [12_345, 4000, 700], ids=str)
def test_equals_librosa(config, samples):
    waveform = sound(samples)
    theirs = from_librosa(waveform[0].numpy(), config)
    np.testing.assert_allclose(
        log_mel(waveform, config)[0].numpy(), theirs, rtol=1e-6, atol=ROUNDING
    )


@pytest.mark.parametrize(
    "name", ["kerstin_de", "ljspeech_mini", "fsdd", "librivox_fr_multi", "salamander_piano"]
)
def test_equals_librosa_on_real_audio(data_dir, name):
    paths = [
        path
        for path in sorted((data_dir / name).rglob("*"))
        if path.suffix in (".wav", ".flac", ".mp3", ".ogg")
    ]
    for path in paths[:: len(paths) // 3]:
        rate = audio.info(path).sample_rate
        waveform = audio.read(path, frames=rate * 4)
        config = MelConfig(sample_rate=rate, bands=40, fmax=min(8000, rate / 2))
        theirs = from_librosa(waveform.numpy(), config)
        np.testing.assert_allclose(
            log_mel(waveform[None], config)[0].numpy(), theirs, rtol=0, atol=ROUNDING
        )


@configs
def test_as_many_frames_as_whole_hops(config):
    hop = config.hop_length
    for samples in [hop, hop + 1, 2 * hop - 1, 2 * hop, 7 * hop - 1, 7 * hop, 7 * hop + 1, 5000]:
        assert log_mel(sound(samples), config).shape == (1, config.bands, samples // hop)


@configs
def test_any_short_waveform_has_a_mel(config):
    # Mirroring a constant any number of times leaves it: all frames equal those of a long one.
    hop = config.hop_length
    if config.padding == "reflect":
        long = log_mel(torch.full((1, 20 * hop), 0.3), config)
        short = log_mel(torch.full((1, hop), 0.3), config)
        torch.testing.assert_close(short[..., 0], long[..., 10], rtol=1e-6, atol=1e-5)
    one_hop = sound(hop)
    theirs = from_librosa(one_hop[0].numpy(), config)
    np.testing.assert_allclose(
        log_mel(one_hop, config)[0].numpy(), theirs, rtol=1e-6, atol=ROUNDING
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    seed=st.integers(0, 2**31),
    frames=st.integers(8, 30),
    data=st.data(),
)
def test_mel_of_a_crop_is_the_crop_of_the_mel(name, seed, frames, data):
    config = CONFIGS[name]
    hop, context = config.hop_length, config.context_frames
    torch.manual_seed(seed)
    waveform = sound(frames * hop + data.draw(st.integers(0, hop - 1)))
    first = data.draw(st.integers(0, frames - 1))
    last = data.draw(st.integers(first + 1, frames))
    whole = log_mel(waveform, config)
    # Use as much context as there is; a crop that reaches an end of the waveform has its edge
    # there, too.
    before = min(context, first)
    end = (last + context) * hop
    crop = waveform[:, (first - before) * hop : end if end <= waveform.shape[1] else None]
    part = log_mel(crop, config)[..., before : before + last - first]
    # The same float64 sums over the same samples, whose order in memory may differ.
    torch.testing.assert_close(part, whole[..., first:last], rtol=1e-6, atol=ROUNDING)


@configs
def test_context_is_no_larger_than_needed(config):
    left, right = config.window_span
    assert (
        config.context_samples - config.hop_length
        < max(left, right - config.hop_length)
        <= config.context_samples
    )


@configs
def test_a_frame_depends_on_its_window_and_nothing_else(config):
    hop, frame = config.hop_length, 12
    left, right = config.window_span
    config = replace(config, log_base="none", floor=0.0, clip=None)
    waveform = sound(25 * hop).double()

    def changes(sample: int) -> bool:
        changed = waveform.clone()
        changed[0, sample] += 10.0
        return not torch.equal(
            log_mel(changed, config)[..., frame], log_mel(waveform, config)[..., frame]
        )

    first, last = frame * hop - left, frame * hop + right - 1
    assert not changes(first - 1)
    assert not changes(last + 1)
    # The periodic Hann window is 0 at its first sample.
    assert changes(first + 1)
    assert changes(last)


def test_frames_are_centred_where_the_setting_states():
    hop, frame = 256, 10
    click = torch.zeros(1, 20 * hop)
    energies = {}
    for centre in ("middle", "start"):
        config = MelConfig(centre=centre, log_base="none", floor=0)
        for offset in range(-hop, hop + 1, hop // 4):
            click.zero_()
            click[0, frame * hop + offset] = 1.0
            energies[centre, offset] = log_mel(click, config)[0, :, frame].sum().item()
        best = max(
            (energy, offset) for (name, offset), energy in energies.items() if name == centre
        )[1]
        assert best == {"middle": hop // 2, "start": 0}[centre]


def test_a_batch_is_its_members():
    waveform = sound(5000, batch=3)
    together = log_mel(waveform, MelConfig())
    for row in range(3):
        # FFTs of another number of frames may run in another order.
        torch.testing.assert_close(
            together[row], log_mel(waveform[row : row + 1], MelConfig())[0], rtol=0, atol=ROUNDING
        )


def test_blocks_of_a_long_recording_equal_the_whole(monkeypatch):
    waveform = sound(30_000, batch=2)
    whole = log_mel(waveform, MelConfig())
    monkeypatch.setattr(spectrogram, "BLOCK_FRAMES", 7)
    torch.testing.assert_close(log_mel(waveform, MelConfig()), whole, rtol=0, atol=ROUNDING)


def test_type_and_gradient():
    waveform = sound(3000).requires_grad_()
    assert log_mel(waveform, MelConfig()).dtype == torch.float32
    assert log_mel(waveform.double(), MelConfig()).dtype == torch.float64
    assert not log_mel(waveform, MelConfig()).requires_grad


def test_autocast_does_not_change_the_mel():
    waveform = sound(3000)
    exact = log_mel(waveform, MelConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(waveform, MelConfig()), exact)


def test_silence_is_the_floor():
    values = log_mel(torch.zeros(1, 5000), MelConfig())
    torch.testing.assert_close(values, torch.full_like(values, np.log(1e-5)))


def test_bands_without_a_bin_cause_a_warning():
    with pytest.warns(
        UserWarning, match=r"mel bands \[\d.*\] hold no bin of an n_fft of 256: use a larger n_fft"
    ):
        mel_filter_bank(MelConfig(n_fft=256, window_length=256, hop_length=64, bands=80))


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(1, 1, 5000), r"shape \(1, 1, 5000\), expected \(B, T\)"),
        (torch.zeros(1, 255), r"255 samples, a mel needs at least one hop \(256\)"),
        (torch.zeros(1, 0), r"0 samples, a mel needs at least one hop"),
        (torch.zeros(1, 5000, dtype=torch.int16), "int16, expected float32 or float64"),
        (torch.zeros(1, 5000, dtype=torch.float16), "float16, expected float32 or float64"),
        (np.zeros((1, 5000), dtype=np.int16), "int16, expected float32 or float64"),
        (torch.full((1, 5000), torch.nan), "NaN or infinity"),
        (torch.full((1, 5000), torch.inf), "NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_waveforms(waveform, message):
    with pytest.raises(ValueError, match=message):
        log_mel(waveform, MelConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_rate": 0}, "sample_rate is 0, expected 1000 to 384000 Hz"),
        ({"sample_rate": 22050.0}, "sample_rate is 22050.0, expected an integer"),
        ({"sample_rate": 500_000}, "sample_rate is 500000, expected 1000 to 384000 Hz"),
        ({"n_fft": 1}, "n_fft is 1, expected 2 to 65536"),
        ({"window_length": 2048}, r"window_length is 2048, expected 1 to n_fft \(1024\)"),
        ({"hop_length": 1025}, r"hop_length is 1025, expected 1 to window_length \(1024\)"),
        ({"hop_length": True}, "hop_length is True, expected an integer"),
        ({"bands": 600}, r"bands is 600, expected 1 to n_fft // 2 \+ 1 \(513\)"),
        ({"bands": -3}, "bands is -3, expected 1 to n_fft"),
        ({"fmin": -1}, "fmin is -1.0, expected 0 to less than 11025.0 Hz"),
        (
            {"fmin": 9000},
            r"fmax is 8000.0, expected more than fmin \(9000.0\) and at most 11025.0 Hz",
        ),
        ({"fmax": 12000}, "fmax is 12000.0, expected more than fmin .* at most 11025.0"),
        ({"fmax": float("nan")}, "fmax is nan, expected a finite number"),
        ({"fmax": "8000"}, "fmax is '8000', expected a finite number"),
        ({"window": "hanning"}, "window is 'hanning', expected 'hann' or 'hamming'"),
        ({"centre": True}, "centre is True, expected 'middle' or 'start'"),
        ({"padding": "constant"}, "padding is 'constant', expected 'reflect' or 'zeros'"),
        ({"mel_scale": "bark"}, "mel_scale is 'bark', expected 'slaney' or 'htk'"),
        ({"norm": "area"}, "norm is 'area', expected 'slaney' or None"),
        ({"log_base": 10}, "log_base is 10, expected 'e' or '10' or 'db' or 'none'"),
        ({"power": 3}, r"power is 3.0, expected 1 \(magnitude\) or 2 \(power\)"),
        ({"floor": 0}, "floor is 0.0, expected more than 0 before a logarithm"),
        ({"floor": -1}, "floor is -1.0, expected 0 or more"),
        ({"power_offset": -1}, "power_offset is -1.0, expected 0 or more"),
        ({"scale": 0}, "scale is 0.0, expected a number other than 0"),
        ({"shift": float("inf")}, "shift is inf, expected a finite number"),
        ({"clip": (1, 0)}, r"clip is \(1.0, 0.0\), expected the lesser number first"),
        ({"clip": 4}, "clip is 4, expected None or two numbers"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=f"^MelConfig: {message}"):
        MelConfig(**fields)


@configs
def test_survives_json(config):
    copy = MelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert copy == config
    assert hash(copy) == hash(config)


def test_from_dict_names_the_wrong_field():
    fields = MelConfig().to_dict()
    with pytest.raises(ValueError, match="unknown fields hop, n_mels; known"):
        MelConfig.from_dict({**fields, "hop": 256, "n_mels": 80})
    with pytest.raises(ValueError, match="lacks the fields hop_length, fmax"):
        MelConfig.from_dict(
            {name: value for name, value in fields.items() if name not in ("hop_length", "fmax")}
        )
    with pytest.raises(ValueError, match=r"power is 3\.0"):
        MelConfig.from_dict({**fields, "power": 3})
    with pytest.raises(ValueError, match="a dictionary of fields, not 7"):
        MelConfig.from_dict(7)  # pyright: ignore[reportArgumentType]


def test_numbers_are_canonical():
    numbers: dict[str, Any] = {"fmin": 0, "fmax": np.float32(8000), "hop_length": np.int64(256)}
    config = MelConfig(**numbers)
    assert config == MelConfig()
    assert json.dumps(config.to_dict()) == json.dumps(MelConfig().to_dict())


@pytest.mark.cuda
@configs
def test_equal_on_the_gpu(config):
    waveform = sound(12_345, batch=2)
    ours = log_mel(waveform.cuda(), config)
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), log_mel(waveform, config), rtol=1e-6, atol=ROUNDING)
