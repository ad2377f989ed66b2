"""Exported graphs, run by onnxruntime, compute what the reference engine does."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import make_gru, make_predictive, make_wavenet, random_uniforms

import wavear
from wavear import MelConfig, generate
from wavear.audio.emphasis import Deemphasis
from wavear.cli.commands import main
from wavear.common.errors import WavearError
from wavear.exchange.export import Exported, export_onnx
from wavear.generation.reference import ReferenceEngine
from wavear.models.frames import dense

ort = pytest.importorskip("onnxruntime", reason='the export needs pip install "wavear[export]"')
pytest.importorskip("onnxscript", reason='the export needs pip install "wavear[export]"')

EXAMPLE = Path(__file__).parents[1] / "examples" / "play_onnx.py"
MEL = MelConfig(sample_rate=8000, n_fft=64, window_length=64, hop_length=12, bands=5, fmax=4000.0)
CASES: dict[str, Any] = {
    "wavenet mixture": lambda: make_wavenet(
        1.0, law="logistic_mixture", kernel_size=3, coarse_classes=32, pre_emphasis=0.5, layers=2
    ),
    "gru, speakers": lambda: make_gru(speakers=2, layers=1),
    "predictive": make_predictive,
    "wavenet mu-law, mel": lambda: make_wavenet(sample_rate=8000, mel=MEL, conditioning_channels=6),
}
CASE = [
    pytest.param(name, marks=[] if name.startswith("gru") else [pytest.mark.slow], id=name)
    for name in CASES
]  # an export takes 5 to 25 s of CPU time
SAMPLES = 2000


@pytest.fixture(scope="module", params=CASE)
def exported(request, tmp_path_factory):
    """Return a model, its files, and conditioning (from torch, from ONNX) of 2,000 samples."""
    model = CASES[request.param]()
    folder = tmp_path_factory.mktemp("export")
    model.save(folder / "checkpoint")
    assert main(["export", str(folder / "checkpoint"), str(folder / "out.onnx")]) == 0
    names = ("out.onnx", "out-step.onnx", "out-conditioning.onnx")
    files = Exported(*(folder / name for name in names))
    assert files.conditioning is not None
    assert files.conditioning.exists() == model.conditioned
    given: dict[str, Any] = {}
    if model.config.mel is not None:
        frames = -(-SAMPLES // model.config.mel.hop_length)
        draw = torch.Generator().manual_seed(5)
        given["mel"] = torch.randn(1, model.config.mel.bands, frames, generator=draw)
    if model.config.speakers:
        given["speaker"] = torch.tensor([1])
    if not given:
        return model, files, None, None
    with torch.no_grad():
        own = model.condition(given.get("mel"), given.get("speaker"))
    arrays = {name: value.numpy() for name, value in given.items()}
    if "mel" in arrays:
        pad = ((0, 0), (0, 0), (model.lookback, model.lookahead))
        arrays["mel"] = np.pad(arrays["mel"], pad, mode="edge")
    return model, files, own, session(files.conditioning).run(None, arrays)[0]


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(graph: Any, given: dict[str, Any]) -> dict[str, np.ndarray]:
    return dict(zip([out.name for out in graph.get_outputs()], graph.run(None, given), strict=True))


def following(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the state after a call, as inputs of the next one."""
    return {n.removeprefix("next_"): x for n, x in results.items() if n.startswith("next_")}


def test_conditioning_graph_equals_the_model(exported):
    _, _, own, found = exported
    if own is None:
        pytest.skip("unconditional")
    expected = dense(own).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_step_graph_equals_forward(exported):
    model, files, own, cond = exported
    codes = model.grid.encode(torch.randn(1, 100, generator=torch.Generator().manual_seed(2)) * 0.1)
    with torch.no_grad():
        part = own if own is None or own.shape[2] == 1 else own[:, :, :100]
        expected = model(codes, part).numpy()
    graph, state = session(files.step), {}
    previous = model.shift(codes).numpy()
    for t in range(100):
        now = {} if cond is None else {"cond": cond[:, :, t if cond.shape[2] > 1 else 0]}
        results = run(graph, {"previous": previous[:, t], **now, **state})
        np.testing.assert_allclose(results["parameters"], expected[:, :, t], rtol=0, atol=1e-4)
        state = following(results)


