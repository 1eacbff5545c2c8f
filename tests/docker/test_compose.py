"""The images and the services: what they are made of, and what they may do."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
USER = "USER 10001:10001"


def tool(name: str) -> str:
    """The path of a tool that is installed with the tests' other needs."""
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"needs {name}: pip install -e .[dev]")
    return path


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def stages(dockerfile: str) -> dict[str, str]:
    """The lines of each stage, with those of the stages that it builds on before them."""
    text = (DOCKER / dockerfile).read_text().replace("\\\n", " ")
    own: dict[str, tuple[str, str]] = {}
    for block in re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]:
        origin, name = re.match(r"FROM (\S+) AS (\S+)", block).groups()
        own[name] = (origin, block)

    def whole(name: str) -> str:
        origin, block = own[name]
        return (whole(origin) if origin in own else "") + block

    return {name: whole(name) for name in own}


def test_hadolint_has_nothing_to_say():
    answer = subprocess.run(
        [
            tool("hadolint"),
            "--config",
            ROOT / ".hadolint.yaml",
            *(DOCKER / it for it in DOCKERFILES),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (answer.returncode, answer.stdout) == (0, "")


def test_the_services_fit_the_schema_of_compose():
    answer = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE],
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.returncode == 0, answer.stdout


def test_a_service_that_the_schema_does_not_have_is_found(tmp_path):
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text().replace("shm_size:", "shared_memory:"))

    answer = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file],
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.returncode == 1


def test_the_example_of_settings_has_all_that_compose_reads_with_its_defaults():
    example = dict(
        line.split("=", 1)
        for line in (DOCKER / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    read = set(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text()))

    assert dict(read) == example
    assert len(read) == len(example)  # one default each


def test_the_release_of_compose_is_that_of_the_dockerfile():
    (release,) = re.findall(
        r"^ARG TRITON_RELEASE=(\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE
    )

    assert f"TRITON_RELEASE: ${{TRITON_RELEASE:-{release}}}" in COMPOSE.read_text()
    assert f"Why {release}:" in (DOCKER / "Dockerfile").read_text()


def test_all_stages_of_the_gpu_image_share_one_base():
    origins = {text.split()[1] for text in stages("Dockerfile").values()}

    assert origins == {"${TRITON_IMAGE}"}


@pytest.mark.parametrize("name", services())
def test_a_service_is_confined(name):
    service = services()[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    for port in service.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${DARKROOM_BIND:-127.0.0.1}:"))


@pytest.mark.parametrize("name", services())
def test_an_image_is_pinned_or_built_here(name):
    service = services()[name]
    tag = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])

    assert "build" in service or re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", tag), tag


def test_only_the_export_may_write_models():
    mounts = {
        name: [it for it in service.get("volumes", []) if str(it).startswith("models:")]
        for name, service in services().items()
    }

    assert mounts["export"] == ["models:/models"]
    assert mounts["serve"] == ["models:/models:ro"]
    assert not any(mounts[name] for name in mounts.keys() - {"export", "serve"})


def test_the_server_starts_when_its_model_is_made():
    serve = services()["serve"]

    assert serve["depends_on"] == {"export": {"condition": "service_completed_successfully"}}
    assert services()["export"]["restart"] == "no"
    assert serve["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["export", "serve"])
def test_a_service_with_a_gpu_asks_for_it(name):
    (device,) = services()[name]["deploy"]["resources"]["reservations"]["devices"]

    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", ["serve", "serve-cpu"])
def test_a_server_is_found_by_prometheus_and_asked_for_pictures(name):
    service = services()[name]
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }

    assert targets["darkroom"] == [f"{service['networks']['default']['aliases'][0]}:8002"]
    assert service["healthcheck"]["test"][:3] == ["CMD", "darkroom", "probe"]
    assert service["shm_size"] == "${DARKROOM_SHM_SIZE:-1g}"
    assert service["init"] is True


