"""circuit-tracer's own reading of an exported set and its own graphs; runs alone, in its environment.

    run() { python -m benchmarks.peers circuits -- python benchmarks/circuit_peer.py "$@"; }
    run encode SET ROWS OUT
    run save SET OUT
    run graph SET SUBJECT TOKENS OUT
    run intervene SET SUBJECT TOKENS EDITS OUT
    run check GRAPH.json

It imports nothing of Winnow's: its transformers is another version. SET is a folder that `winnow export --to
circuit-tracer` wrote, SUBJECT a folder of transformers' whose path holds no family's name (TransformerLens
would take it for that one), TOKENS are ids with commas between them, the first of a special token. EDITS is a
JSON list of [layer, position, latent, activation].
"""

# The other library is installed in an environment of its own, where the checker does not look.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

SIZES = {"device": torch.device("cpu"), "dtype": torch.float32}


def load_set(folder: Path) -> Any:
    """The set, by circuit-tracer's own loaders."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.utils.hf_utils import load_transcoders

    config = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    # Without a hub: the loader that takes a config knows addresses of the hub only for a cross-layer one.
    if config["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), scan="mine", lazy_decoder=False, **hooks, **SIZES)
    layers = len(list(folder.glob("layer_*.safetensors")))
    config["transcoders"] = [str(folder / f"layer_{layer}.safetensors") for layer in range(layers)]
    return load_transcoders(config, lazy_decoder=False, **SIZES)


def load_subject(folder: Path, scratch: Path) -> tuple[Any, Any, Any]:
    """Config, weights and tokenizer as TransformerLens has them."""
    from transformer_lens import loading_from_pretrained as lens
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = lens.get_pretrained_model_config(str(folder), fold_ln=False, **SIZES)
    # Of a folder of the Llama family it takes 10,000 unseen (3.2.1); and masks are as long as the context.
    if config.positional_embedding_type == "rotary":
        config.rotary_base = int(model.config.rope_theta)
        config.n_ctx = min(config.n_ctx, 512)
    state = lens.get_pretrained_state_dict(str(folder), config, model, dtype=torch.float32)
    # The tokenizer's own file, since transformers 5 writes the others so that 4 does not read them.
    written = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=written.get("eos_token") or "<|endoftext|>"
    )
    tokenizer.save_pretrained(scratch)
    config.tokenizer_name = str(scratch)
    return config, state, AutoTokenizer.from_pretrained(scratch)


def replacement(folder: Path, transcoders: Any, scratch: Path) -> Any:
    """Its replacement model, with the settings of its `from_pretrained_and_transcoders`."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )

    config, state, tokenizer = load_subject(folder, scratch)
    model = TransformerLensReplacementModel(config, tokenizer)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    model._configure_replacement_model(transcoders)
    return model


def encode(options: argparse.Namespace) -> None:
    """Codes and predictions of raw rows [B, D] a layer, named by layer."""
    found, rows = load_set(options.set), load_file(options.rows)
    x = torch.stack([rows[str(layer)] for layer in range(len(rows))])
    with torch.no_grad():
        codes = found.encode(x)
        y = found.decode(codes, x)
    save_file({"codes": codes.contiguous(), "y": y.contiguous()}, options.out)


def save(options: argparse.Namespace) -> None:
    """Write the set again, with its own writer."""
    load_set(options.set).to_safetensors(str(options.out))


def graph(options: argparse.Namespace) -> None:
    """Write OUT/graph.safetensors, OUT/graph.json as its page reads it, and print seconds and memory."""
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.utils.create_graph_files import create_graph_files

    options.out.mkdir(parents=True, exist_ok=True)
    model = replacement(options.subject, load_set(options.set), options.out / "tokenizer")
    tokens = torch.tensor([int(token) for token in options.tokens.split(",")])
    seconds, cpu = [], []
    for _ in range(options.rounds):
        start, busy = time.perf_counter(), time.process_time()
        found = attribute(
            tokens,
            model,
            max_n_logits=options.max_logits,
            desired_logit_prob=options.mass,
            max_feature_nodes=options.max_features,
            batch_size=options.batch,
        )
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    with torch.no_grad():
        logits = model(tokens[None])[0, -1]
    tensors = {
        "active": found.active_features,
        "selected": found.selected_features,
        "activations": found.activation_values,
        "adjacency": found.adjacency_matrix,
        "logit_tokens": torch.tensor([target.vocab_idx for target in found.logit_targets]),
        "probabilities": found.logit_probabilities,
        "logits": logits,
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        options.out / "graph.safetensors",
    )
    if options.write_json:
        create_graph_files(found, slug="graph", output_path=str(options.out), scan="mine")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": seconds, "cpu": cpu, "peak_bytes": peak, "active": len(found.active_features)})
    )


def intervene(options: argparse.Namespace) -> None:
    """Write the last position's logits [V]: unedited, and edited with what each of its options holds."""
    options.out.mkdir(parents=True, exist_ok=True)
    model = replacement(options.subject, load_set(options.set), options.out / "tokenizer")
    tokens = torch.tensor([int(token) for token in options.tokens.split(",")])
    edits = [tuple(edit) for edit in json.loads(options.edits)]
    ways = {
        "default": {},
        "nothing": {"freeze_attention": False},
        "all": {"constrained_layers": range(model.cfg.n_layers)},
    }
    with torch.no_grad():
        found = {"unedited": model(tokens[None])[0, -1]}
        for name, way in ways.items():
            logits, _ = model.feature_intervention(tokens, edits, **way)
            found[name] = logits.reshape(-1, logits.shape[-1])[-1]
    save_file({name: each.clone() for name, each in found.items()}, options.out / "logits.safetensors")


def check(options: argparse.Namespace) -> None:
    """Validate a graph with its own models, and say how many nodes and links it holds."""
    from circuit_tracer.frontend.graph_models import Link, Model

    found = Model.model_validate_json(options.graph.read_bytes())
    links = [Link.model_validate(link) for link in found.links]
    print(json.dumps({"nodes": len(found.nodes), "links": len(links), "slug": found.metadata.slug}))


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("encode")
    for name in ("set", "rows", "out"):
        one.add_argument(name, type=Path)
    one.set_defaults(run=encode)
    one = commands.add_parser("save")
    for name in ("set", "out"):
        one.add_argument(name, type=Path)
    one.set_defaults(run=save)
    one = commands.add_parser("graph")
    for name, kind in (("set", Path), ("subject", Path), ("tokens", str), ("out", Path)):
        one.add_argument(name, type=kind)
    one.add_argument("--max-features", type=int, default=None)
    one.add_argument("--max-logits", type=int, default=10)
    one.add_argument("--mass", type=float, default=0.95)
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--rounds", type=int, default=1)
    one.add_argument("--threads", type=int, default=torch.get_num_threads())
    one.add_argument("--write-json", action="store_true")
    one.set_defaults(run=graph)
    one = commands.add_parser("intervene")
    for name, kind in (("set", Path), ("subject", Path), ("tokens", str), ("edits", str), ("out", Path)):
        one.add_argument(name, type=kind)
    one.set_defaults(run=intervene)
    one = commands.add_parser("check")
    one.add_argument("graph", type=Path)
    one.set_defaults(run=check)
    options = parser.parse_args()
    if "threads" in options:
        torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
