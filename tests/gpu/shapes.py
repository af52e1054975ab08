"""`python -m tests.gpu.shapes SHAPE MODEL FOLDER`: a model of a known shape with random weights, and MODEL's tokenizer.

Random weights are the worst case: near-ties everywhere, so that a last bit that differs shows in a token soon.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "qwen3-1.7b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "head_dim": 128, "num_attention_heads": 16,
        "attention_bias": False, "use_sliding_window": False,
    },
}  # fmt: skip
SHAPES["llama-8b-awq"] = SHAPES["llama-8b"] | {
    "dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"}
AWQ_GROUP = 128


def products(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix of a Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "lm_head", config["vocab_size"], hidden
    for layer in range(config["num_hidden_layers"]):
        attention, feed = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        yield f"{attention}.q_proj", queries, hidden
        yield f"{attention}.k_proj", keys, hidden
        yield f"{attention}.v_proj", keys, hidden
        yield f"{attention}.o_proj", hidden, queries
        yield f"{feed}.gate_proj", inner, hidden
        yield f"{feed}.up_proj", inner, hidden
        yield f"{feed}.down_proj", hidden, inner


def make(shape: str, model: Path, folder: Path) -> None:
    """Writes a Hugging Face folder; needs torch with a GPU."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, folder)
    config = json.loads((model / "config.json").read_text()) | HEADS | SHAPES[shape]
    config |= {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    dtype, quantised = getattr(torch, config["dtype"]), "quantization_config" in config

    def normal(rows: int, columns: int, scale: float) -> Any:
        return (torch.randn(rows, columns, device="cuda") * scale).to(dtype).cpu()

    def integers(rows: int, columns: int) -> Any:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), device="cuda", dtype=torch.int64).to(torch.int32).cpu()

    hidden = config["hidden_size"]
    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, 1.0)}
    for name, rows, columns in products(config):
        if not quantised or name == "lm_head":
            weights[f"{name}.weight"] = normal(rows, columns, columns**-0.5)
            continue
        groups = columns // AWQ_GROUP
        scales = (torch.rand(groups, rows, device="cuda") * 0.2 + 0.9) / (6.5 * columns**0.5)
        weights[f"{name}.qweight"] = integers(columns, rows // 8)
        weights[f"{name}.qzeros"] = integers(groups, rows // 8)
        weights[f"{name}.scales"] = scales.half().cpu()
    weights["lm_head.weight"] *= 2
    norms = [f"layers.{n}.{kind}_layernorm" for n in range(config["num_hidden_layers"]) for kind in ("input", "post_attention")]
    for name in ("norm", *norms):
        weights[f"model.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    if config["model_type"] == "qwen3":
        for layer in range(config["num_hidden_layers"]):
            for norm in ("q_norm", "k_norm"):
                weights[f"model.layers.{layer}.self_attn.{norm}.weight"] = torch.ones(config["head_dim"], dtype=dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
