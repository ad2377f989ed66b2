"""The laws of `wavear.models.distributions` in compiled code, in float64.

A law is three numbers: `kind`, its `mixtures`, and the `classes` of its linear grid. `row` is the
address of the P float32 numbers that the network puts out.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from wavear.common.errors import WavearError
from wavear.generation.cpu import simd
from wavear.models.distributions import Categorical, Gaussian, Laplace, Law, LogisticMixture

CATEGORICAL, LOGISTIC_MIXTURE, GAUSSIAN, LAPLACE = range(4)
# As in `wavear.models.distributions`; the key of the compiled code covers this directory only.
SHARPEST, LARGEST_LOG_SCALE = 0.05, 5.0
_KINDS: dict[type[Law], int] = {
    Categorical: CATEGORICAL,
    LogisticMixture: LOGISTIC_MIXTURE,
    Gaussian: GAUSSIAN,
    Laplace: LAPLACE,
}
_ROOT_HALF = math.sqrt(0.5)
_LOG_2 = math.log(2)
_LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)
_FAR = -20.0  # deviations; below, the series of the normal tail is exact to float64


def numbers(law: Law) -> tuple[int, int, int]:
    """Return (kind, mixtures, classes) of a law."""
    if type(law) not in _KINDS:
        raise WavearError(
            f"engine 'numba' has no distribution {type(law).__name__}: use engine 'reference'"
        )
    kind = _KINDS[type(law)]
    return kind, law.mixtures if isinstance(law, LogisticMixture) else 1, law.grid.classes


@numba.njit
def _at(row, index):
    return np.float64(simd.load_float(row + 4 * index))


@numba.njit
def _scale(log_scale, classes):
    return max(math.exp(min(log_scale, LARGEST_LOG_SCALE)), SHARPEST * 2 / classes)


@numba.njit
def encode(value, classes):
    """Return the code of a value, as `Grid.encode` rounds it."""
    half = classes // 2
    return min(np.int64(math.floor(min(max(value, -1.0), 1.0) * half + 0.5)) + half, classes - 1)


@numba.njit
def draw_value(kind, mixtures, classes, row, uniform, temperature, weights):
    """Return the code of a uniform; -1 if the parameters are not finite.

    `weights` is memory for as many numbers as there are mixtures.
    """
    if kind == LOGISTIC_MIXTURE:
        return _draw_mixture(mixtures, classes, row, uniform, temperature, weights)
    mean, log_scale = _at(row, 0), _at(row, 1)
    if not (math.isfinite(mean) and math.isfinite(log_scale)):
        return -1
    away = normal_quantile(uniform) if kind == GAUSSIAN else laplace_quantile(uniform)
    return encode(mean + _scale(log_scale, classes) * temperature * away, classes)


@numba.njit
def _draw_mixture(mixtures, classes, row, uniform, temperature, weights):
    largest = -math.inf
    for k in range(3 * mixtures):
        if not math.isfinite(_at(row, k)):
            return -1
        if k < mixtures:
            largest = max(largest, _at(row, k))
    total = 0.0
    for k in range(mixtures):
        weights[k] = math.exp((_at(row, k) - largest) / temperature)
        total += weights[k]
    threshold = uniform * total
    which, below, weight = 0, 0.0, 0.0
    for k in range(mixtures):
        which, weight = k, weights[k]
        if below + weight > threshold:
            break
        below += weight
    left = min(max((threshold - below) / weight, 0.0), 1 - 2.0**-53) if weight > 0 else 0.5
    away = math.log(left) - math.log1p(-left) if left > 0 else -math.inf
    spread = _scale(_at(row, 2 * mixtures + which), classes) * temperature
    return encode(_at(row, mixtures + which) + spread * away, classes)


@numba.njit
def log_probability(kind, mixtures, classes, row, code):
    """log P(code) in nats."""
    if kind != LOGISTIC_MIXTURE:
        return _log_mass(kind, classes, _at(row, 0), _scale(_at(row, 1), classes), code)
    largest = -math.inf
    for k in range(mixtures):
        largest = max(largest, _at(row, k))
    total = 0.0
    for k in range(mixtures):
        total += math.exp(_at(row, k) - largest)
    top, found = -math.inf, 0.0
    for k in range(mixtures):
        scale = _scale(_at(row, 2 * mixtures + k), classes)
        part = _at(row, k) - largest + _log_mass(kind, classes, _at(row, mixtures + k), scale, code)
        # logsumexp as it comes.
        if part > top:
            found = found * math.exp(top - part) + 1.0
            top = part
        elif part > -math.inf:
            found += math.exp(part - top)
    return top + math.log(found) - math.log(total)


@numba.njit
def _log_mass(kind, classes, mean, scale, code):
    """log(F((upper - mean) / scale) - F((lower - mean) / scale)) of a code's interval."""
    half = classes // 2
    a = ((code - half - 0.5) / half - mean) / scale
    b = ((code - half + 0.5) / half - mean) / scale
    return log_mass(kind, a, b, 1.0 / (half * scale), code == 0, code == classes - 1)


