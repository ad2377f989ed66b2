"""Continuation of a recording: the parallel pass equals stepping, with the same future."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wavear
from wavear import MelConfig, Stream, StreamBatch, WaveNet, WaveNetConfig, audio, mulaw_encode
from wavear.generation.conditioner import UtteranceConditioner
from wavear.generation.engines import make_engine
from wavear.generation.priming import fill
from wavear.generation.settings import candidate_seeds
from wavear.models.sampling import uniforms

ENGINES = [("reference", "float32"), ("numba", "float32"), ("numba", "bfloat16"), ("numba", "int8")]
# Small random models are loud.
loud = pytest.mark.filterwarnings("ignore:the prime is clipped")
NAMES = [f"{engine} {weights}" for engine, weights in ENGINES]
HOP = 20
MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=HOP, bands=5, fmax=4000.0)


def make(**config) -> Any:
    torch.manual_seed(0)
    sizes = {
        "residual_channels": 6,
        "skip_channels": 7,
        "head_channels": 9,
        "conditioning_channels": 5,
    }
    model = WaveNet(
        WaveNetConfig(
            **{"layers": 6, "stacks": 2, "classes": 64, "sample_rate": 8000, **sizes, **config}
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("blocks", "head")):
                parameter.mul_(2.5)
    return model.eval()


def recording(samples: int, batch: int = 1) -> torch.Tensor:
    t = torch.arange(samples) / 8000
    waves = [
        0.4 * torch.sin(2 * torch.pi * 200 * (b + 1) * t) + 0.1 * torch.sin(2000 * t)
        for b in range(batch)
    ]
    return torch.stack(waves)


def mels(batch: int, frames: int) -> torch.Tensor:
    return torch.randn(batch, 5, frames, generator=torch.Generator().manual_seed(1))


# ---- the parallel pass


def test_the_pass_reads_only_the_receptive_field(monkeypatch):
    """Time and memory do not grow with the length of the prime."""
    model = make()
    given = []
    prefill = WaveNet.prefill
    monkeypatch.setattr(WaveNet, "prefill", lambda *a: given.append(a[1].shape) or prefill(*a))
    wavear.generate(model, samples=5, prime=recording(4000)[0])
    assert given == [(1, model.receptive_field)]


@pytest.mark.parametrize("config", [{}, {"kernel_size": 3, "mel": MEL}, {"layers": 1, "stacks": 1}])
@pytest.mark.parametrize("more", [-1, 0, 1, 50])
def test_prime_beyond_the_receptive_field_is_irrelevant(config, more):
    """The state after only the receptive field equals that after the whole prime."""
    model = make(**config).double()
    codes = np.random.default_rng(0).integers(0, 64, (1, max(1, model.receptive_field + more)))
    conditioner = UtteranceConditioner(model)
    if "mel" in config:
        conditioner.push(mels(1, 12)[0].double())
    with torch.inference_mode():
        filled, stepped = (make_engine(model, 1, "reference")[1] for _ in range(2))
        fill(filled, 0, model, codes[0], conditioner)
        stepped.score(codes, conditioner.span(0, codes.shape[1]))
        found, expected = filled.state(0), stepped.state(0)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


# ---- the audio


@pytest.mark.parametrize(
    "settings", [{}, {"mel": MEL}, {"mel": MEL, "speakers": 2}, {"speakers": 2, "kernel_size": 3}]
)
@pytest.mark.parametrize("length", [1, 7, 150])
def test_the_continuation_follows_the_distribution_of_forward(settings, length):
    """Each uniform selects its code from `forward`, given the prime and all codes since."""
    model = make(**settings).double()
    mel = mels(1, 12).double() if "mel" in settings else None
    speaker = 1 if "speakers" in settings else None
    samples = 12 * HOP - length
    prime = recording(length)
    found = wavear.generate(
        model,
        mel,
        samples=None if "mel" in settings else samples,
        speaker=speaker,
        seed=9,
        prime=prime,
        engine="reference",
    )
    assert found.shape == (1, samples)
    codes = mulaw_encode(torch.cat([prime, found], dim=1), 64)
    with torch.no_grad():
        cond = (
            model.condition(mel, None if speaker is None else torch.tensor([1]))
            if model.conditioned
            else None
        )
        cumulative = model(codes, cond).softmax(dim=1).cumsum(dim=1)[0]
    expected = (cumulative <= torch.from_numpy(uniforms(9, 0, length + samples))).sum(dim=0)
    assert torch.equal(expected[length:], codes[0, length:])


@loud
@pytest.mark.parametrize("settings", [{}, {"mel": MEL}, {"speakers": 2}])
@pytest.mark.parametrize(("engine", "weights"), ENGINES, ids=NAMES)
def test_a_recording_made_with_a_seed_continues_identically(settings, engine, weights):
    model = make(**settings)
    mel = mels(1, 15) if "mel" in settings else None
    given = {
        "seed": 5,
        "speaker": 0 if "speakers" in settings else None,
        "engine": engine,
        "weights": weights,
    }
    samples = None if "mel" in settings else 300
    whole = wavear.generate(model, mel, samples=samples, **given)
    for length in (1, 137):
        rest = wavear.generate(
            model,
            mel,
            samples=None if samples is None else samples - length,
            prime=whole[:, :length],
            **given,
        )
        # The queues differ by rounding, 1e-6; none of these few uniforms lies that near to an edge.
        assert torch.equal(rest, whole[:, length:])
    both = wavear.generate(
        model,
        mel,
        samples=None if samples is None else 200,
        prime=whole[:, :100],
        include_prime=True,
        **given,
    )
    assert torch.equal(both, whole[:, : both.shape[1]])


@pytest.mark.parametrize(("engine", "weights"), ENGINES, ids=NAMES)
def test_the_continuation_does_not_depend_on_the_batch(engine, weights):
    model = make(mel=MEL, speakers=3)
    primes, mel = recording(130, batch=3), list(mels(3, 12))
    mel[1] = mel[1][:, :9]
    given = {"engine": engine, "weights": weights}
    batch = wavear.generate(model, mel, speaker=[0, 2, 1], seed=[5, 6, 7], prime=primes, **given)
    assert batch.shape == (3, 12 * HOP - 130)
    for b in range(3):
        alone = wavear.generate(
            model, mel[b], speaker=[0, 2, 1][b], seed=5 + b, prime=primes[b], **given
        )
        assert torch.equal(batch[b, : alone.shape[1]], alone[0])
        assert not batch[b, alone.shape[1] :].any()


@pytest.mark.parametrize("engine", ["reference", "numba"])
@pytest.mark.parametrize("config", [{}, {"mel": MEL, "speakers": 3}], ids=["free", "mel"])
def test_candidates_continue_their_own_prime(engine, config):
    """The best candidate begins with its own prime, as if generated one by one."""
    model, primes, seeds = make(**config), recording(60, batch=3), [5, 6, 7]
    mel: list[Any] = list(mels(3, 8)) if config else [None] * 3
    speakers: list[Any] = [2, 0, 1] if config else [None] * 3
    if config:
        mel[1] = mel[1][:, :6]
    given: dict[str, Any] = {"engine": engine, "temperature": 1.2, "return_log_probability": True}
    given |= {"samples": None if config else 90}
    best, scores = wavear.generate(
        model,
        mel if config else None,
        speaker=speakers if config else None,
        seed=seeds,
        prime=primes,
        include_prime=True,
        best_of=3,
        **given,
    )
    assert torch.equal(best[:, :60], primes)
    chosen = []
    for b, seed in enumerate(seeds):
        alone = {"mel": mel[b], "speaker": speakers[b], "prime": primes[b], **given}
        candidates = [wavear.generate(model, seed=s, **alone) for s in candidate_seeds(seed, 3)]
        totals = [float(log.sum()) for _, log in candidates]
        assert len(set(totals)) == 3
        chosen.append(int(np.argmax(totals)))
        waveform, log = candidates[chosen[-1]]
        length = waveform.shape[1]
        assert torch.equal(best[b, 60 : 60 + length], waveform[0])
        assert not best[b, 60 + length :].any()
        assert torch.equal(scores[b, :length], log[0])
        one = wavear.generate(model, seed=seed, include_prime=True, best_of=3, **alone)
        assert torch.equal(one[0][0], best[b, : 60 + length])
    assert any(chosen)  # so that the best candidate is not always the first


def test_one_prime_has_several_futures():
    model, prime = make(), recording(100)
    futures = wavear.generate(model, samples=60, seed=[1, 2], prime=prime, include_prime=True)
    assert futures.shape == (2, 160)
    assert torch.equal(futures[:, :100], prime.expand(2, -1))
    assert not torch.equal(futures[0, 100:], futures[1, 100:])
    alone = wavear.generate(model, samples=60, seed=2, prime=prime[0].numpy())
    assert torch.equal(futures[1, 100:], alone[0])
    other = wavear.generate(model, samples=60, seed=2, prime=0.5 * prime)
    assert not torch.equal(other, alone)


@pytest.mark.parametrize(("engine", "weights"), ENGINES, ids=NAMES)
@pytest.mark.parametrize("length", [1, 30, 157])
def test_a_stream_begins_with_a_prime(engine, weights, length):
    model, mel, prime = make(mel=MEL), mels(1, 20)[0], recording(length)[0]
    given = {"seed": 3, "engine": engine, "weights": weights}
    whole = wavear.generate(model, mel, prime=prime, **given)[0]
    for size in (1, 3, 7, 20):
        stream, parts = Stream(model, prime=prime, **given), []
        for start in range(0, 20, size):
            if start == 2 * size:  # also before the prime is filled in
                stream = Stream.load(model, stream.state(), engine=engine, weights=weights)
            parts.append(stream.push(mel[:, start : start + size]))
        parts.append(stream.flush())
        assert torch.equal(torch.cat(parts), whole)
    batch = StreamBatch(model, engine=engine, weights=weights)
    member, other = batch.add(seed=3, prime=prime), batch.add(seed=4)
    batch.push(other, mel)
    batch.push(member, mel)
    batch.flush(member)
    assert torch.equal(batch.step()[member], whole)


def test_a_free_stream_begins_with_a_prime():
    model, prime = make(), recording(100)[0]
    stream = Stream(model, seed=2, prime=prime)
    assert stream.position == 100
    found = torch.cat([stream.pull(1), stream.pull(59)])
    assert torch.equal(found, wavear.generate(model, samples=60, seed=2, prime=prime)[0])


# ---- what does not fit


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"prime": torch.zeros(2, 3, 4)}, r"prime has shape \(2, 3, 4\)"),
        ({}, {"prime": torch.zeros(0)}, r"prime has shape \(1, 0\)"),
        ({}, {"prime": torch.zeros(5, dtype=torch.int16)}, "prime is torch.int16.*32768"),
        ({}, {"prime": torch.tensor([0.5, torch.nan])}, "prime holds NaN"),
        ({}, {"prime": torch.tensor([0.5, -3.0])}, r"prime reaches 3, expected \[-1, 1\]"),
        ({}, {"prime": recording(9, batch=3), "seed": [1, 2]}, "2 utterances, 3 primes"),
        (
            {"mel": MEL},
            {"prime": recording(40), "mel": mels(1, 2), "samples": None},
            "covers 40 samples and the prime has 40",
        ),
        (
            {"mel": MEL},
            {"prime": recording(30), "mel": mels(1, 2), "samples": 11},
            "cover 40 samples, and 11 are asked for after a prime of 30",
        ),
    ],
)
def test_a_prime_that_does_not_fit_is_refused(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        wavear.generate(make(**settings), **{"samples": 5, **arguments})


def test_a_stream_refuses_a_mel_shorter_than_its_prime():
    stream = Stream(make(mel=MEL), prime=recording(100)[0])
    stream.push(mels(1, 4)[0])
    with pytest.raises(
        ValueError, match="covers 80 samples and the prime has 100: push its frames too"
    ):
        stream.flush()
    with pytest.raises(ValueError, match="a stream has one"):
        Stream(make(), prime=recording(10, batch=2))


def test_a_silent_or_clipped_prime_causes_a_warning():
    model = make()
    with pytest.warns(UserWarning, match="the prime is silent .it is all zeros"):
        wavear.generate(model, samples=3, prime=torch.zeros(200))
    with pytest.warns(UserWarning, match="prime 1 is silent .its peak is -80 dB"):
        wavear.generate(
            model, samples=3, prime=torch.stack([recording(200)[0], torch.full((200,), 1e-4)])
        )
    with pytest.warns(UserWarning, match="the prime is clipped .32.8% of its samples"):
        wavear.generate(model, samples=3, prime=(3 * recording(500)).clamp(-1, 1))
    wavear.generate(model, samples=3, prime=torch.ones(99))  # too short to judge


# ---- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make().save("free")
    make(mel=MEL).save("mel")
    return tmp_path


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    from wavear.cli.commands import main

    status = main(["generate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_continues_a_file(here, capsys):
    clip = recording(400)[0]
    audio.write("clip.wav", clip, 8000)
    prime = audio.read("clip.wav")
    flags = ("--seconds", "0.02", "--seed", "4", "--prime", "clip.wav")
    assert run(capsys, "free", *flags, "--out", "new.wav")[0] == 0
    expected = wavear.generate(wavear.load("free"), samples=160, seed=4, prime=prime)[0]
    assert torch.allclose(audio.read("new.wav"), expected, rtol=0, atol=1 / 32768)
    status, out, _ = run(capsys, "free", *flags, "--out", "both.wav", "--include-prime")
    assert status == 0
    assert "both.wav  0.07 s" in out
    found = audio.read("both.wav")
    assert torch.equal(found[:400], prime)
    assert torch.equal(found[400:], audio.read("new.wav"))
    # The continuation depends on the clip: another clip has another future.
    audio.write("clip.wav", clip.flip(0), 8000)
    assert run(capsys, "free", *flags, "--out", "other.wav")[0] == 0
    assert not torch.equal(audio.read("other.wav"), audio.read("new.wav"))


def test_prime_of_another_rate_is_resampled(here, capsys):
    audio.write("clip.wav", recording(1600)[0], 16000)
    flags = ("--seconds", "0.01", "--prime", "clip.wav", "--include-prime")
    status, _, err = run(capsys, "free", *flags, "--out", "new.wav")
    assert status == 0
    assert err.count("clip.wav has 16000 Hz: resampled to 8000 Hz") == 1
    assert audio.info("new.wav").frames == 800 + 80


def test_a_defective_prime_is_refused_in_one_line(here, capsys, recwarn):
    audio.write("quiet.wav", torch.zeros(160), 8000)
    status, _, err = run(
        capsys, "free", "--seconds", "0.01", "--out", "a.wav", "--prime", "quiet.wav"
    )
    assert status == 0
    assert err.count("quiet.wav: the prime is silent") == 1
    assert not recwarn.list
    import soundfile

    soundfile.write("loud.wav", np.full(80, 3.0, np.float32), 8000, subtype="FLOAT")
    for arguments, message in (
        (("free", "--prime", "loud.wav"), "loud.wav: prime reaches 3, expected [-1, 1]"),
        (("free", "--prime", "none.wav"), "none.wav"),
        (("free", "--include-prime"), "there is none"),
        (("mel", "--prime", "quiet.wav"), "conditioned on mels"),
    ):
        status, _, err = run(capsys, *arguments, "--seconds", "0.01", "--out", "b.wav")
        assert status == 1
        assert message in err
        assert err.count("\n") == 1
    assert not Path("b.wav").exists()
