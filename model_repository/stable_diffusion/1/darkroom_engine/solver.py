"""Solvers as tables: one step is a fixed linear combination, so its coefficients are data.

The state of a sample is a stack of latents, and `SolverTable` holds, for every step, the weights
that turn this stack into the next one. Whatever the sampler, all rows of a batch then advance by
the same gathered multiply-add (`advance`), each with the weights of its own step. Samples are kept
in the scale that the network was trained in, x_t = alpha_t x_0 + sigma_t eps, whatever scale a
paper uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from darkroom_engine.arrays import Array
from darkroom_engine.schedule import Floats, NoiseLevels

# The stack: x_t, the corrected sample of the step before, the last predictions, newest first, and
# fresh noise for the samplers that add some.
SAMPLE: Final = 0
LAST: Final = 1
PREDICTION: Final = 2
MAX_ORDER: Final = 3
NOISE: Final = PREDICTION + MAX_ORDER + 1
NUM_TERMS: Final = NOISE + 1


@dataclass(frozen=True)
class SolverTable:
    """The coefficients of a whole run of S steps, float64."""

    timesteps: Floats
    """(S,) what the UNet is told."""
    levels: Floats
    """(S, 2) alpha and sigma at the start of each step: there, x_0 is alpha x_0 + sigma noise."""
    convert: Floats
    """(S, 2) weights of (x_t, UNet output) in the prediction that the solver works with."""
    correct: Floats
    """(S, NUM_TERMS) weights of the stack in the corrected x_t."""
    advance: Floats
    """(S, NUM_TERMS) weights of the stack in the next sample."""
    initial_scale: float = 1.0
    """The starting sample is this times unit noise."""
    is_stochastic: bool = False
    """Whether every step takes unit noise of its own, to be put into the stack before it."""
    preview: Floats = field(default_factory=lambda: np.array([0.0, 1.0]))
    """(S, 2) weights of LAST and PREDICTION + 1, as a step leaves them, in its predicted x_0.

    Or (2,) for all steps; the default is that of solvers that work with x_0.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "preview", np.broadcast_to(self.preview, (self.num_steps, 2)))
        weights = (self.convert, self.correct, self.advance, self.preview)
        if not all(np.isfinite(weight).all() for weight in weights):
            raise ValueError(
                "the solver has no finite coefficients for this schedule: a last step of order 2 "
                "or more to noise level zero; use lower_order_final, or final_sigmas_type sigma_min"
            )

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def part(self, begin: int, end: int) -> "SolverTable":
        """The table of the steps from `begin` up to `end`."""
        return replace(
            self,
            timesteps=self.timesteps[begin:end],
            levels=self.levels[begin:end],
            convert=self.convert[begin:end],
            correct=self.correct[begin:end],
            advance=self.advance[begin:end],
            preview=self.preview[begin:end],
        )


def initial_state(noise: NDArray[np.float32], table: SolverTable) -> NDArray[np.float32]:
    """The stack before the first step: (NUM_TERMS, C, H, W) from unit noise (C, H, W)."""
    state = np.zeros((NUM_TERMS, *noise.shape), np.float32)
    state[SAMPLE] = noise * np.float32(table.initial_scale)
    return state


def advance(
    states: NDArray[Any],
    outputs: NDArray[Any],
    tables: Sequence[SolverTable],
    steps: Sequence[int],
) -> NDArray[Any]:
    """Advance N samples by one step each, row n by step `steps[n]` of `tables[n]`.

    Args:
        states: (N, NUM_TERMS, C, H, W), overwritten; the computation has its precision.
        outputs: (N, C, H, W) guided UNet outputs.

    Returns:
        `states`, holding the next stacks.
    """
    advance_by(states, outputs, *step_weights(tables, steps, states.dtype))
    return states


def step_weights(
    tables: Sequence[SolverTable], steps: Sequence[int], dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What step `steps[n]` of `tables[n]` multiplies by, for every n of N samples.

    Returns:
        (N, 2, 1, 1, 1), the weights of (x_t, output) in the prediction, and (N, 2, NUM_TERMS),
        those of the stack in the corrected x_t and in the next sample.
    """
    rows = list(zip(tables, steps, strict=True))
    convert = np.array([table.convert[step] for table, step in rows], dtype)
    weights = [(table.correct[step], table.advance[step]) for table, step in rows]
    return convert[:, :, None, None, None], np.array(weights, dtype)


def advance_by(states: Array, outputs: Array, convert: Array, weights: Array) -> Array:
    """As `advance`, with the `step_weights`; all of them may lie on a device."""
    states[:, PREDICTION] = convert[:, 0] * states[:, SAMPLE] + convert[:, 1] * outputs

    # One small product per row, each of the same size whatever the batch: were it one product over
    # all rows, a row's sum could be taken in another order when its neighbours change.
    following = weights @ states.reshape(len(states), NUM_TERMS, -1)

    for term in range(NOISE - 1, PREDICTION, -1):
        states[:, term] = states[:, term - 1]
    states[:, LAST] = following[:, 0].reshape(outputs.shape)
    states[:, SAMPLE] = following[:, 1].reshape(outputs.shape)
    return states


def predicted_x0(state: Array, table: SolverTable, step: int) -> Array:
    """The x_0 that the UNet predicted at `step`, counted from 0, for a preview.

    A solver that works with noise says what x_0 that noise leaves of the corrected x_t, the UNet
    having seen the uncorrected one.

    Args:
        state: (NUM_TERMS, C, H, W), as `advance` by that step left it.

    Returns:
        (C, H, W), a copy.
    """
    last, newest = table.preview[step].tolist()
    return last * state[LAST] + newest * state[PREDICTION + 1]


def uncorrected(num_steps: int) -> Floats:
    """`SolverTable.correct` of a solver without a corrector: x_t as it is."""
    correct = np.zeros((num_steps, NUM_TERMS))
    correct[:, SAMPLE] = 1
    return correct


def x0_weights(levels: NoiseLevels, prediction_type: str) -> Floats:
    """(S, 2) weights of (x_t, UNet output) in the x_0 that the output predicts."""
    alpha, sigma = levels.starts.T
    ones = np.ones_like(alpha)
    if prediction_type == "epsilon":
        return np.stack([1 / alpha, -sigma / alpha], axis=1)
    if prediction_type == "v_prediction":
        # Salimans & Ho 2022 (arXiv:2202.00512): v = alpha eps - sigma x_0.
        return np.stack([alpha, -sigma], axis=1)
    if prediction_type == "flow_prediction":
        # v = eps - x_0, and alpha = 1 - sigma.
        return np.stack([ones, -sigma], axis=1)
    return np.stack([0 * ones, ones], axis=1)
