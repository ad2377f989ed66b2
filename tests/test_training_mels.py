"""Training on mels from files: aligned by name, checked by length, read crop by crop."""

from __future__ import annotations

import importlib
import logging
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import RATE, assert_same_run, config_of, interrupt_at_step

import wavear
from wavear import MelConfig, WavearError, audio, log_mel, train
from wavear.data.corpus import open_corpus
from wavear.data.crops import Segments, collate, mel_of
from wavear.data.file_mels import MelFolder
from wavear.data.recordings import Recordings
from wavear.evaluation.held_out import held_out_bits
from wavear.mel.mel_files import write_mel
from wavear.models.crop_loss import layout_of
from wavear.models.families import FAMILIES
from wavear.training.free_run import free_run
from wavear.training.run import write_held_out

pytestmark = pytest.mark.usefixtures("one_thread")

MEL: MelConfig = config_of("data", "out").mel  # type: ignore[assignment]
HOP = MEL.hop_length


def mel_of_file(path: Path) -> np.ndarray:
    return log_mel(audio.read(path, RATE)[None], MEL)[0].numpy()


@pytest.fixture
def mels(tones: Path, tmp_path: Path) -> Path:
    """Write the recordings' own mels, but 0.5 louder, as a predictor might."""
    for path in tones.rglob("*.wav"):
        target = (tmp_path / "mels" / path.relative_to(tones)).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, mel_of_file(path) + 0.5)
    return tmp_path / "mels"


def opened(data: Path, mels: Path | None, **settings: Any) -> Recordings:
    folder = None if mels is None else MelFolder(mels, MEL)
    return open_corpus(data, sample_rate=RATE, least_samples=HOP, mels=folder, **settings).train


@pytest.fixture
def model(tones: Path) -> Any:
    return wavear.WaveNet(config_of(tones, "out").model_config()).eval()


def test_crops_have_the_frames_of_the_file(tones, mels, model):
    """They are those that are computed from the audio, here 0.5 louder, at the ends too."""
    layout = layout_of(model, 512)
    of_files, of_audio = (Segments(opened(tones, m), layout, seed=3) for m in (mels, None))
    for index in range(40):
        one, other = collate([of_files[index]]), collate([of_audio[index]])
        assert torch.equal(one.waveform, other.waveform)
        assert one.mel.shape == mel_of(other, layout).shape
        found = mel_of(one, layout) - mel_of(other, layout)
        torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=1e-4, rtol=0)
    assert len(pickle.dumps(of_files)) < 10_000  # without the mels: crops read them


@pytest.mark.parametrize("family", ["wavenet", "gru"])
def test_held_out_bits_are_given_the_mels_of_files(tones, mels, family):
    config = config_of(tones, "out", family=family)
    torch.manual_seed(0)
    network = FAMILIES[family][0](config.model_config()).eval()
    recordings = opened(tones, mels)
    found = held_out_bits(network, recordings)
    for recording, bits in zip(recordings, found.total, strict=True):
        mel = np.load((mels / recording.name).with_suffix(".npy"))
        waveform = audio.read(recording.path, RATE)[: mel.shape[1] * HOP]  # type: ignore[arg-type]
        expected = -wavear.score(network, waveform[None], mel[None]).sum().item() / np.log(2)
        assert bits == pytest.approx(expected, rel=1e-5)
        own = -wavear.score(network, waveform[None]).sum().item() / np.log(2)
        assert abs(bits - own) > 1e-3