@pytest.mark.parametrize(
    ("dockerfile", "target"),
    [
        ("Dockerfile", "export"),
        ("Dockerfile", "serve"),
        ("Dockerfile", "serve-torch"),
        ("Dockerfile.cpu", "export"),
        ("Dockerfile.cpu", "serve"),
    ],
)
def test_an_image_runs_without_root_and_checks_its_health(dockerfile, target):
    text = stages(dockerfile)[target]
    after_user = text[text.rindex(USER) :]

    assert not re.search(r"^(RUN|USER) ", after_user.partition("\n")[2], re.MULTILINE)
    assert ("HEALTHCHECK" in text) == target.startswith("serve")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_no_image_tells_others_of_its_use(dockerfile):
    for text in stages(dockerfile).values():
        assert "ORT_DISABLE_TELEMETRY=1" in text
        assert "HF_HUB_DISABLE_TELEMETRY=1" in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_default_image_is_the_server(dockerfile):
    assert list(stages(dockerfile))[-1] == "serve"


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_lists_of_packages_do_not_stay(dockerfile):
    for line in (DOCKER / dockerfile).read_text().replace("\\\n", " ").splitlines():
        if not line.startswith("#"):
            assert ("apt-get install" in line) == ("rm -rf /var/lib/apt/lists/*" in line)
            assert ("pip install" in line) == ("--no-cache-dir" in line)


