"""The GPUs that a plan can be made for, as their makers' datasheets have them.

All rates are dense: datasheets print twice as much, "with sparsity", which these networks have not.
"""

from dataclasses import dataclass

from darkroom_export.errors import ExportError
from darkroom_export.precision import Precision

_CAPABILITY = "https://developer.nvidia.com/cuda-gpus"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_SDXL_TIMES = "https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt"

SOURCES = {"compute capability": _CAPABILITY, "efficiency": _SDXL_TIMES}


@dataclass(frozen=True)
class Efficiency:
    """The share of its peak rate that a GPU reaches in these networks."""

    share: float
    is_measured: bool
    """On this GPU, or on one of the same chip; otherwise it is the A10's."""


@dataclass(frozen=True)
class PublishedTime:
    """How long a GPU took for one picture of SDXL at 1024 x 1024, all of it, with TensorRT."""

    seconds: float
    num_inference_steps: int = 30


PUBLISHED_TIMES = {
    "A10": PublishedTime(8.160),
    "A100-80GB": PublishedTime(2.742),
    "H100": PublishedTime(1.471),
}
"""From the card of Stability AI's TensorRT version of SDXL, fp16, one picture at a time."""

_ON_A10 = Efficiency(0.41, is_measured=True)
_ON_A100 = Efficiency(0.49, is_measured=True)
_ON_HOPPER = Efficiency(0.29, is_measured=True)
_AS_A10 = Efficiency(0.41, is_measured=False)


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_gib: int
    """As it is sold; what programs get of it is less."""
    bandwidth_gb_s: float
    """Of its memory."""
    fp16_tflops: float
    """Of its tensor cores, with sums in float32; as many in bf16 where there is that."""
    fp32_tflops: float
    """In TF32 on tensor cores, as TensorRT, ONNX Runtime and PyTorch's convolutions compute
    float32 unless told not to; without such cores, in float32."""
    fp8_tflops: float | None
    """Told, but used by nothing here."""
    has_bf16: bool
    compute_capability: str
    efficiency: Efficiency
    source: str

    def peak_flops(self, precision: Precision) -> float:
        tflops = self.fp32_tflops if precision is Precision.FP32 else self.fp16_tflops
        return tflops * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gb_s * 1e9


_ALL = (
    Gpu(
        "T4",
        *(16, 300.0, 65.0, 8.1, None),
        has_bf16=False,
        compute_capability="7.5",
        efficiency=_AS_A10,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/"
        "t4-tensor-core-datasheet-951643.pdf",
    ),
    Gpu(
        "L4",
        *(24, 300.0, 121.0, 60.0, 242.0),
        has_bf16=True,
        compute_capability="8.9",
        efficiency=_AS_A10,
        source="https://nvdam.widen.net/s/rvq98gbwsw/l4-datasheet-2595652",
    ),
    Gpu(
        "A10G",
        *(24, 600.0, 70.0, 35.0, None),
        has_bf16=True,
        compute_capability="8.6",
        efficiency=_AS_A10,
        source="https://d1.awsstatic.com/product-marketing/ec2/"
        "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    Gpu(
        "A10",
        *(24, 600.0, 125.0, 62.5, None),
        has_bf16=True,
        compute_capability="8.6",
        efficiency=_ON_A10,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/"
        "datasheet-new/nvidia-a10-datasheet.pdf",
    ),
    Gpu(
        "RTX4090",
        *(24, 1008.0, 165.2, 82.6, 330.3),
        has_bf16=True,
        compute_capability="8.9",
        efficiency=_AS_A10,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
    ),
    Gpu(
        "L40S",
        *(48, 864.0, 362.0, 183.0, 733.0),
        has_bf16=True,
        compute_capability="8.9",
        efficiency=_AS_A10,
        source="https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
    ),
    Gpu(
        "A100-40GB",
        *(40, 1555.0, 312.0, 156.0, None),
        has_bf16=True,
        compute_capability="8.0",
        efficiency=_ON_A100,
        source=_A100,
    ),
    Gpu(
        "A100-80GB",
        *(80, 2039.0, 312.0, 156.0, None),
        has_bf16=True,
        compute_capability="8.0",
        efficiency=_ON_A100,
        source=_A100,
    ),
    Gpu(
        "H100",
        *(80, 3350.0, 989.0, 495.0, 1979.0),
        has_bf16=True,
        compute_capability="9.0",
        efficiency=_ON_HOPPER,
        source=_H100,
    ),
    Gpu(
        "H200",
        *(141, 4800.0, 989.0, 495.0, 1979.0),
        has_bf16=True,
        compute_capability="9.0",
        efficiency=_ON_HOPPER,
        source="https://resources.nvidia.com/en-us-data-center-overview/hpc-datasheet-sc23-h200",
    ),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
_SHORT_NAMES = {"A100": "A100-40GB", "4090": "RTX4090"}
"""Of two sizes, the smaller: what fits there fits both."""


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in upper or lower case.

    Raises:
        ExportError: there is none.
    """
    known = name.upper()
    known = _SHORT_NAMES.get(known, known)
    if known not in GPUS:
        raise ExportError(f"gpu: {name!r} is not known, there are {', '.join(GPUS)}")
    return GPUS[known]
