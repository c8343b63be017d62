"""The interface to transformers: loads a causal LM, its tokenizer, or a GGUF; quietly, with our errors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub.errors
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer

from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec
from winnow.subject.gguf_tokenizer import gguf_tokenizer

log = logging.getLogger("winnow.subject")

# Whatever transformers, safetensors and a model's own code raise for files or configs that they cannot read.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    getattr(huggingface_hub.errors, "StrictDataclassError", OSError),  # a config's field of another type
)


def load_model(
    folder: Path, spec: SubjectSpec, dtype: torch.dtype, *, divided: bool = False
) -> transformers.PreTrainedModel:
    """The causal LM in `folder`, in eval mode, without gradients.

    Its weights are on the CPU, mapped from the files if their dtype is `dtype` (then processes share them);
    with `device_map`, on the GPUs. `divided` loads this process's share of them, as one of
    `spec.tensor_parallel` processes.

    Raises:
        ConfigError: transformers cannot load it, weights are missing, or the GPUs are too small for it.
    """
    spread: dict[str, Any] = {"device_map": spec.device_map} if spec.device_map else {}
    with quiet(), _explained(spec):
        if divided:
            # Older ones have none.
            from transformers.distributed.configuration_utils import DistributedConfig

            spread["distributed_config"] = DistributedConfig(tp_size=spec.tensor_parallel)
        config = _read_config(folder, spec)
        loaded: Any = _auto_class(config).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,  # fetched before, by `locate`, whose files are the ones that are digested
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=_asked_attention(spec, config),
            output_loading_info=True,
            **_dtype_argument(dtype),
            **spread,
        )
    model, report = cast("tuple[transformers.PreTrainedModel, dict[str, Any]]", loaded)
    _check_complete(report, folder)
    check_on_gpus(getattr(model, "hf_device_map", {}) if spec.device_map else {})
    return model.eval().requires_grad_(False)


def outline_model(folder: Path, spec: SubjectSpec, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The causal LM in `folder` without weights, on torch's device `meta`: shapes and names only.

    Raises:
        ConfigError: transformers does not support it.
    """
    with quiet(), _explained(spec):
        config = _read_config(folder, spec)
        with torch.device("meta"):
            model = _auto_class(config).from_config(
                config,
                attn_implementation=_asked_attention(spec, config),
                trust_remote_code=spec.trust_remote_code,
                **_dtype_argument(dtype),
            )
    return model.eval().requires_grad_(False)


def attention_of(model: transformers.PreTrainedModel, spec: SubjectSpec) -> Literal["sdpa", "eager"]:
    """The attention implementation that a model's text part runs with; `eager` for a model without attention.

    Raises:
        ConfigError: Its config requests another one, and `spec` none.
    """
    taken = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if taken not in ("sdpa", "eager"):
        raise ConfigError(
            f"subject.model {spec.model!r} runs with an attention of its own",
            expected="sdpa or eager",
            got=taken,
            fix="Set subject.attention to one of them",
        )
    return taken


def _read_config(folder: Path, spec: SubjectSpec) -> Any:
    config: Any = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=spec.trust_remote_code
    )
    # Tuples, which a config may ask for, are nothing that the head of a model reads a stream from.
    for part in (config, config.get_text_config()):
        part.return_dict = True
    return config


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a config's model as one that predicts tokens."""
    causal, vision = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    # Code beside the weights comes first, as in transformers itself.
    if causal.__name__ in (getattr(config, "auto_map", None) or {}):
        return causal
    # LLaVA, Mistral 3, Qwen-VL, PaliGemma, InternVL, ...: without an image they are their text model.
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return (
        vision if not known and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else causal
    )


def _asked_attention(spec: SubjectSpec, config: Any) -> str | None:
    """The attention to request; None lets transformers take sdpa if the architecture has it, else eager."""
    # torch's sdpa has no soft cap on attention's logits, and transformers 4.51 to 5.20 run Gemma 2 with it
    # all the same, without the cap: other activations, no message (0.51 off at a cap of 0.5).
    capped = bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
    if capped and spec.attention == "sdpa":
        raise ConfigError(
            f"subject.model {spec.model!r} caps the logits of its attention, which sdpa leaves out",
            expected="attention: eager",
            got="sdpa",
            fix="Set subject.attention to auto or eager",
        )
    # Eager Falcon adds ALiBi to the scores and again with the mask: another model than with sdpa
    # (`findings/falcon_eager_alibi_twice.sh`).
    biased = config.model_type == "falcon" and config.alibi
    if biased and spec.attention == "eager":
        raise ConfigError(
            f"subject.model {spec.model!r} has ALiBi, which transformers' eager attention adds twice",
            expected="attention: sdpa",
            got="eager",
            fix="Set subject.attention to auto or sdpa",
        )
    if spec.attention == "auto":
        return "eager" if capped else "sdpa" if biased else None
    return spec.attention


def check_on_gpus(placed: Mapping[str, object]) -> None:
    """Check that accelerate left no part (path -> device) of a model to the CPU or a disk.

    Raises:
        ConfigError: It did.
    """
    # Such parts are copied to a GPU in every pass: the harvest would work, at a fraction of its speed.
    left = [path for path, device in placed.items() if str(device) in ("cpu", "disk")]
    if left:
        raise ConfigError(
            "subject.device_map: the GPUs are too small for the subject",
            expected="every layer on a GPU",
            got=f"{len(left)} parts left over, {left[0]!r} the first",
            fix="Raise harvest.gpus_per_actor",
        )