def test_block_graph_draws_the_codes_of_the_reference(exported):
    model, files, own, cond = exported
    uniforms = random_uniforms(1, SAMPLES)
    part = own if own is None or own.shape[2] == 1 else own[:, :, :SAMPLES]
    expected = ReferenceEngine(model, 1).generate(uniforms, part, 0.8)
    graph, state, codes, audio = session(files.block), {}, [], []
    for first, last in ((0, 1), (1, 777), (777, SAMPLES)):
        given = {"uniforms": uniforms[:, first:last], "temperature": np.array([0.8]), **state}
        if cond is not None:
            given["cond"] = cond if cond.shape[2] == 1 else cond[:, :, first:last]
        results = run(graph, given)
        state = following(results)
        codes.append(results["codes"])
        audio.append(results["audio"])
    found = np.concatenate(codes, axis=1)
    assert len(np.unique(expected)) > 20
    off = np.abs(found - expected)
    # A value on the border between two of 65,536 codes is rounded to the other one.
    assert off.max() <= (0 if model.config.law == "categorical" else 1)
    assert (off > 0).mean() < 0.01
    waveform = Deemphasis(model.config.pre_emphasis)(model.grid.decode(torch.from_numpy(found[0])))
    np.testing.assert_allclose(np.concatenate(audio, axis=1)[0], waveform, atol=1e-7)


@pytest.mark.parametrize("exported", ["wavenet mu-law, mel"], indirect=True)
def test_example_plays_a_file_without_wavear_and_torch(exported, capsys):
    model, files, _, _ = exported
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    tree = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    names = {alias.name for node in tree for alias in node.names}
    assert names == {"json", "numpy", "onnxruntime", "sys", "wave"}
    spec: Any = importlib.util.spec_from_file_location("play_onnx", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    mel = torch.randn(model.config.mel.bands, 19, generator=torch.Generator().manual_seed(1))
    rates, parts = zip(*example.synthesize(files.block, mel.numpy(), seed=4), strict=True)
    assert rates[0] == model.config.sample_rate
    expected = generate(model, mel[None], seed=4, engine="reference")[0]
    np.testing.assert_allclose(np.concatenate(parts), expected.numpy(), atol=1 / 32768)
    found = json.loads(session(files.block).get_modelmeta().custom_metadata_map["wavear"])
    assert MelConfig.from_dict(found["mel"]) == model.config.mel
    again = ["export", str(files.block.parent / "checkpoint"), str(files.block)]
    assert main(again) == 1
    assert "exists" in capsys.readouterr().err


REFUSED = {
    "name": (lambda: make_gru(), "out.bin", "does not end in .onnx"),
    "law": (lambda: make_gru(law="gaussian"), "out.onnx", "gaussian cannot be exported"),
    "family": (
        lambda: wavear.Transformer(wavear.TransformerConfig(layers=1, channels=8, heads=1)),
        "out.onnx",
        "transformer cannot be exported",
    ),
}


@pytest.mark.parametrize(("make", "name", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exported_is_refused(make, name, message, tmp_path):
    with pytest.raises(WavearError, match=message):
        export_onnx(make(), tmp_path / name)


def test_export_without_its_packages_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WavearError, match=r"pip install 'wavear\[export\]'"):
        export_onnx(make_gru(), tmp_path / "out.onnx")


def test_the_folder_is_made_or_refused_before_the_work(monkeypatch, tmp_path):
    made = export_onnx(make_gru(), tmp_path / "sub" / "deep" / "out.onnx")
    assert made.step.is_file()
    (tmp_path / "file").touch()
    monkeypatch.setattr("wavear.exchange.export._StepAndDraw", None)  # the work
    with pytest.raises(OSError, match="cannot write to"):
        export_onnx(make_gru(), tmp_path / "file" / "out.onnx")


@pytest.mark.slow
def test_the_voice_is_exported(tmp_path):
    """The conditioning to the rounding of float32, and the step, given torch's conditioning."""
    model = wavear.load().requires_grad_(False)
    files = export_onnx(model, tmp_path / "voice.onnx")
    time = torch.arange(8 * 256) / 22050
    tone = sum(torch.sin(2 * torch.pi * 150 * k * time) / k for k in range(1, 40)) * 0.1
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0)) * 0.01
    fading = (tone + noise) * torch.logspace(0, -3, len(time))  # rounding to 16 bits matters
    mel = wavear.log_mel(fading[None], model.config.mel)
    own = model.condition(mel)
    expected = dense(own).numpy()
    padded = np.pad(mel.numpy(), ((0, 0), (0, 0), (model.lookback, model.lookahead)), mode="edge")
    assert files.conditioning is not None
    found = session(files.conditioning).run(None, {"mel": padded})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    codes = model.grid.encode(fading[None, :300])
    wanted, graph, state = model(codes, own[:, :, :300]).numpy(), session(files.step), {}
    for t, previous in enumerate(model.shift(codes).numpy()[0]):
        given = {"previous": np.array([previous]), "cond": expected[:, :, t], **state}
        results = run(graph, given)
        np.testing.assert_allclose(results["parameters"], wanted[:, :, t], rtol=0, atol=1e-4)
        state = following(results)
