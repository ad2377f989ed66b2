"""Export a model to ONNX: graphs that any runtime plays, without wavear and without torch.

    conditioning   mel (1, M, lookback + F + lookahead), speaker -> cond (1, C, F * hop)
    block          uniforms (1, N), cond (1, C, N), state -> audio (1, N), codes (1, N), state
    step           previous (1,), cond (1, C), state -> parameters (1, P), state

torch.onnx traces `model.step` and `law.sample`, so the network is not written a second time. The
block runs the traced step N times in an ONNX `Loop`. Inputs of the state have default values, the
state before the first sample, so that a first call omits them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavear.common.atomic import check_target, replace_file
from wavear.common.errors import WavearError
from wavear.common.log import get_logger
from wavear.exchange.loops import block_graph, pruned
from wavear.models.base import AutoregressiveModel
from wavear.models.frames import interpolated
from wavear.models.predictive import PredictiveWaveNet
from wavear.models.predictive_conditioning import PredictiveConditioning

logger = get_logger(__name__)

FAMILIES = ("predictive", "wavenet", "gru")
LAWS = ("categorical", "logistic_mixture")
OPSET = 20  # that of `_operators`
_DRAW = (  # inputs and outputs of the draw, which the step graph lacks
    "uniform", "temperature", "memory", "codes", "audio", "next_previous", "next_memory",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The files of an export."""

    block: Path
    step: Path
    conditioning: Path | None
    """None for an unconditional model."""

    def __iter__(self) -> Iterator[Path]:
        return (path for path in (self.block, self.step, self.conditioning) if path is not None)


