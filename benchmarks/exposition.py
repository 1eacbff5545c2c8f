"""The server's metrics, in Prometheus' text format."""

import re
import urllib.request
from collections.abc import Mapping

from darkroom.protocol import MODEL

_LINE = re.compile(r"^(?P<series>[a-zA-Z_:][\w:]*(\{.*\})?) (?P<value>\S+)( \d+)?$")

Series = Mapping[str, float]
"""Values by name and labels, as the text has them: `darkroom_images_total{model="sdxl"}`."""


def scrape(url: str, timeout: float = 10.0) -> Series:
    """The metrics that a server tells now.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310  our own server
        return parse(answer.read().decode())


def parse(text: str) -> Series:
    matches = map(_LINE.match, text.splitlines())
    return {match["series"]: float(match["value"]) for match in matches if match}


def by_label(series: Series, name: str, label: str) -> dict[str, float]:
    """The values of a metric of the one engine, by the label that is not the model's."""
    pattern = re.compile(rf'{name}\{{model="{MODEL}",{label}="(.*)"\}}')
    matches = {pattern.fullmatch(key): value for key, value in series.items()}
    return {match[1]: value for match, value in matches.items() if match}


def total(series: Series, name: str) -> float:
    """The value of a metric of the one engine without other labels; 0 if it was never set."""
    return series.get(f'{name}{{model="{MODEL}"}}', 0.0)