def load_tokenizer(folder: Path, spec: SubjectSpec) -> transformers.PreTrainedTokenizerBase:
    """The fast tokenizer in `folder`, which splits text as its tokenizer.json says.

    Raises:
        ConfigError: There is none, or it is not one of the `tokenizers` library.
    """
    with _explained(spec):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
        # transformers 5 rebuilds some classes (GPT-2's, Llama's, Qwen2's) from the vocabulary and ignores how
        # the file splits text: digits one by one (SmolLM2, StarCoder2), a space before any text (Llama 2).
        stored = folder / "tokenizer.json"
        if type(tokenizer) is not transformers.PreTrainedTokenizerFast and stored.is_file():
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is not None and _cutting(backend) != _cutting(Tokenizer.from_file(str(stored))):
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                    folder, local_files_only=True
                )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"subject.model {spec.model!r} has a slow tokenizer",
            expected="a tokenizer.json of the tokenizers library",
            got=type(tokenizer).__name__,
        )
    # transformers 5 drops this field where there is a tokenizer.json, whose post-processor may add nothing
    # (DeepSeek's). Put back for `TextTokenizer.bos`, not as a post-processor, which would change the digest.
    if _facts(folder / "tokenizer_config.json").get("add_bos_token") is True:
        tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def _facts(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def tokenizer_digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """SHA-256 of a fast tokenizer's serialised form."""
    return sha256_hex(cast(Any, tokenizer).backend_tokenizer.to_str().encode())


def _cutting(backend: Tokenizer) -> list[object]:
    """Everything that decides how a text is split into tokens, beside vocabulary and merges."""
    # `trim_offsets` does not, and differs between files and classes that give the same tokens.
    rules = [part.__getstate__() if part else b"" for part in (backend.normalizer, backend.pre_tokenizer)]
    rules = [re.sub(rb',"trim_offsets":(true|false)', b"", rule) for rule in rules]
    return [*rules, getattr(backend.model, "ignore_merges", False)]


def convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as float32 safetensors.

    Raises:
        ConfigError: transformers cannot read the file, or weights are missing in it.
        OSError, SafetensorError: The folder cannot be written.
    """
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with quiet():
        with _explained(SubjectSpec(model=str(path))):
            tokenizer = gguf_tokenizer(path)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, output_loading_info=True, **where, **_dtype_argument(torch.float32)
            )
            model, report = loaded
            _check_complete(report, path)
            # A model read from a GGUF counts as quantised and refuses to be saved: its weights go into a
            # plain twin, made without memory of its own.
            fields = model.config.to_dict()
            fields.pop("quantization_config", None)
            with torch.device("meta"):
                plain = transformers.AutoModelForCausalLM.from_config(
                    type(model.config).from_dict(fields), **_dtype_argument(torch.float32)
                )
            plain.load_state_dict(model.state_dict(), assign=True)
            # `assign` makes a parameter of its own of each name of a tied weight.
            plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_complete(report: dict[str, Any], where: Path) -> None:
    # transformers only logs this, and initialises them at random.
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ConfigError(
            f"{where} lacks weights of the model, which would be random",
            got=f"{len(missing)} missing: {', '.join(missing[:5])}",
        )
    if unexpected := sorted(report.get("unexpected_keys") or ()):
        log.info("%s holds %d weights the model does not use: %s ...", where, len(unexpected), unexpected[0])


# transformers 4.56 renamed it, and warns of the old name.
def _dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    # The hub's client begins with "Got:", and so does what stands before this line.
    text = str(error).strip().removeprefix("Got: ") or type(error).__name__
    return text.splitlines()[0][:300]


@contextmanager
def _explained(spec: SubjectSpec) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        text = str(error)
        fix = "Check that transformers supports this model, and that the files are whole"
        if "scaled_dot_product_attention" in text:
            fix = "Set subject.attention to auto or eager"
        elif "trust_remote_code" in text:
            fix = "Set subject.trust_remote_code to true only if you have read and trust the model's code"
        raise ConfigError(
            f"subject.model {spec.model!r} cannot be loaded", got=first_line(error), fix=fix
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and transformers' report of the weights, which `_check_complete` replaces."""
    # The settings are global to the process: restored, for whoever else uses transformers in it.
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as their_logging

    gguf: Any = modeling_gguf_pytorch_utils
    bars, verbosity = their_logging.is_progress_bar_enabled(), their_logging.get_verbosity()
    gguf_bar: Callable[..., Any] | None = getattr(gguf, "tqdm", None)
    their_logging.disable_progress_bar()
    their_logging.set_verbosity_error()
    if gguf_bar is not None:
        gguf.tqdm = lambda items, **_: items  # this one is not governed by disable_progress_bar
    try:
        yield
    finally:
        if gguf_bar is not None:
            gguf.tqdm = gguf_bar
        their_logging.set_verbosity(verbosity)
        if bars:
            their_logging.enable_progress_bar()