def export_onnx(
    model: AutoregressiveModel, path: str | Path, *, overwrite: bool = False
) -> Exported:
    """Write a model as ONNX files: OUT.onnx, OUT-step.onnx and OUT-conditioning.onnx.

    Parameters
    ----------
    model : AutoregressiveModel
        A WaveNet, predictive WaveNet or GRU with a categorical distribution or a mixture of
        logistics. The graphs compute in float32 (prediction and draw in float64), for one stream.
    path : str or Path
        Of the block graph; it ends in .onnx.
    overwrite : bool
        Replace existing files.

    Returns
    -------
    Exported

    Raises
    ------
    FileExistsError
        If a file exists already and `overwrite` is false.
    WavearError
        If the model or its distribution cannot be exported, or the extra `export` is missing.
    """
    path = Path(path)
    _check(model, path)
    files = Exported(
        path,
        path.with_name(f"{path.stem}-step.onnx"),
        path.with_name(f"{path.stem}-conditioning.onnx") if model.conditioned else None,
    )
    for file in files:
        check_target(file, overwrite)
    model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    step = _StepAndDraw(model)
    names, inputs = step.example()
    results = ("parameters", "codes", "audio", *(f"next_{name}" for name in step.carried))
    traced = _trace(step, inputs, names, results)
    state = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n in step.carried}
    graphs = {
        files.block: block_graph(
            traced, state, constant_cond=model.conditioned and model.config.mel is None
        ),
        files.step: pruned(traced, _DRAW, state),
    }
    if files.conditioning is not None:
        graphs[files.conditioning] = _conditioning_graph(model)
    metadata = json.dumps(describe(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, graph in graphs.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = "wavear", metadata
        data = graph.SerializeToString()
        replace_file(file, lambda temporary, data=data: temporary.write_bytes(data))
    return files


def describe(model: AutoregressiveModel) -> dict[str, Any]:
    """Return what a player needs: it is stored as JSON in each file's metadata, key "wavear"."""
    config = model.config
    return {
        "format": 1,
        "family": model.family,
        "law": config.law,
        "classes": config.classes,
        "sample_rate": config.sample_rate,
        "speakers": config.speakers,
        "mel": None if config.mel is None else config.mel.to_dict(),
        "lookback": model.lookback,
        "lookahead": model.lookahead,
    }


def _check(model: AutoregressiveModel, path: Path) -> None:
    if path.suffix != ".onnx":
        raise WavearError(f"{path} does not end in .onnx: name the file to write, such as out.onnx")
    if model.family not in FAMILIES:
        raise WavearError(
            f"a model of the family {model.family} cannot be exported: {', '.join(FAMILIES)} can"
        )
    if model.config.law not in LAWS:
        raise WavearError(
            f"the distribution {model.config.law} cannot be exported: {' and '.join(LAWS)} can"
        )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise WavearError(
            f"the export needs onnx and onnxscript ({error}): pip install 'wavear[export]'"
        ) from None


class _StepAndDraw(nn.Module):
    """`model.step` and the draw as a function of tensors, which leaves its arguments unchanged."""

    values: Tensor

    def __init__(self, model: AutoregressiveModel):
        super().__init__()
        self.model = model
        self.register_buffer("values", torch.from_numpy(model.grid.values().copy()).float())
        self.state = model.init_state(1)
        self.emphasis = float(model.config.pre_emphasis)
        self.names = tuple(_tensors(self.state))
        memory = ("memory",) if self.emphasis else ()
        self.carried = ("previous", *memory, *self.names)

    def example(self) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        """Return the names and values of the inputs of a first step."""
        given: dict[str, Tensor] = {
            "uniform": torch.full((1,), 0.5, dtype=torch.float64),
            "temperature": torch.ones(1, dtype=torch.float64),
        }
        if self.model.conditioned:
            config: Any = self.model.config
            width = config.conditioning_channels
            if isinstance(self.model, PredictiveWaveNet):
                width = config.gates + config.prediction_order + 3
            given["cond"] = torch.ones(1, width)
        given["previous"] = torch.tensor([self.model.start_code])
        if self.emphasis:
            given["memory"] = torch.zeros(1, dtype=torch.float64)
        given |= _tensors(self.state)
        return tuple(given), tuple(given.values())

    def forward(self, uniform: Tensor, temperature: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return parameters (1, P), code (1,), sample (1,), and the next of what is carried."""
        given = list(rest)
        cond = given.pop(0) if self.model.conditioned else None
        previous = given.pop(0)
        memory = given.pop(0) if self.emphasis else None
        tensors = dict(zip(self.names, given, strict=True))
        state = _state_of(self.state, {name: x.clone() for name, x in tensors.items()})
        parameters = self.model.step(previous, state, cond)
        code = self.model.law.sample(parameters, uniform, temperature)
        audio = self.values[code]
        carried = [code]
        if memory is not None:  # as `wavear.audio.emphasis.Deemphasis`
            whole = audio.double() + self.emphasis * memory
            audio = whole.float().clamp(-1.0, 1.0)
            carried.append(whole)
        return parameters, code, audio, *carried, *_tensors(state).values()


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state by name; those of a list are numbered."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, list):
            found |= {f"{field.name}.{i}": x for i, x in enumerate(value)}
        else:
            found[field.name] = value
    return found


def _state_of(like: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the state of which `_tensors` are these."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(like):
        value = getattr(like, field.name)
        if isinstance(value, list):
            fields[field.name] = [tensors[f"{field.name}.{i}"] for i in range(len(value))]
        else:
            fields[field.name] = tensors[field.name]
    return type(like)(**fields)


class _Conditions(nn.Module):
    """The conditioning of whole frames (1, C, F * hop), from a mel with its context."""

    sub_frames: Tensor
    hop_weights: Tensor

    def __init__(self, model: AutoregressiveModel):
        super().__init__()
        self.conditioning = model.conditioning
        self.has_mel = model.config.mel is not None
        if isinstance(self.conditioning, PredictiveConditioning):
            hop, parts = self.conditioning.hop, self.conditioning.config.sub_frames
            sub_frames = torch.arange(hop) * parts // hop
            self.register_buffer("sub_frames", sub_frames)
            self.register_buffer("hop_weights", self.conditioning.hop_weights)

    def forward(self, *given: Tensor) -> Tensor:
        mel = given[0] if self.has_mel else None
        speaker = given[-1] if self.conditioning.speakers is not None else None
        if not isinstance(self.conditioning, PredictiveConditioning):
            return self.conditioning(mel, speaker, True)
        assert mel is not None
        frames = mel.shape[2] - self.conditioning.lookback - self.conditioning.lookahead
        gates, coefficients, scale, lag, voicing = self.conditioning.in_torch(mel, speaker, frames)
        every = [coefficients.transpose(1, 2), scale[:, None]]
        count = self.conditioning.config.sub_frames
        held = [x.unflatten(2, (frames, count))[..., self.sub_frames].flatten(2) for x in every]
        rows = [interpolated(gates.transpose(1, 2), self.hop_weights), *held]
        return torch.cat([*rows, lag[:, None].float(), voicing[:, None].float()], dim=1)


def _conditioning_graph(model: AutoregressiveModel) -> Any:
    names, inputs, dynamic = [], [], []
    if model.config.mel is not None:
        frames = 3 + model.lookback + model.lookahead
        names.append("mel")
        inputs.append(torch.randn(1, model.config.mel.bands, frames))
        dynamic.append({2: torch.export.Dim("frames", min=1 + model.lookback + model.lookahead)})
    if model.config.speakers:
        names.append("speaker")
        inputs.append(torch.zeros(1, dtype=torch.long))
        dynamic.append({})
    return _trace(_Conditions(model), tuple(inputs), names, ("cond",), (tuple(dynamic),))


def _trace(
    module: nn.Module, inputs: tuple[Tensor, ...], names: Any, results: Any, dynamic: Any = None
) -> Any:
    """Return the ONNX model of a module."""
    noisy = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                inputs,
                input_names=list(names),
                output_names=list(results),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic,
                # The optimizer drops the addition of a small number, such as the power of rounding.
                optimize=dynamic is None,
                custom_translation_table={
                    torch.ops.aten.searchsorted.Tensor: _searchsorted,
                    torch.ops.aten.asinh.default: _asinh,
                },
            )
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    return program.model_proto


def _operators() -> Any:
    from onnxscript import opset20

    return opset20


def _searchsorted(
    sequence: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
) -> Any:
    """Translate torch.searchsorted: count the elements of a rising sequence before each value."""
    op = _operators()
    ends, wanted = op.Unsqueeze(sequence, [-2]), op.Unsqueeze(values, [-1])
    before = op.LessOrEqual(ends, wanted) if right else op.Less(ends, wanted)
    return op.ReduceSum(op.Cast(before, to=7), [-1], keepdims=0)  # 7: int64


def _asinh(x: Any) -> Any:
    """Translate torch.asinh, which onnxruntime lacks in float64: sign(x) log(|x| + sqrt(x^2 + 1)).

    Near zero its error is that of 1 + |x|, 1e-16.
    """
    op = _operators()
    size = op.Abs(x)
    one = op.CastLike(op.Constant(value_float=1.0), x)
    return op.Mul(op.Sign(x), op.Log(op.Add(size, op.Sqrt(op.Add(op.Mul(x, x), one)))))