@numba.njit
def log_mass(kind, a, b, width, first, last):
    """log(F(b) - F(a)) of the law of scale 1, b - a = `width`; the outer codes take the tails."""
    if first or last:
        return log_tail(kind, b if first else -a)
    if kind == LOGISTIC_MIXTURE:
        return log_tail(kind, b) + log_tail(kind, -a) + math.log(-math.expm1(-width))
    if a + b > 0:  # the laws are symmetric: everything is computed in the lower tail
        a, b = -b, -a
    if kind == LAPLACE:
        if b <= 0:
            return b - _LOG_2 + math.log(-math.expm1(-width))
        return math.log(max(-(math.expm1(a) + math.expm1(-b)) / 2, 1e-300))
    top = log_tail(kind, b)
    return top + math.log(-math.expm1(min(log_tail(kind, a) - top, -1e-300)))


@numba.njit
def log_tail(kind, x):
    """log F(x)."""
    if kind == LOGISTIC_MIXTURE:
        return -math.log1p(math.exp(-x)) if x > -30.0 else x - math.log1p(math.exp(x))
    if kind == LAPLACE:
        return x - _LOG_2 if x <= 0 else math.log1p(-0.5 * math.exp(-x))
    if x > _FAR:
        return (
            math.log(0.5 * math.erfc(-x * _ROOT_HALF))
            if x < 5.0
            else math.log1p(-0.5 * math.erfc(x * _ROOT_HALF))
        )
    # Phi(x) = phi(x) / -x * (1 - 1/x^2 + 3/x^4 - 15/x^6 + 105/x^8 - ...), Abramowitz and Stegun
    # 26.2.12
    square = 1.0 / (x * x)
    series = 1.0 - square * (1.0 - square * (3.0 - square * (15.0 - square * 105.0)))
    return -0.5 * x * x - math.log(-x) - _LOG_ROOT_2_PI + math.log(series)


@numba.njit
def laplace_quantile(uniform):
    """F^-1 of exp(-abs(x)) / 2."""
    if uniform < 0.5:
        return math.log(2.0 * uniform) if uniform > 0 else -math.inf
    return -math.log(2.0 * (1.0 - uniform))


# Wichura (1988), algorithm AS 241, PPND16: numerators and denominators, highest power first, in
# the middle, in the tails, and far out.
_MIDDLE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
     1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959,
     1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
     0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187,
     1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386,
     0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699,
     6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
     7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531,
     0.59983220655588793769, 1.0),
)  # fmt: skip


@numba.njit
def _polynomials(coefficients, r):
    above = below = 0.0
    for k in range(8):
        above = above * r + coefficients[0][k]
        below = below * r + coefficients[1][k]
    return above, below


@numba.njit
def normal_quantile(uniform):
    """F^-1 of the standard normal law, to about 1e-16."""
    if uniform <= 0.0:
        return -math.inf
    q = uniform - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        above, below = _polynomials(_MIDDLE, r)
        return q * above / below
    r = math.sqrt(-math.log(uniform if q < 0 else 1.0 - uniform))
    if r <= 5.0:
        above, below = _polynomials(_TAIL, r - 1.6)
    else:
        above, below = _polynomials(_FAR_TAIL, r - 5.0)
    return math.copysign(above / below, q)
