"""Every family in every mode makes diffusers' pictures, alone and in a mixed batch."""

from collections.abc import Iterator

import numpy as np
import pytest
from in_process import Engines

from equivalence.cases import CASES, PROMPT, Case
from equivalence.compare import compare, options_of
from equivalence.reference import Reference
from equivalence.workshop import Workshop

WAIT_S = 120.0
ARCHITECTURES = {
    *("tiny-sd15", "tiny-sd15-inpaint", "tiny-lcm", "tiny-sd21"),
    *("tiny-sdxl", "tiny-sdxl-refiner", "tiny-sd3"),
}
"""Between them, all networks that there are; `make equivalence` has more checkpoints of them."""
TOGETHER = {
    architecture: [
        case
        for case in CASES
        if case.architecture == architecture and not (case.refiner or case.variant)
    ]
    for architecture in ("tiny-sd15", "tiny-sdxl", "tiny-sd3")
}


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> Reference:
    return Reference(*workshop.reference_folders())


@pytest.fixture(scope="session")
def engines(workshop: Workshop) -> Iterator[Engines]:
    engines = Engines(workshop.repository)
    yield engines
    engines.close()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.architecture in ARCHITECTURES],
    ids=lambda case: f"{case.architecture}: {case.name}",
)
def test_the_picture_is_that_of_diffusers(
    case: Case, reference: Reference, engines: Engines
) -> None:
    comparison = compare(case, reference, engines.generate)

    assert comparison.is_equal, comparison


@pytest.mark.parametrize("architecture", TOGETHER)
def test_mixed_modes_in_one_batch_make_their_solo_pictures(
    architecture: str, engines: Engines
) -> None:
    requests = [options_of(case) | {"seed": n} for n, case in enumerate(TOGETHER[architecture])]
    solo = [engines.generate(architecture, PROMPT, **request) for request in requests]

    futures = [engines.ask(architecture, PROMPT, **request) for request in requests]
    together = [future.result(WAIT_S) for future in futures]

    for request, alone, crowded in zip(requests, solo, together, strict=True):
        for one, other in zip(alone, crowded, strict=True):
            difference = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
            assert difference.max() <= 1, request
