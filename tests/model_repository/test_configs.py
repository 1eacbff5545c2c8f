"""The config, the engine's fields and the client's table are one contract."""

from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from darkroom import protocol
from darkroom_engine import EngineConfig
from darkroom_engine.request import FIELDS

CONTRACT = {
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "num_inference_steps": "TYPE_INT32",
    "guidance_scale": "TYPE_FP32",
    "guidance_rescale": "TYPE_FP32",
    "guidance_start": "TYPE_FP32",
    "guidance_stop": "TYPE_FP32",
    "seed": "TYPE_INT64",
    "width": "TYPE_INT32",
    "height": "TYPE_INT32",
    "sampler": "TYPE_STRING",
    "eta": "TYPE_FP32",
    "timestep_spacing": "TYPE_STRING",
    "clip_skip": "TYPE_INT32",
    "max_embeddings_multiples": "TYPE_INT32",
    "num_images_per_prompt": "TYPE_INT32",
    "image": "TYPE_STRING",
    "mask_image": "TYPE_STRING",
    "strength": "TYPE_FP32",
    "denoising_start": "TYPE_FP32",
    "denoising_end": "TYPE_FP32",
    "original_size": "TYPE_INT32",
    "crops_coords_top_left": "TYPE_INT32",
    "target_size": "TYPE_INT32",
    "aesthetic_score": "TYPE_FP32",
    "negative_aesthetic_score": "TYPE_FP32",
    "controlnet": "TYPE_STRING",
    "control_image": "TYPE_STRING",
    "controlnet_conditioning_scale": "TYPE_FP32",
    "control_guidance_start": "TYPE_FP32",
    "control_guidance_end": "TYPE_FP32",
    "lora": "TYPE_STRING",
    "lora_scale": "TYPE_FP32",
    "variant": "TYPE_STRING",
    "priority": "TYPE_INT32",
    "timeout_ms": "TYPE_INT32",
    "output_format": "TYPE_STRING",
}
"""What clients rely on; a change here breaks them."""

DIMS = {
    "original_size": [2],
    "crops_coords_top_left": [2],
    "target_size": [2],
    "controlnet": [-1],
    "control_image": [-1],
    "controlnet_conditioning_scale": [-1],
    "control_guidance_start": [-1],
    "control_guidance_end": [-1],
    "lora": [-1],
    "lora_scale": [-1],
}
"""Of the fields that are not one value."""


def types(entries: Any) -> dict[str, str]:
    names = model_config_pb2.DataType
    return {entry.name: names.Name(entry.data_type) for entry in entries}


def test_the_inputs_are_the_contract(engine_config: Any) -> None:
    assert types(engine_config.input) == CONTRACT
    for entry in engine_config.input:
        assert list(entry.dims) == DIMS.get(entry.name, [1])


def test_every_input_but_the_prompt_is_optional(engine_config: Any) -> None:
    required = [entry.name for entry in engine_config.input if not entry.optional]

    assert required == ["prompt"]


def test_the_outputs_are_the_contract(engine_config: Any) -> None:
    dims = {entry.name: list(entry.dims) for entry in engine_config.output}

    assert types(engine_config.output) == {
        "image": "TYPE_STRING",
        "seed": "TYPE_INT64",
        "info": "TYPE_STRING",
    }
    assert dims == {"image": [-1], "seed": [-1], "info": [1]}
    assert tuple(dims) == protocol.OUTPUTS


def test_the_engine_reads_exactly_the_inputs(engine_config: Any) -> None:
    assert {entry.name for entry in engine_config.input} == FIELDS


def test_the_client_sends_the_inputs_in_their_types(engine_config: Any) -> None:
    ours = types(engine_config.input)

    assert set(protocol._INPUTS) == set(ours)
    for name, (datatype, dtype) in protocol._INPUTS.items():
        assert ours[name] == f"TYPE_{datatype}".replace("BYTES", "STRING")
        assert np_to_triton_dtype(np.dtype(dtype)) == datatype
    assert {name: [size] for name, size in protocol._DIMS.items()} == DIMS


def test_the_client_asks_this_model(engine_config: Any) -> None:
    assert engine_config.name == protocol.MODEL


def test_the_engine_batches_and_triton_does_not(engine_config: Any) -> None:
    assert engine_config.max_batch_size == 0
    assert not engine_config.HasField("dynamic_batching")
    assert not engine_config.model_transaction_policy.decoupled
    (group,) = engine_config.instance_group
    assert group.count == 1


def test_the_parameters_are_the_engines_settings_at_their_defaults(engine_config: Any) -> None:
    parameters = {
        key: {"string_value": entry.string_value} for key, entry in engine_config.parameters.items()
    }

    assert EngineConfig.from_parameters(parameters) == EngineConfig()
    assert set(parameters) == set(EngineConfig.__dataclass_fields__)


def test_the_config_is_written_as_the_schema_says(engine_config: Any) -> None:
    again = text_format.MessageToString(engine_config)

    assert text_format.Parse(again, model_config_pb2.ModelConfig()) == engine_config
