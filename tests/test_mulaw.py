"""Mu-law codes equal torchaudio's, and survive decoding and encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchaudio.functional import mu_law_encoding

from wavear import audio
from wavear.audio.mulaw import mulaw_decode, mulaw_encode, silence_code

ODD_AND_EVEN = [2, 3, 7, 255, 256, 1000, 4096, 65535, 65536]


def test_every_code_survives_the_round_trip():
    beyond = [2**bits for bits in range(11, 17)] + [1025, 3001, 9999, 44100, 65535]
    wrong = []
    for classes in [*range(2, 1025), *beyond]:
        codes = torch.arange(classes)
        if not torch.equal(mulaw_encode(mulaw_decode(codes, classes), classes), codes):
            wrong.append(classes)
    assert wrong == []


@pytest.mark.parametrize("classes", ODD_AND_EVEN)
def test_codes_equal_those_of_torchaudio(classes):
    # Equal, not close: the same operations in the same order, so that a sample on the edge of two
    # codes gets the same.
    waveform = torch.rand(200_000) * 2 - 1
    assert torch.equal(mulaw_encode(waveform, classes), mu_law_encoding(waveform, classes))
    quiet = torch.arange(-32768, 32768) / 32768  # all values of 16-bit files
    assert torch.equal(mulaw_encode(quiet, classes), mu_law_encoding(quiet, classes))
    assert torch.equal(
        mulaw_encode(waveform.double(), classes), mu_law_encoding(waveform.double(), classes)
    )


@pytest.mark.parametrize("classes", ODD_AND_EVEN)
def test_waveforms_equal_the_formula(classes):
    mu = classes - 1.0
    y = 2 * np.arange(classes) / mu - 1
    formula = np.sign(y) * np.expm1(np.abs(y) * np.log1p(mu)) / mu
    # float32 holds the exponent to 11 * 6e-8, which is what is left of the result, relative to 1 +
    # mu * |x|.
    np.testing.assert_allclose(
        mulaw_decode(torch.arange(classes), classes).numpy(), formula, rtol=0, atol=2e-6
    )
    ends = mulaw_decode(torch.tensor([0, classes - 1]), classes)
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]), rtol=0, atol=1.2e-7)
    assert ends.abs().max() <= 1


@pytest.mark.parametrize("classes", ODD_AND_EVEN)
def test_rounds_to_the_nearest_code(classes):
    waveform = torch.rand(10_000, dtype=torch.float64) * 2 - 1
    codes = mulaw_encode(waveform, classes)
    bent = (
        torch.sign(waveform) * torch.log1p((classes - 1) * waveform.abs()) / np.log1p(classes - 1)
    )
    assert ((bent + 1) / 2 * (classes - 1) - codes).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize("classes", ODD_AND_EVEN)
def test_silence(classes):
    assert silence_code(classes) == mulaw_encode(torch.zeros(()), classes).item()
    silence = mulaw_decode(torch.tensor(silence_code(classes)), classes).item()
    if classes % 2:
        assert silence == 0
    else:
        half_a_step = np.expm1(np.log1p(classes - 1) / (classes - 1)) / (classes - 1)
        assert silence == pytest.approx(half_a_step, rel=1e-3)


def test_values_outside_full_scale_are_clamped():
    beyond = torch.tensor([-torch.inf, -7.0, -1.0, 1.0, 1.0001, torch.inf])
    assert mulaw_encode(beyond).tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_numpy_in_numpy_out(dtype):
    waveform = np.linspace(-1, 1, 99).astype(dtype)[::-1]
    waveform.flags.writeable = False
    codes = mulaw_encode(waveform)
    assert isinstance(codes, np.ndarray)
    assert codes.dtype == np.int64
    same = waveform.astype(np.float64 if waveform.dtype.itemsize == 8 else np.float32)
    np.testing.assert_array_equal(codes, mulaw_encode(torch.from_numpy(same)).numpy())
    back = mulaw_decode(codes[::-1])
    assert isinstance(back, np.ndarray)
    assert back.dtype == np.float32


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
def test_any_shape(shape):
    codes = mulaw_encode(torch.zeros(shape))
    assert codes.shape == shape
    assert codes.dtype == torch.int64
    back = mulaw_decode(codes)
    assert back.shape == shape
    assert back.dtype == torch.float32
    assert mulaw_encode(np.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_value(dtype):
    waveform = torch.linspace(-1, 1, 1001).to(dtype)
    assert torch.equal(mulaw_encode(waveform, 65536), mulaw_encode(waveform.float(), 65536))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_integer_type(dtype):
    codes = torch.arange(128)
    assert torch.equal(mulaw_decode(codes.to(dtype)), mulaw_decode(codes))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: mulaw_encode(torch.tensor([0.0, torch.nan])), "NaN"),
        (lambda: mulaw_encode(np.array([np.nan])), "NaN"),
        (lambda: mulaw_encode(torch.zeros(3, dtype=torch.int16)), "int16, expected floating point"),
        (lambda: mulaw_encode(np.zeros(3, dtype=np.int16)), "int16, expected floating point"),
        (lambda: mulaw_encode(np.array(["a"])), "cannot be read as numbers"),
        (lambda: mulaw_decode(torch.tensor([0, 256])), r"from 0 to 256, outside \[0, 256\)"),
        (lambda: mulaw_decode(torch.tensor([-1, 7]), 1000), r"from -1 to 7, outside \[0, 1000\)"),
        (lambda: mulaw_decode(np.array([300])), "from 300 to 300"),
        (lambda: mulaw_decode(torch.tensor([0.5])), "float32, expected integers"),
        (lambda: mulaw_decode(torch.tensor([True])), "bool, expected integers"),
        (lambda: silence_code(1), "classes is 1, expected 2 to 65536"),
        (lambda: mulaw_encode(torch.zeros(3), 65537), "classes is 65537, expected 2 to 65536"),
        (lambda: silence_code(256.0), "classes is 256.0, expected an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: mulaw_encode(torch.zeros(3), True), "classes is True"),
    ],
)
def test_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_real_recordings(data_dir):
    for path in sorted(data_dir.rglob("*.wav"))[::200]:
        waveform = audio.read(path)
        for classes in (256, 1024):
            assert torch.equal(
                mulaw_encode(waveform, classes), mu_law_encoding(waveform, classes)
            ), path


@pytest.mark.cuda
def test_round_trip_on_the_gpu():
    for classes in ODD_AND_EVEN:
        codes = torch.arange(classes, device="cuda")
        assert torch.equal(mulaw_encode(mulaw_decode(codes, classes), classes), codes)