def test_the_gpu_server_has_what_the_serve_extra_has_but_for_a_server():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[\w-]+", it)[0] for it in project["optional-dependencies"]["serve"]}
    (line,) = re.findall(
        r"^RUN pip install --no-cache-dir \. (.*)$",
        stages("Dockerfile")["serve-needs"],
        re.MULTILINE,
    )

    # The wheel's stub is built against numpy 1; the container's is not.
    assert set(line.split()) == extra - {"nvidia-pytriton", "numpy"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_builder_gets_all_that_the_images_copy(dockerfile):
    sent = [
        line[1:].rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    text = (DOCKER / dockerfile).read_text()
    copied = {
        source
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
        for source in sources.split()
    } - {"."}

    assert all((ROOT / path).exists() for path in sent)
    assert copied <= set(sent)
    assert {"client", "export", "model_repository", "README.md", "LICENSE"} <= set(sent)


class Tools:
    """Commands that tell what they were called with, and exit with a chosen status."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.calls = folder / "calls"
        self.calls.touch()

    def make(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def take_calls(self) -> list[str]:
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return lines

    def run(self, script: str, *arguments: object, **variables: str) -> tuple[int, str, str]:
        answer = subprocess.run(
            [DOCKER / script, *map(str, arguments)],
            env={"PATH": f"{self.folder}:/usr/bin:/bin", "CALLS": str(self.calls), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return answer.returncode, answer.stdout, answer.stderr


@pytest.fixture
def tools(tmp_path) -> Tools:
    tools = Tools(tmp_path / "bin")
    tools.make(
        "darkroom",
        'echo "$@" >>"$CALLS"\n'
        'if [ "$1" = export ]; then mkdir -p "$3" && touch "$3/manifest.json"; fi',
    )
    tools.make("nvidia-smi", "echo NVIDIA L40S")
    return tools


@pytest.fixture
def wish(tmp_path) -> dict[str, str]:
    return {
        "DARKROOM_CHECKPOINT": "some/checkpoint",
        "DARKROOM_REPOSITORY": str(tmp_path / "models" / "default"),
        "NVIDIA_TRITON_SERVER_VERSION": "26.07",
    }


def test_a_checkpoint_is_exported_and_built_once(tools, wish):
    repository = wish["DARKROOM_REPOSITORY"]

    assert tools.run("prepare", **wish)[0] == 0
    assert tools.take_calls() == [
        f"export some/checkpoint {repository} --backend python --precision fp16",
        f"build {repository} --backend tensorrt",
    ]
    assert tools.run("prepare", **wish)[0] == 0
    assert tools.take_calls() == []


@pytest.mark.parametrize(
    "change",
    [
        {"NVIDIA_TRITON_SERVER_VERSION": "26.08"},
        {"DARKROOM_BUILD_OPTIONS": "--preset buckets"},
        {"DARKROOM_BACKEND": "python"},
    ],
)
def test_engines_are_built_anew_for_another_release_or_wish(tools, wish, change):
    tools.run("prepare", **wish)
    tools.take_calls()

    assert tools.run("prepare", **{**wish, **change})[0] == 0
    (call,) = tools.take_calls()
    assert call.startswith(f"build {wish['DARKROOM_REPOSITORY']} --backend ")
    assert change.get("DARKROOM_BACKEND", "tensorrt") in call
    assert call.endswith(change.get("DARKROOM_BUILD_OPTIONS", ""))


def test_engines_are_built_anew_for_another_gpu(tools, wish):
    tools.run("prepare", **wish)
    tools.take_calls()
    tools.make("nvidia-smi", "echo NVIDIA A100")

    tools.run("prepare", **wish)

    assert len(tools.take_calls()) == 1


def test_a_torch_repository_is_only_exported(tools, wish):
    options = {"DARKROOM_BACKEND": "torch", "DARKROOM_EXPORT_OPTIONS": "--device cuda"}

    assert tools.run("prepare", **wish, **options, DARKROOM_PRECISION="bf16")[0] == 0

    (call,) = tools.take_calls()
    assert call.endswith("--backend torch --precision bf16 --device cuda")


@pytest.mark.parametrize(
    "change", [{"DARKROOM_CHECKPOINT": "another"}, {"DARKROOM_PRECISION": "fp32"}]
)
def test_what_another_export_made_is_kept(tools, wish, change):
    tools.run("prepare", **wish)
    tools.take_calls()

    status, _, error = tools.run("prepare", **{**wish, **change})

    assert status == 1
    assert wish["DARKROOM_REPOSITORY"] in error
    assert "some/checkpoint" in error
    assert tools.take_calls() == []


@pytest.mark.parametrize("failing", ["export", "build"])
def test_what_failed_is_tried_again(tools, wish, failing):
    make = tools.folder / "darkroom"
    working = make.read_text()
    make.write_text(working.replace("\n", f'\n[ "$1" = {failing} ] && exit 3\n', 1))

    assert tools.run("prepare", **wish)[0] == 3
    make.write_text(working)
    tools.take_calls()
    assert tools.run("prepare", **wish)[0] == 0

    assert failing in [call.split()[0] for call in tools.take_calls()]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"DARKROOM_CHECKPOINT": ""}, 2, "DARKROOM_CHECKPOINT"),
        ({"DARKROOM_REPOSITORY": ""}, 2, "DARKROOM_REPOSITORY"),
        ({"DARKROOM_BACKEND": "tensorflow"}, 2, "tensorflow"),
    ],
)
def test_a_wish_that_says_too_little_is_refused(tools, wish, change, status, said):
    answer = tools.run("prepare", **{**wish, **change})

    assert answer[0] == status
    assert said in answer[2]
    assert tools.take_calls() == []


@pytest.fixture
def libraries(tmp_path) -> Path:
    folder = tmp_path / "usr" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvinfer.so.11.1.0").touch()
    (folder / "libnvinfer.so.11").symlink_to("libnvinfer.so.11.1.0")
    (folder / "libnvinfer_plugin.so.11.1.0").touch()
    (folder / "libnvonnxparser.so.11.1.0").touch()
    return folder


def test_bindings_are_those_of_the_containers_tensorrt(tools, libraries):
    status, output, _ = tools.run(
        "install-tensorrt-bindings", "--dry-run", libraries, CUDA_VERSION="13.3.4.1"
    )

    assert status == 0
    assert output.split() == [
        *("pip", "install", "--no-cache-dir", "--no-deps"),
        *("tensorrt-cu13==11.1.0.*", "tensorrt-cu13-bindings==11.1.0.*"),
    ]


def test_an_image_without_tensorrt_or_with_two_is_refused(tools, libraries, tmp_path):
    (tmp_path / "empty").mkdir()
    none = tools.run(
        "install-tensorrt-bindings", "--dry-run", tmp_path / "empty", CUDA_VERSION="13.3"
    )
    (libraries / "libnvinfer.so.10.14.1").touch()
    two = tools.run("install-tensorrt-bindings", "--dry-run", libraries, CUDA_VERSION="13.3")

    assert none[0] == two[0] == 1
    assert "has no TensorRT" in none[2]
    assert "10.14.1 11.1.0" in two[2].replace("\n", " ")


def test_an_image_without_the_parser_of_onnx_is_refused(tools, libraries):
    (libraries / "libnvonnxparser.so.11.1.0").unlink()

    status, _, error = tools.run(
        "install-tensorrt-bindings", "--dry-run", libraries, CUDA_VERSION="13.3"
    )

    assert status == 1
    assert "libnvonnxparser.so.11.1.0 is missing" in error


def test_bindings_need_to_know_the_version_of_cuda(tools, libraries):
    status, _, error = tools.run("install-tensorrt-bindings", "--dry-run", libraries)

    assert status == 2
    assert "CUDA_VERSION" in error
