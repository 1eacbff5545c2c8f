"""Fields of a request as a message, and back."""

import json
import math
import threading
from multiprocessing.connection import Pipe

import pytest

import darkroom_wire as wire


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": b"a cat", "seed": 2**62, "guidance_scale": 7.5, "image": b"\x89PNG\xff\0"},
        {"original_size": (512, 768), "controlnet_conditioning_scale": (0.5,)},
        {"controlnet": (b"canny", b"depth"), "prompt": b"", "control_image": (b"\xff", b"")},
        {"lora": (), "lora_scale": (), "variant": b"x"},
    ],
)
def test_fields_come_out_as_they_went_in(fields: wire.Fields) -> None:
    header, blobs = wire.pack_fields(fields)

    assert wire.unpack_fields(json.loads(json.dumps(header)), blobs) == fields


def test_a_number_that_is_none_comes_through_to_be_refused() -> None:
    header, blobs = wire.pack_fields({"eta": math.nan})

    assert math.isnan(wire.unpack_fields(json.loads(json.dumps(header)), blobs)["eta"])


def test_a_picture_of_20_mb_is_one_message() -> None:
    near, far = Pipe()
    header, blobs = wire.pack_fields({"image": bytes(20 * 2**20), "prompt": b"a cat"})
    sending = threading.Thread(target=wire.send, args=(near, header, blobs))
    sending.start()
    fields = wire.unpack_fields(*wire.receive(far))
    sending.join()
    near.close()
    far.close()

    assert len(fields["image"]) == 20 * 2**20
    assert fields["prompt"] == b"a cat"
