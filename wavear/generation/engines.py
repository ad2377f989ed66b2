"""The choice of an engine: by name, or the fastest that runs a model on its device."""

from __future__ import annotations

from typing import Any

from wavear.common.errors import WavearError, require
from wavear.generation.checks import check_finite_weights
from wavear.generation.cuda import choice
from wavear.generation.engine import Engine
from wavear.generation.reference import ReferenceEngine
from wavear.models.base import AutoregressiveModel, check_model

ENGINES = ("auto", "reference", "numba", "cuda-graph", "triton")
WEIGHTS = ("float32", "bfloat16", "int8", "float16")
# The engines that have weights of a type.
_ROUNDING = {"bfloat16": "'numba' or 'triton'", "int8": "'numba'", "float16": "'triton'"}


def make_engine(
    model: AutoregressiveModel,
    batch: int,
    engine: str = "auto",
    *,
    weights: str = "float32",
    threads: int | None = None,
) -> tuple[str, Engine]:
    """Return the name and an instance of the engine that runs `batch` streams of `model`.

    Parameters
    ----------
    engine : str
        "reference": the plain loop over `model.step`, for any model and device; slow, and the
        definition of correct. "numba": compiled for this CPU, for every family. "triton": one
        kernel on a CUDA device, for a WaveNet of mu-law codes. "cuda-graph": steps of any model on
        a CUDA device, captured once. "auto": numba on the CPU where it runs the model, on CUDA
        triton where it does, else cuda-graph; else reference.
    weights : str
        "float32"; "bfloat16" (numba, triton) or "float16" (triton): rounded once, half the bytes to
        read; "int8" (numba): rounded to 255 steps for each output of a matrix, a quarter of the
        bytes. All but the first cost some likelihood: `wavear bench CHECKPOINT` measures how much.
    threads : int, optional
        CPU cores that the numba engine may use; all of them by default.

    Raises
    ------
    WavearError
        If there is no such engine, it cannot run the model (the message names one that can), or
        weights are not finite.
    """
    check_model(model)
    require(engine, str, "engine", f"one of {', '.join(ENGINES)}")
    require(weights, str, "weights", f"one of {', '.join(WEIGHTS)}")
    if engine not in ENGINES:
        raise WavearError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if weights not in WEIGHTS:
        raise WavearError(f"weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}")
    if threads is not None and not (isinstance(threads, int) and threads >= 1):
        raise WavearError(f"threads is {threads!r}; it must be at least 1")
    if engine == "auto":
        device = next(model.parameters()).device
        if device.type == "cuda":
            engine = choice.pick(model, device)
        else:
            compiled = device.type == "cpu" and _compiled_engine(model) is not None
            engine = "numba" if compiled else "reference"
    if engine == "reference":
        require_float32(weights, engine)
    check_finite_weights(model)
    if engine in choice.ENGINES:
        return engine, choice.make(model, batch, engine, weights)
    if engine == "reference":
        return engine, ReferenceEngine(model, batch)
    compiled = _compiled_engine(model)
    if compiled is None:
        raise WavearError(
            f"engine 'numba' has no kernel for {type(model).__name__}: use engine 'reference'"
        )
    if weights == "float16":
        raise WavearError(
            f"engine 'numba' has no weights='float16': use engine {_ROUNDING[weights]}"
        )
    return engine, compiled(model, batch, weights=weights, threads=threads)


def require_float32(weights: str, engine: str) -> None:
    """Refuse rounded weights of an engine that has none."""
    if weights != "float32":
        raise WavearError(
            f"engine {engine!r} runs the model as it is: weights={weights!r} needs engine"
            f" {_ROUNDING[weights]}"
        )


def _compiled_engine(model: AutoregressiveModel) -> Any | None:
    """Return the class of the compiled engine for a model, if there is one; imports Numba."""
    from wavear.models.gru import GRU
    from wavear.models.linear import Linear
    from wavear.models.predictive import PredictiveWaveNet
    from wavear.models.transformer import Transformer
    from wavear.models.wavenet import WaveNet

    if isinstance(model, WaveNet):
        from wavear.generation.cpu.wavenet import NumbaEngine

        return NumbaEngine
    if isinstance(model, PredictiveWaveNet):
        from wavear.generation.cpu.predictive import NumbaPredictiveEngine

        return NumbaPredictiveEngine
    if isinstance(model, GRU):
        from wavear.generation.cpu.gru import NumbaGRUEngine

        return NumbaGRUEngine
    if isinstance(model, Transformer):
        from wavear.generation.cpu.transformer import NumbaTransformer

        return NumbaTransformer
    if isinstance(model, Linear):
        from wavear.generation.cpu.linear import NumbaLinearEngine

        return NumbaLinearEngine
    return None


def name_of_engine(engine: str, weights: str) -> str:
    """Return a name for people, with the weights where they are rounded.

    Examples
    --------
    >>> name_of_engine("numba", "int8")
    'numba with int8 weights'
    """
    return engine if weights == "float32" else f"{engine} with {weights} weights"
