"""The recipe of discrete codes: quantiser, gradients, files, and its programs on made sounds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_recipes import module

import wavear
from wavear import audio, cli

FOLDER = Path(__file__).parents[1] / "recipes" / "vqvae"
RATE = 22050


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports a file of the recipe; the files import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def start(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Return a function that runs a program of the recipe, for its status."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> int:
        program = recipe(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as stop:
            cli.recipe(program.VALUES, program.__doc__, run=program.run)
        return int(stop.value.code or 0)

    return run


def small_codes(recipe: Callable[[str], ModuleType], **fields: object) -> Any:
    networks = recipe("networks")
    torch.manual_seed(0)
    sizes = {"codes": 8, "dimension": 4, "channels": 8, "blocks": 1} | fields
    return networks.CodesModel(networks.CodesConfig(("a", "b"), **sizes))


@pytest.fixture(scope="module")
def small_voice() -> Any:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("residual_channels", "skip_channels", "head_channels"), 8)
    config = wavear.PredictiveWaveNetConfig(
        mel=wavear.MelConfig(), layers=1, conditioning_channels=8, period_channels=4, **sizes
    )
    return wavear.PredictiveWaveNet(config)


def test_quantizer_chooses_the_nearest_and_passes_the_gradient(
    recipe: Callable[[str], ModuleType],
):
    quantizer = small_codes(recipe).quantizer.eval()
    quantizer.codebook.copy_(torch.randn(8, 4))
    z = torch.randn(2, 5, 4, requires_grad=True)
    vectors, codes, distance = quantizer(z)
    expected = torch.cdist(z.detach(), quantizer.codebook[None]).argmin(2)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(vectors, quantizer.codebook[expected])
    weight = torch.randn(2, 5, 4)
    (gradient,) = torch.autograd.grad((vectors * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)  # as if the quantiser were not there
    (gradient,) = torch.autograd.grad(distance, z)
    torch.testing.assert_close(gradient, 2 * (z - quantizer.codebook[expected]).detach() / 40)


def test_codebook_is_the_moving_average_of_what_codes_stand_for(
    recipe: Callable[[str], ModuleType],
):
    """Six batches from tight clusters: the average of a cluster is computed here by its formula."""
    centres, generator = 10 * torch.eye(8, 4), torch.Generator().manual_seed(0)
    centres[4:] = -10 * torch.eye(4)
    quantizer = small_codes(recipe, decay=0.8).quantizer
    quantizer.codebook.copy_(centres)
    quantizer.counts.fill_(2.0)
    quantizer.sums.copy_(2 * centres)
    counts, sums = torch.full((8,), 2.0), 2 * centres
    for _ in range(6):
        of = torch.randint(8, (40,), generator=generator)
        z = centres[of] + torch.randn(40, 4, generator=generator)
        _, codes, _ = quantizer.train()(z[None])
        assert torch.equal(codes[0], of)
        counts = 0.8 * counts + 0.2 * torch.bincount(of, minlength=8)
        sums = 0.8 * sums + 0.2 * torch.stack([z[of == k].sum(0) for k in range(8)])
        torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])
    before = quantizer.codebook.clone()
    quantizer.eval()(z[None])
    assert torch.equal(quantizer.codebook, before)


def test_dead_codes_restart_at_vectors_of_the_batch(recipe: Callable[[str], ModuleType]):
    torch.manual_seed(1)
    quantizer = small_codes(recipe, decay=0.9).quantizer.train()
    z = torch.randn(1, 64, 4)
    _, codes, _ = quantizer(z)
    assert len(codes.unique()) == 8  # the first batch fills the codebook
    quantizer.codebook[3] = quantizer.sums[3] = 1000.0  # nothing is near it: it will die
    quantizer.counts[3] = 1.0
    for _ in range(40):
        _, codes, _ = quantizer(z)
    assert quantizer.codebook.abs().max() < 10
    assert len(codes.unique()) == 8


def test_likelihood_reaches_encoder_and_decoder(
    recipe: Callable[[str], ModuleType], small_voice: Any
):
    """Only the likelihood has a gradient here; that of the mel's error is not added."""
    train, model = recipe("train"), small_codes(recipe).train()
    model.means.weight.data.fill_(-5.0)
    batch = {
        "mel": torch.randn(2, 80, 32) - 5,
        "mean": torch.full((2, 80), -5.0),
        "speaker": torch.tensor([0, 1]),
        "waveform": 0.1 * torch.randn(2, 32 * 256),
    }
    _, _, nats = train.losses(model, small_voice, batch, 2)
    nats.backward()
    for name in ("enter.weight", "encoder.0.wide.weight", "to_code.weight", "leave.weight"):
        assert model.get_parameter(name).grad.norm() > 0
    assert model.voices.weight.grad.norm(dim=1).min() > 0
    assert small_voice.skip.weight.grad.norm() > 0
    with torch.no_grad():
        mel = model.eval()(batch["mel"], batch["mean"], batch["speaker"])[0]
        back, ahead = small_voice.lookback, small_voice.lookahead
        waveform = batch["waveform"][:, back * 256 : -ahead * 256]
        codes = small_voice.grid.encode(waveform)
        found = small_voice(codes, small_voice.condition(mel, padded=True))
        context = min(small_voice.receptive_field, waveform.shape[1] // 2)
        expected = -small_voice.law.log_prob(found, codes)[:, context:].mean()
        torch.testing.assert_close(train.losses(model, small_voice, batch, 2)[2], expected)


def test_saved_codes_load_and_damage_is_one_line(
    recipe: Callable[[str], ModuleType], small_voice: Any, tmp_path: Path
):
    networks, model = recipe("networks"), small_codes(recipe, frames=4)
    mel = torch.randn(80, 35)
    model.train()(mel[None], mel.mean(1)[None], torch.tensor([0]))
    model.eval().save(tmp_path)
    small_voice.save(tmp_path / "voice" / "best")
    loaded, voice = networks.load_codes(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert voice.config == small_voice.config
    codes = loaded.encode(mel)
    assert codes.shape == (9,)  # of 35 frames
    assert len(codes.unique()) > 2
    assert torch.equal(codes, model.encode(mel))
    assert torch.equal(loaded.decode(codes, "b"), model.decode(codes, "b"))
    assert (loaded.decode(codes, "b") - loaded.decode(codes, "a")).abs().max() > 0.1
    fields = json.loads((tmp_path / "codes.json").read_text())
    for damage in ({"codes": 9}, {"codes": "many"}, {"speakers": []}, {"colour": 1}):
        (tmp_path / "codes.json").write_text(json.dumps(fields | damage))
        with pytest.raises(wavear.WavearError, match=str(tmp_path)):
            networks.load_codes(tmp_path)
    (tmp_path / "codes.json").write_text(json.dumps(fields))
    (tmp_path / "codes.safetensors").write_bytes(b"no weights")
    with pytest.raises(wavear.WavearError, match=str(tmp_path)):
        networks.load_codes(tmp_path)


def test_programs_on_made_sounds(
    start: Callable[..., int],
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    small_voice: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    """Train, convert, measure, and babble, by the commands of the README."""
    generator = np.random.default_rng(0)
    for speaker, base in {"low": 110, "high": 220}.items():
        (tmp_path / "data" / speaker).mkdir(parents=True)
        for number in range(3):
            t = np.arange(RATE) / RATE
            tone = np.sin(2 * np.pi * base * t) * (1 + np.sin(2 * np.pi * (2 + number) * t))
            noise = generator.normal(0, 0.01, RATE)
            path = tmp_path / "data" / speaker / f"{speaker}{number}.wav"
            audio.write(path, (0.2 * tone + noise).astype(np.float32), RATE)
    small_voice.save(tmp_path / "start")
    sizes = "--channels 8 --codes 8 --batch-size 2 --crop 32"
    steps = "--steps 3 --joint-steps 2 --voice-minutes 0.1"
    flags = ["--data", "data", "--voice", "start", "--out", "run", *f"{sizes} {steps}".split()]
    assert start("train", *flags) == 0
    printed = capsys.readouterr().out
    assert "4 recordings, 0.1 minutes, 2 speakers" in printed
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert [row["nats"] > 0 for row in record["log"]] == [False] * 3 + [True] * 2
    assert start("train", *flags) == 1
    assert "exists" in capsys.readouterr().err
    assert np.load("run/mels/low1.npz")["mel"].shape == (80, 86)
    assert start("train", *flags, "--voice-minutes", "0", "--out", "codes") == 0
    untrained, taught = (wavear.load(f"{run}/voice/best").state_dict() for run in ("codes", "run"))
    for name, weights in small_voice.state_dict().items():
        torch.testing.assert_close(untrained[name], weights, msg=f"{name} learned with the codes")
    assert any(not torch.equal(taught[name], weights) for name, weights in untrained.items())

    assert start("train", *flags, "--out", "y", "--voice-minutes", "-1") == 1
    assert "--voice-minutes -1" in capsys.readouterr().err
    table = "path,speaker,split\ndata/low/low0.wav,a,train\nelsewhere/low0.wav,b,validation\n"
    (tmp_path / "twice.csv").write_text(table, encoding="utf-8")
    assert start("train", *flags, "--out", "y", "--data", "twice.csv") == 1
    assert "two recordings are named low0" in capsys.readouterr().err

    clip = "data/low/low0.wav"
    convert = ["run", clip, "--out", "x.wav", "--codes", "x.npy", "--speaker"]
    assert start("convert", *convert, "high") == 0
    codes = np.load(tmp_path / "x.npy")
    assert codes.shape == (43,)  # 86 frames
    assert start("convert", "run", "x.npy", "--speaker", "high", "--out", "y.wav") == 0
    assert torch.equal(audio.read(tmp_path / "x.wav"), audio.read(tmp_path / "y.wav"))
    np.save(tmp_path / "large.npy", codes + np.uint16(8))
    capsys.readouterr()
    for words, reason in (
        ([*convert, "high"], "x.wav exists"),
        (["run", clip, "--speaker", "third"], "choose one of high, low"),
        (["run", "large.npy", "--speaker", "low"], "whole numbers of 0 to 7"),
        (["nowhere", clip, "--speaker", "low"], "codes.json is missing"),
    ):
        assert start("convert", *words) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1

    calls: list[tuple[Any, ...]] = []

    def evaluate(checkpoint: str, data: Path, out: Path, settings: wavear.EvaluateConfig) -> Any:
        calls.append((Path(checkpoint).name, out.name, settings.mels))
        return SimpleNamespace(
            record={"measures": {"pesq": {"model": {"mean": 2.5}}}}, bits={"model": 7}
        )

    monkeypatch.setattr(recipe("measure"), "evaluate", evaluate)
    words = ["run", "--data", "data", "--out", "m", "--seconds", "0.5", "--before", "start"]
    assert start("measure", *words, "--voices", "low", "high") == 0
    printed = capsys.readouterr().out
    assert "2 held-out recordings, 2 s, 43.07 codes per second" in printed
    assert "| codes | 7.00 | 2.50 | - |" in printed
    assert calls == [
        ("start", "copy", None),
        ("best", "codes", "m/mels"),
        ("start", "apart", "m/mels"),
    ]
    assert np.load("m/mels/low0.npy").shape == (80, 43)
    assert audio.info("m/clips/low0.wav").frames == 43 * 256
    assert audio.info("m/converted/low0-as-high.wav").frames == 44 * 256  # of 22 codes
    table = (tmp_path / "m" / "conversion.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in table[1:]]
    assert [row[:2] for row in rows] == [["low", "high"], ["high", "low"]]
    pitches = [[float(row[2]), float(row[3])] for row in rows]
    np.testing.assert_allclose(pitches, [[110, 220], [220, 110]], rtol=0.03)  # pYIN's steps
    assert start("measure", *words) == 1
    assert "m exists" in capsys.readouterr().err

    sizes = ["--width", "8", "--layers", "1", "--window", "8", "--steps", "2", "--seconds", "0.5"]
    assert start("babble", "run", "--data", "data", "--speaker", "low", *sizes) == 0
    assert "held out" in capsys.readouterr().out
    assert wavear.load("run/babble").speaker_names == ("high", "low")
    assert audio.info("babble.wav").frames == round(0.5 * 22050 / 512) * 512
    assert start("babble", "run", "--speaker", "low", "--seconds", "0.5", "--out", "again.wav") == 0
    assert torch.equal(audio.read("babble.wav"), audio.read("again.wav"))
    assert start("babble", "run", "--speaker", "low") == 1

    clip = Path("data/low/low1.wav")
    words = ["run", "--speaker", "low", "--prime", str(clip), "--seconds", "0.5"]
    assert start("babble", *words, "--out", "more.wav") == 0
    more, begun = audio.read("more.wav"), audio.read(clip)
    past = 86 * 256
    assert torch.equal(more[:past], begun[:past])
    assert len(more) == past + 22 * 512
    music = module(FOLDER.parents[1] / "bench" / "music.py")
    rate, ends = music.by_codes(Path("run"), "low")
    found = ends(torch.stack([begun, begun]), 22 * 512)
    assert (rate, list(found)) == (RATE, ["the recording by the codes of run", "run"])
    assert {len(x) for sounds in found.values() for x in sounds} == {21 * 512}
    # The new codes follow those of the recording, and keep the mean of its mel.
    model, _ = recipe("networks").load_codes(Path("run"))
    codes, mean = torch.arange(8), torch.linspace(1, 2, 80)
    plain = model.decode(codes, "low") - model.means.weight[1].detach()[:, None]
    torch.testing.assert_close(model.decode(codes, "low", mean) - mean[:, None], plain)
