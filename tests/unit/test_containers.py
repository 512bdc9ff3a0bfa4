"""The Dockerfile, the compose files and .env.example agree with the code. No container engine is needed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml

from cli.flags import variable_name
from cli.main import build_parser
from service.settings import Settings
from tests.support.paths import ROOT

CONTAINER_FILES = [
    "Dockerfile",
    "docker-compose.yml",
    "deploy/secrets.yml",
    ".env.example",
    "docs/operations.md",
]
OUR_SERVICES = ["migrate", "api", "worker", "worker-gpu"]
SECRET_NAME = re.compile(r"PASSWORD|API_KEY|LEDGER_KEY|TOKEN$")


class ComposeLoader(yaml.SafeLoader):
    """YAML with the `!reset` tag of compose, which removes a value of another file."""


RESET = object()
ComposeLoader.add_constructor("!reset", lambda loader, node: RESET)


def read_file(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load_compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    return yaml.load(read_file(name), ComposeLoader)  # type: ignore[no-any-return]


def services() -> dict[str, dict[str, Any]]:
    return load_compose()["services"]  # type: ignore[no-any-return]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the stages of the Dockerfile as lists of (instruction, arguments), `FROM` first, without comments."""
    text = re.sub(r"^#.*\n", "", read_file("Dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    stages_by_name: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            name = rest.split(" AS ")[1]
            stages_by_name[name] = []
        stages_by_name[name].append((word, rest))
    return stages_by_name


def single_instruction(stage: str, instruction: str) -> str:
    """Return the arguments of an instruction that a stage has once."""
    [rest] = [rest for word, rest in stages()[stage] if word == instruction]
    return rest


def environment(stage: str) -> dict[str, str]:
    pairs = [pair for word, rest in stages()[stage] if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


# names


@pytest.mark.parametrize("page", CONTAINER_FILES)
def test_every_variable_is_a_setting(page: str) -> None:
    """Every PALIMPSEST_ variable of the containers is a setting."""
    known = {variable_name(Settings, name) for name in Settings.model_fields} | {"PALIMPSEST_SECRETS"}
    assert set(re.findall(r"PALIMPSEST_[A-Z_]+", read_file(page))) <= known


def test_every_command_can_be_given() -> None:
    """Every container runs a command of the command line."""
    [script] = tomllib.loads(read_file("pyproject.toml"))["project"]["scripts"]
    images_commands = [single_instruction("api", "CMD"), single_instruction("worker", "CMD")]
    commands = [yaml.safe_load(words) for words in images_commands] + [services()["migrate"]["command"]]
    assert commands == [["api"], ["worker"], ["migrate", "--grant-to", "palimpsest_app"]]
    for command in commands:
        assert build_parser().parse_args(command).run
    for stage in ("api", "worker"):
        assert yaml.safe_load(single_instruction(stage, "ENTRYPOINT")) == [script]


def test_every_built_target_exists() -> None:
    """Compose builds the worker stage for workers and the stage without torch for the other services."""
    built = {name: service["build"]["target"] for name, service in services().items() if "build" in service}
    assert built == {"migrate": "api", "api": "api", "worker": "worker", "worker-gpu": "worker"}
    assert set(built.values()) < set(stages())


def test_every_mounted_file_is_in_the_repository() -> None:
    """Every file that compose mounts exists, except secrets, which the operator creates."""
    mounts = [m for s in services().values() for m in s.get("volumes", []) if m.startswith("./")]
    assert mounts
    for mount in mounts:
        assert (ROOT / mount.split(":")[0]).exists(), mount


def test_every_variable_of_compose_is_explained() -> None:
    """Every variable that compose reads from .env is in .env.example."""
    used = set(re.findall(r"\$\{(\w+)", read_file("docker-compose.yml")))
    assert used <= set(re.findall(r"^#?(\w+)=", read_file(".env.example"), re.MULTILINE))


# contents of an image


def test_the_api_has_no_torch() -> None:
    """The API image installs the project without extras, which excludes torch."""
    assert "api.txt" in str(stages()["api-needs"]) and "worker.txt" not in str(stages()["api-needs"])
    assert [rest for word, rest in stages()["api"] if word == "COPY"] == [
        "--from=api-needs /opt/palimpsest /opt/palimpsest"
    ]
    needed = tomllib.loads(read_file("pyproject.toml"))["project"]["dependencies"]
    assert not {"torch", "transformers"} & set(needed)


def test_the_builder_sees_what_the_wheel_is_made_of() -> None:
    """The build context has only the packages of the wheel and the files that the Dockerfile copies."""
    lines = [line for line in read_file(".dockerignore").splitlines() if line and not line.startswith("#")]
    packages = tomllib.loads(read_file("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = {"pyproject.toml", "LICENSE", "constraints.txt", "deploy/health.py"}
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied | set(packages)


def test_nothing_secret_is_written_down() -> None:
    """Secrets are empty in .env.example, passed by compose from the environment, and ignored by git."""
    for name, value in re.findall(r"^#?(\w+)=(.*)$", read_file(".env.example"), re.MULTILINE):
        assert not (SECRET_NAME.search(name) and value), name
    for service in services().values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET_NAME.search(name) or value is None or value.startswith("${"), name
    assert {".env", "/secrets/"} <= set(read_file(".gitignore").split())


def test_images_are_pinned() -> None:
    """Every base image has an exact version and no registry."""
    python = re.search(r"^ARG PYTHON=(\S+)$", read_file("Dockerfile"), re.MULTILINE)
    assert python
    images = [s["image"] for s in services().values() if "image" in s] + [f"python:{python[1]}"]
    assert len(images) == 5
    for image in images:
        assert re.fullmatch(r"[a-z]+(/[a-z]+)?:v?\d+\.\d+(\.\d+)?(-[a-z-]+)?", image), image
    assert [rest for stage in stages().values() for word, rest in stage if word == "FROM"] == [
        "python:${PYTHON} AS base",
        *(f"{below} AS {name}" for below, name in [("base", "api-needs"), ("api-needs", "worker-needs")]),
        *(f"base AS {name}" for name in ("wheel", "api", "worker")),
    ]


def test_where_torch_comes_from_is_an_argument() -> None:
    """The package index of torch is a build argument, empty by default; constraints.txt pins the version."""
    assert single_instruction("worker-needs", "ARG") == 'TORCH_INDEX=""'
    installs = [rest for word, rest in stages()["worker-needs"] if word == "RUN" and "install" in rest]
    assert ['${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in rest for rest in installs] == [True]
    assert all("-c constraints.txt" in rest for rest in installs)
    for worker in ("worker", "worker-gpu"):
        assert services()[worker]["build"]["args"] == {"TORCH_INDEX": "${TORCH_INDEX:-}"}


# privileges


def test_nobody_is_root() -> None:
    """Every container runs as a user with a fixed non-zero id. The project's containers run as the owner of
    their folders."""
    for stage in ("api", "worker"):
        assert single_instruction(stage, "USER") == "10001:10001"
    assert "--uid 10001" in single_instruction("base", "RUN")
    for name, service in services().items():
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name
        assert name not in OUR_SERVICES or service["user"] == "10001:10001"


@pytest.mark.parametrize("name", services())
def test_containers_have_no_rights_that_they_do_not_need(name: str) -> None:
    """Containers have no capabilities, no new privileges, a read-only file system with /tmp, and rotated logs."""
    service = services()[name]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True and "/tmp" in service["tmpfs"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}


@pytest.mark.parametrize("name", services())
def test_every_container_is_limited(name: str) -> None:
    """Every container has a limit of memory and of processes. A variable of .env has a default."""
    service = services()[name]
    memory = re.fullmatch(r"(?:\$\{[A-Z_]+_MEMORY:-)?([1-9]\d*)([mg])\}?", service["mem_limit"])
    assert memory and int(memory[1]) * {"m": 1, "g": 1024}[memory[2]] >= 512
    assert 64 <= service["pids_limit"] <= 1024


def test_redis_fits_into_its_container() -> None:
    """Redis may use its maximum memory twice, since it forks to rewrite its file, below the limit of its container."""
    words = services()["redis"]["command"]
    assert 2 * int(words[words.index("--maxmemory") + 1].removesuffix("mb")) < int(
        services()["redis"]["mem_limit"].removesuffix("m")
    )


def test_only_the_api_is_published() -> None:
    """Compose publishes the API port, on loopback by default, and the Grafana port, always on loopback."""
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {"api": ["${PUBLISH:-127.0.0.1:8000}:8000"], "grafana": ["127.0.0.1:3000:3000"]}
    assert services()["grafana"]["profiles"] == ["monitoring"]


def test_postgres_and_redis_are_inside() -> None:
    """PostgreSQL and Redis are attached only to the internal network, with the services that use them."""
    assert load_compose()["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "redis", "migrate"):
        assert services()[name]["networks"] == ["inside"]
    assert {name for name, service in services().items() if "inside" in service["networks"]} == {
        "postgres",
        "redis",
        *OUR_SERVICES,
    }


def test_the_service_does_not_own_its_tables() -> None:
    """Only `migrate` connects as the owner of the database; all others use the role that it grants rights to."""
    urls = {name: services()[name]["environment"]["PALIMPSEST_DATABASE_URL"] for name in OUR_SERVICES}
    owner = services()["postgres"]["environment"]["POSTGRES_USER"]
    assert urls.pop("migrate") == f"postgresql://{owner}@postgres/palimpsest"
    migrate = build_parser().parse_args(services()["migrate"]["command"])
    assert set(urls.values()) == {f"postgresql://{migrate.grant_to}@postgres/palimpsest"}
    secrets = load_compose("deploy/secrets.yml")["services"]
    owner_urls = {name for name in OUR_SERVICES if "palimpsest_owner_url" in str(secrets[name]["secrets"])}
    assert owner_urls == {"migrate"}


# startup


def test_the_default_is_cpu() -> None:
    """The profiles of .env.example start the CPU worker; GPU worker and monitoring are opt-in."""
    assert "COMPOSE_PROFILES=cpu" in read_file(".env.example").splitlines()
    profiles = {name: service.get("profiles") for name, service in services().items()}
    assert {name for name, chosen in profiles.items() if chosen is None} == {
        "postgres",
        "redis",
        "migrate",
        "api",
    }
    assert profiles["worker"] == ["cpu"] and profiles["worker-gpu"] == ["gpu"]
    [device] = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services()["worker-gpu"]["environment"]["PALIMPSEST_DEVICE"] == "cuda"


def test_migration_runs_first() -> None:
    """Services start after the migration and a healthy Redis; the migration runs once, after PostgreSQL is healthy."""
    for name in ("api", "worker", "worker-gpu"):
        conditions = {part: wait["condition"] for part, wait in services()[name]["depends_on"].items()}
        assert conditions == {"migrate": "service_completed_successfully", "redis": "service_healthy"}
        assert services()[name]["restart"] == "unless-stopped"
    migrate = services()["migrate"]
    assert migrate["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert migrate["restart"] == "no" and migrate["healthcheck"] == {"disable": True}


def test_redis_persists_and_never_evicts() -> None:
    """Redis writes an append-only file every second to a volume and evicts no key."""
    words = services()["redis"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes" and options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    assert services()["redis"]["volumes"] == ["redis:/data"]


def test_data_is_in_named_volumes() -> None:
    """Persistent data is in named volumes, mounted at folders that the image's user owns."""
    owned = {**environment("base"), **environment("worker")}
    folders = [owned["PALIMPSEST_DATA_DIR"], owned["HF_HOME"]]
    assert yaml.safe_load(single_instruction("worker", "VOLUME")) == folders
    assert all(folder in single_instruction("base", "RUN") for folder in folders)
    for worker in ("worker", "worker-gpu"):
        assert [mount.split(":")[1] for mount in services()[worker]["volumes"]] == folders
    named = {m.split(":")[0] for s in services().values() for m in s.get("volumes", []) if m[0] != "."}
    assert named == set(load_compose()["volumes"])


def test_secrets_may_be_files() -> None:
    """deploy/secrets.yml removes every secret from the environment and mounts it as a file."""
    overrides, secrets = (
        load_compose("deploy/secrets.yml")["services"],
        load_compose("deploy/secrets.yml")["secrets"],
    )
    for name in ("postgres", *OUR_SERVICES):
        passed = {
            k for k in services()[name]["environment"] if SECRET_NAME.search(k) or k.endswith("DATABASE_URL")
        }
        passed -= {"HF_TOKEN"}  # read by huggingface_hub
        reset_variables = {k for k, value in overrides[name]["environment"].items() if value is RESET}
        assert reset_variables == passed, name
        sources = {s["source"] if isinstance(s, dict) else s for s in overrides[name]["secrets"]}
        assert sources <= set(secrets), name
    assert {secret["file"] for secret in secrets.values()} == {f"./secrets/{name}" for name in secrets}


# health


@pytest.mark.parametrize(
    ("stage", "job", "setting"),
    [
        ("api", "palimpsest-api", "PALIMPSEST_PORT"),
        ("worker", "palimpsest-worker", "PALIMPSEST_METRICS_PORT"),
    ],
)
def test_health_check_asks_the_served_port(stage: str, job: str, setting: str) -> None:
    """Health checks and Prometheus use the port that a process serves."""
    port = environment(stage)[setting]
    assert single_instruction(stage, "EXPOSE") == port
    assert single_instruction(stage, "HEALTHCHECK").endswith(f'CMD ["python", "/opt/health.py", "{port}"]')
    scraped = {
        s["job_name"]: s["dns_sd_configs"] for s in load_compose("deploy/prometheus.yml")["scrape_configs"]
    }
    assert [(c["names"], str(c["port"])) for c in scraped[job]] == [([stage], port)]


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_health_check_exit_code(status: int, code: int) -> None:
    """deploy/health.py exits with 0 for a 200 and with 1 otherwise, and uses no proxy."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.handle_request).start()
        assert run_health_check(server.server_address[1]) == code


def test_nobody_there_is_not_healthy() -> None:
    """A refused connection exits with 1 and prints no traceback."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    assert run_health_check(port) == 1


def run_health_check(port: int) -> int:
    command = [sys.executable, str(ROOT / "deploy" / "health.py"), str(port)]
    completed = subprocess.run(
        command, env={"http_proxy": "http://127.0.0.1:1"}, capture_output=True, text=True, timeout=60
    )
    assert not completed.stderr
    return completed.returncode