def test_statistics_and_the_free_run_are_of_the_files(tones, mels, model, tmp_path, monkeypatch):
    train(config_of(tones, tmp_path / "audio", max_steps=1))
    result = train(config_of(tones, tmp_path / "files", max_steps=1, mels=mels))
    before = wavear.load(tmp_path / "audio" / "last").conditioning.mel_mean
    after = wavear.load(result.last).conditioning.mel_mean
    torch.testing.assert_close(after, before + 0.5, atol=1e-4, rtol=0)
    given: list[torch.Tensor] = []

    def generate(_: Any, mels: list[torch.Tensor], **rest: Any) -> torch.Tensor:
        given.extend(mels)
        return torch.zeros(len(mels), 64 * max(m.shape[1] for m in mels))

    monkeypatch.setattr(importlib.import_module("wavear.generation.sampler"), "generate", generate)
    found = free_run(model, opened(tones, mels), 0.2)
    assert found is not None
    for (recorded, _), mel in zip(found.clips, given, strict=False):
        own = log_mel(torch.from_numpy(recorded)[None], MEL)[0]
        inside = (mel - own)[:, 3:-3]  # the clip's own mel mirrors its ends
        torch.testing.assert_close(inside, torch.full_like(inside, 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["wavenet", "gru"])
def test_a_resumed_run_equals_an_uninterrupted_one(tones, mels, tmp_path, family):
    settings: dict[str, Any] = {"mels": str(mels), "family": family}
    train(config_of(tones, tmp_path / "a", **settings))
    with interrupt_at_step(2):
        train(config_of(tones, tmp_path / "b", **settings))
    assert train(config_of(tones, tmp_path / "b", resume=True, **settings)).steps == 4
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_a_frame_or_two_more_or_less_are_left_out(tones, mels, change):
    path = mels / "speaker0" / "0.npy"
    mel = np.load(path)
    np.save(path, np.concatenate([mel, mel[:, -2:]], 1)[:, : mel.shape[1] + change])
    assert mel.shape[1] == 3000 // HOP
    found = {r.name: r.frames for r in opened(tones, mels)}
    expected = 3000 if change > 0 else (3000 // HOP + change) * HOP
    assert found["speaker0/0.wav"] == expected


@pytest.mark.parametrize("change", [-3, 3])
def test_other_lengths_are_refused_with_both_counts(tones, mels, change):
    path = mels / "speaker0" / "0.npy"
    mel = np.load(path)
    np.save(path, np.concatenate([mel, mel], 1)[:, : mel.shape[1] + change])
    expected = (
        rf"0\.npy has {46 + change} frames, and speaker0/0\.wav 3000 samples at 8000 Hz, 46 frames"
        r" of 64: make .*--mel-hop-length"
    )
    with pytest.raises(WavearError, match=expected):
        opened(tones, mels)


def test_recordings_without_a_mel_are_skipped_and_counted(tones, mels, tmp_path, caplog):
    for number in (0, 2):
        (mels / "speaker0" / f"{number}.npy").unlink()
    with caplog.at_level(logging.INFO):
        train(config_of(tones, tmp_path / "run", mels=mels, max_steps=1, progress=True))
    (line,) = [r.getMessage() for r in caplog.records if "without a mel" in r.getMessage()]
    assert line == f"2 recordings without a mel in {mels} skipped; the first: speaker0/0.wav"
    listed = write_held_out(tmp_path / "run", tmp_path / "held.jsonl").read_text()
    assert "speaker0/0.wav" not in listed
    assert ".wav" in listed
    shutil.rmtree(mels)
    mels.mkdir()
    with pytest.raises(
        WavearError, match=r"holds no mel of any recording, such as speaker0/0\.npy"
    ):
        opened(tones, mels)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of mels"):
        MelFolder(tmp_path / "nowhere", MEL)


def test_mels_without_sub_folders_are_found_by_name(tones, mels, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in mels.rglob("*.npy"):
        shutil.copy(path, flat)
    assert len(opened(tones, flat)) == len(opened(tones, mels))
    shutil.copytree(tones / "speaker1", tmp_path / "held" / "elsewhere")
    shutil.copy(mels / "speaker1" / "1.npy", mels)
    both = open_corpus(
        tones, sample_rate=RATE, validation=tmp_path / "held", mels=MelFolder(mels, MEL)
    )
    assert [r.name for r in both.validation] == ["elsewhere/1.wav"]  # by its stem only
    for recording in (both.train[0], both.validation[0]):  # the others still by their folders
        assert recording.mel is not None
        expected = mel_of_file(Path(str(recording.path)))[:, :3] + 0.5
        np.testing.assert_allclose(recording.mel(np.arange(3)), expected, atol=1e-6)
    twin = tmp_path / "twin"
    shutil.copytree(tones, twin)
    shutil.copy(twin / "speaker0" / "0.wav", twin / "speaker1" / "0.wav")
    with pytest.raises(
        WavearError, match=r"0\.wav and speaker1/0\.wav would share the mel .*0\.npy"
    ):
        opened(twin, flat)
    np.savez(flat / "0.npz", mel=mel_of_file(tones / "speaker0" / "0.wav"))
    with pytest.raises(WavearError, match=r"0\.npy and .*0\.npz are mels of .*: keep one of them"):
        opened(tones, flat)


def test_entries_of_a_kaldi_list_are_found_by_name(tones, mels, tmp_path):
    with open(tmp_path / "feats.ark", "wb") as ark, open(tmp_path / "feats.scp", "w") as scp:
        for path in sorted(mels.rglob("*.npy")):
            frames = np.load(path).T
            ark.write(path.stem.encode() + b" ")
            scp.write(f"{path.stem} {tmp_path}/feats.ark:{ark.tell()}\n")
            ark.write(b"\0BFM " + struct.pack("<bibi", 4, len(frames), 4, 8) + frames.tobytes())
    numbers = np.arange(5, 9)
    for one, other in zip(opened(tones, mels), opened(tones, tmp_path / "feats.scp"), strict=True):
        assert one.name == other.name
        assert one.mel is not None
        assert other.mel is not None
        assert np.array_equal(one.mel(numbers), other.mel(numbers))


def test_stretches_begin_with_a_frame_of_the_file(tones, mels, tmp_path, model):
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,start,duration\n{tones}/speaker0/0.wav,0.1,0.2\n"
                        f"{tones}/speaker0/2.wav,0,0.3\n")  # fmt: skip
    flat = tmp_path / "flat"
    shutil.copytree(mels / "speaker0", flat)
    found = [*open_corpus(manifest, sample_rate=RATE, mels=MelFolder(flat, MEL)).train]
    folder, file = MelFolder(flat, MEL), tones / "speaker0" / "0.wav"
    corpus = open_corpus(file, sample_rate=RATE, validation_fraction=0.4, mels=folder)
    found += [*corpus.train, *corpus.validation]
    assert len(found) == 3
    layout = layout_of(model, 512)
    for recording in found:
        assert recording.start % HOP == 0
        segments = Segments([recording], layout)
        batch = collate([segments[0]])
        own = mel_of(collate([segments[0] | {"mel": np.zeros((0, 0), np.float32)}]), layout)
        # Frames at the ends of a stretch see other audio than the stretch's.
        inside = (mel_of(batch, layout) - own)[0, :, layout.lookback :]
        inside = inside[:, 3 : int(batch.span[0, 1]) // HOP - 3]
        assert inside.shape[1] > 1
        torch.testing.assert_close(inside, torch.full_like(inside, 0.5), atol=1e-4, rtol=0)


def test_mels_of_another_kind_are_refused(tones, mels):
    for path in mels.rglob("*.npy"):
        np.save(path, np.load(path) / np.log(10))
    with pytest.raises(WavearError, match=r"this looks like log10 mels .*--mel-preset, --mel-"):
        opened(tones, mels)
    common = MelConfig.from_dict(MEL.to_dict() | {"log_base": "10"})
    for path in mels.rglob("*.npy"):  # with their configuration they are converted
        write_mel(path.with_suffix(".npz"), torch.from_numpy(np.load(path)), common)
        path.unlink()
    (recording, *_) = opened(tones, mels)
    assert recording.mel is not None
    expected = mel_of_file(Path(str(recording.path))) + 0.5
    np.testing.assert_allclose(recording.mel(np.arange(9)), expected[:, :9], atol=1e-4)
    np.save(mels / "speaker0" / "0.npy", mel_of_file(tones / "speaker0" / "0.wav")[:5])
    (mels / "speaker0" / "0.npz").unlink()
    with pytest.raises(WavearError, match=r"0\.npy: the mel has 5 bands, the model was trained on"):
        opened(tones, mels)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trim_silence": 40.0}, "as they are.*drop trim_silence 40"),
        ({"normalize": "peak"}, "as they are.*drop normalize 'peak'"),
        ({"unconditional": True}, "unconditional models have no mels: drop mels"),
        ({"family": "linear", "unconditional": True}, "a linear model takes no mels"),
    ],
)
def test_settings_that_contradict_mels_are_refused(settings, reason):
    with pytest.raises(WavearError, match=reason):
        wavear.TrainConfig("data", "out", mels="mels", **settings)


def test_evaluate_uses_the_mels_of_files(tones, mels, model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    given: list[torch.Tensor] = []
    sampler = importlib.import_module("wavear.evaluation.run")
    real = sampler.generate

    def generate(network: Any, inputs: list[torch.Tensor], **rest: Any) -> torch.Tensor:
        given.extend(inputs)
        return real(network, inputs, **rest)

    monkeypatch.setattr(sampler, "generate", generate)
    for name in ("1", "3", "5"):  # three recordings have no mel
        (mels / "speaker1" / f"{name}.npy").unlink()
    config = wavear.EvaluateConfig(
        quick=True, clips=1, seconds=0.2, resamples=100, mels=str(mels), engine="reference"
    )
    record = wavear.evaluate(tmp_path / "model", tones, tmp_path / "out", config).record
    assert record["failed"]["speaker1/1.wav"] == f"{mels} has no mel of it"
    assert len(record["clips"]) == 5
    for clip in record["clips"]:
        mel = np.load((mels / clip["name"]).with_suffix(".npy"))
        waveform = audio.read(tones / clip["name"], RATE)
        mel = np.concatenate([mel, mel[:, -1:]], 1)[:, : -(-len(waveform) // HOP)]
        expected = -wavear.score(model, waveform[None], mel[None]).mean().item() / np.log(2)
        assert clip["bits"]["model"] == pytest.approx(expected, rel=1e-5)
    (mel,) = given
    (name,) = [clip["name"] for clip in record["clips"] if clip.get("audio")]
    assert np.array_equal(mel.numpy(), np.load((mels / name).with_suffix(".npy"))[:, :25])
