"""What the README and the docs show works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from darkroom import Client, InvalidRequest
from darkroom.server import Server
from darkroom_engine import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PRODUCTION = (ROOT / "docs" / "production.md").read_text()
CONFIG = ROOT / "model_repository" / "stable_diffusion" / "config.pbtxt"
BLOCKS = [
    (language, code)
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", README + PRODUCTION, re.DOTALL)
    if ".png" in code
]


def test_there_are_examples_of_every_way_to_ask() -> None:
    text = "".join(code for _, code in BLOCKS)

    for way in ("from darkroom import Client", "curl", "tritonclient.grpc", "tritonclient.http"):
        assert way in text


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=lambda text: text.splitlines()[0][:40])
def test_an_example_saves_its_picture(
    server: Server, tmp_path: Path, language: str, code: str
) -> None:
    code = code.replace("localhost:8001", server.grpc_url)
    code = code.replace("localhost:8000", server.http_url.removeprefix("http://"))
    interpreter = {"python": [sys.executable, "-c"], "bash": ["bash", "-ec"]}[language]

    subprocess.run([*interpreter, code], cwd=tmp_path, check=True)

    (saved,) = tmp_path.glob("*.png")
    with Image.open(saved) as picture:
        assert picture.size == (128, 128)


def test_the_table_of_inputs_is_complete() -> None:
    inputs = CONFIG.read_text().split("output [")[0]

    for name in re.findall(r'\{ name: "(\w+)" data_type', inputs):
        assert f"`{name}`" in README


def test_the_table_of_samplers_is_complete(client: Client) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("a red circle", sampler="?")

    for name in str(caught.value).partition("there are ")[2].split(", "):
        assert f"`{name.removesuffix('_karras')}`" in README


def test_the_table_of_metrics_is_complete() -> None:
    for metric in METRICS:
        assert re.search(
            rf"^\| `{metric.name}` \| {metric.kind.lower()} \|", PRODUCTION, re.MULTILINE
        )
