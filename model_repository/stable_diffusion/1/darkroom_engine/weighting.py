r"""Weights in prompts, as people write them: `a (red) circle`, `a (red:1.3) circle`, `\(`.

* `(text)` is 1.1 times as strong as what is around it, `((text))` 1.1 times that.
* `(text:1.3)` is 1.3 times as strong as what is around it.
* `\(` and `\)` are the letters themselves, and so is a parenthesis without a partner.
"""

import re

EMPHASIS = 1.1
WEIGHTS = (-10.0, 10.0)
"""The smallest and the largest weight; what is far outside makes noise of every picture."""

MAX_QUOTED_LETTERS = 40

_PIECE = re.compile(r"\\[()]|[()]|[^()\\]+|\\")
# One way to read each text, so that a long run of digits costs no more than its length.
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")

_ESCAPED = (r"\(", r"\)")


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Split a prompt into segments with the weight of each, in order; none of them is empty.

    Raises:
        ValueError: a weight is out of range; the text says which.
    """
    pieces = _PIECE.findall(text)
    partners = _partners(pieces)
    segments: list[tuple[str, float]] = []
    weights = [1.0]
    letters: list[str] = []

    def end_segment() -> None:
        segment = "".join(letters)
        letters.clear()
        if segment:
            segments.append((segment, _checked(weights[-1], segment)))

    for index, piece in enumerate(pieces):
        if index in partners:
            end_segment()
            if piece == "(":
                weights.append(weights[-1] * _own_weight(pieces, index, partners[index]))
            else:
                weights.pop()
        elif piece in _ESCAPED:
            letters.append(piece[1])
        elif _own_number(pieces, index, partners) is not None:
            letters.append(piece.rpartition(":")[0])
        else:
            letters.append(piece)
    end_segment()
    return segments


def _partners(pieces: list[str]) -> dict[int, int]:
    """The index of each parenthesis that has a partner, to that of its partner."""
    partners = {}
    opened = []
    for index, piece in enumerate(pieces):
        if piece == "(":
            opened.append(index)
        elif piece == ")" and opened:
            start = opened.pop()
            partners[start], partners[index] = index, start
    return partners


def _own_weight(pieces: list[str], start: int, end: int) -> float:
    """What the group from `pieces[start]` to `pieces[end]` multiplies the weight around it by."""
    number = _number(pieces, start, end)
    return EMPHASIS if number is None else number


def _own_number(pieces: list[str], index: int, partners: dict[int, int]) -> float | None:
    """The number at the end of a piece that a group ends after."""
    end = index + 1
    is_last_of_group = end in partners and pieces[end] == ")"
    return _number(pieces, partners[end], end) if is_last_of_group else None


def _number(pieces: list[str], start: int, end: int) -> float | None:
    before, colon, number = pieces[end - 1].rpartition(":")
    is_group_empty = not before and end - 1 == start + 1
    if not colon or is_group_empty or not _NUMBER.fullmatch(number):
        return None
    return float(number)


def _checked(weight: float, segment: str) -> float:
    low, high = WEIGHTS
    # A NaN, of nothing times infinity, fails every comparison, so that it is refused as well.
    if low <= weight <= high:
        return weight
    quoted = segment.strip()
    if len(quoted) > MAX_QUOTED_LETTERS:
        quoted = f"{quoted[:MAX_QUOTED_LETTERS]}..."
    raise ValueError(
        f"weight {weight:g} of {quoted!r} is out of range, allowed are {low:g} to {high:g}"
    )
