"""Where a subject runs, and in which dtype."""

from __future__ import annotations

import torch

from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(spec: SubjectSpec) -> torch.device:
    """The device that a subject runs on in this process; with `device_map`, the first one.

    Raises:
        ConfigError: There is no such device.
    """
    name, count = spec.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if spec.device_map is not None:
        if not count or name != "auto":
            raise ConfigError(
                f"subject.device_map {spec.device_map!r} spreads the subject over several GPUs",
                expected="GPUs that this process sees, and subject.device: auto",
                got=f"{count} GPUs, subject.device: {name}",
                fix="Leave device_map out, or set harvest.gpus_per_actor and use a machine with GPUs",
            )
        return torch.device("cuda:0")
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("subject.device", expected="auto, cpu, cuda or cuda:N", got=name) from error
    # Without an index: `cpu:0` is another device to torch's comparisons.
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or (device.index or 0) >= count:
        raise ConfigError(
            "subject.device",
            expected=f"a device of this machine (cpu{''.join(f', cuda:{i}' for i in range(count))})",
            got=name,
            fix="Set device to auto or cpu, or install a torch that sees the GPU",
        )
    return torch.device("cuda", device.index or 0)


def dtype_of(spec: SubjectSpec, device: torch.device) -> torch.dtype:
    """The dtype of a subject on a device."""
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[spec.dtype]
