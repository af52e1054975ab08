"""`python -m tests.gpu.shapes SHAPE MODEL FOLDER [LAYERS]`: a model of a known shape with random weights, MODEL's tokenizer.

Random weights are the worst case: near-ties everywhere, so that a last bit that differs shows in a token soon.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.stack import python

Config = dict[str, Any]
BASE: Config = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16", "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_8B: Config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
QWEN3: Config = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 28, "head_dim": 128, "num_attention_heads": 16, "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
QWEN3_MOE: Config = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
FP8: Config = {
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
}  # fmt: skip
AWQ: Config = {
    "dtype": "float16",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}
GROUP = 128
"""Inputs that share a scale; of fp8, outputs too."""
FP8_SPREAD = 64.0
"""Of the numbers that fp8 holds, which end at 448."""
FILES = 8
"""Files of weights, which are written and digested in parallel."""
SHAPES: dict[str, Config] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "llama-8b": LLAMA_8B,
    "llama-8b-awq": LLAMA_8B | AWQ,
    "llama-8b-gptq": LLAMA_8B | {
        "dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    },
    "llama-8b-fp8": LLAMA_8B | FP8,
    "qwen2-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
        "use_sliding_window": False,
    },
    "qwen3-1.7b": QWEN3,
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-64x4": QWEN3_MOE | {"num_experts_per_tok": 4},
    "qwen3-moe-128x8": QWEN3_MOE | {"num_experts": 128},
    "qwen3-moe-128x4": QWEN3_MOE | {"num_experts": 128, "num_experts_per_tok": 4},
    "qwen3-moe-fp8": QWEN3_MOE | FP8,
    "qwen3-moe-awq": QWEN3_MOE | AWQ,
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
    },
    "glm4-moe-lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": 2048,
        "intermediate_size": 10240, "moe_intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 20,
        "num_key_value_heads": 20, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "attention_bias": False,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 6, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "experts_per_token": 4, "attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "rope_theta": 150000,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    },
}  # fmt: skip


def routed(config: Config, layer: str) -> int:
    """Experts of a layer that are in tensors of their own. Where some are named "routed", the first layer has none."""
    first = layer.endswith(".0")
    return int(config.get("num_experts", 0) or (0 if first else config.get("n_routed_experts", 0)))


def attention(config: Config, layer: str) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of the matrices of a layer's attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:  # latent attention
        latent, own, rotated = config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        yield f"{layer}.self_attn.q_a_proj", config["q_lora_rank"], hidden
        yield f"{layer}.self_attn.q_b_proj", heads * (own + rotated), config["q_lora_rank"]
        yield f"{layer}.self_attn.kv_a_proj_with_mqa", latent + rotated, hidden
        yield f"{layer}.self_attn.kv_b_proj", heads * (own + config["v_head_dim"]), latent
        yield f"{layer}.self_attn.o_proj", hidden, heads * config["v_head_dim"]
        return
    queries, keys = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    yield f"{layer}.self_attn.q_proj", queries, hidden
    yield f"{layer}.self_attn.k_proj", keys, hidden
    yield f"{layer}.self_attn.v_proj", keys, hidden
    yield f"{layer}.self_attn.o_proj", hidden, queries


def feeds(config: Config, layer: str) -> Iterator[tuple[str, int]]:
    """Name and width of a layer's feed-forward parts."""
    experts = routed(config, layer)
    for number in range(experts):
        yield f"{layer}.mlp.experts.{number}", config["moe_intermediate_size"]
    if experts and "n_shared_experts" in config:
        yield f"{layer}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"]
    if "shared_expert_intermediate_size" in config:
        yield f"{layer}.mlp.shared_expert", config["shared_expert_intermediate_size"]
    if not experts and "num_local_experts" not in config:
        yield f"{layer}.mlp", config["intermediate_size"]


def products(config: Config) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix."""
    hidden = config["hidden_size"]
    yield "lm_head", config["vocab_size"], hidden
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from attention(config, layer)
        if experts := routed(config, layer):
            yield f"{layer}.mlp.gate", experts, hidden
        if "num_local_experts" in config:
            yield f"{layer}.mlp.router", config["num_local_experts"], hidden
        if "shared_expert_intermediate_size" in config:
            yield f"{layer}.mlp.shared_expert_gate", 1, hidden
        for feed, inner in feeds(config, layer):
            yield f"{feed}.gate_proj", inner, hidden
            yield f"{feed}.up_proj", inner, hidden
            yield f"{feed}.down_proj", hidden, inner


def norms(config: Config) -> Iterator[tuple[str, int]]:
    """Name and size of every normalisation."""
    yield "model.norm", config["hidden_size"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm", config["hidden_size"]
        yield f"{layer}.post_attention_layernorm", config["hidden_size"]
        if "kv_lora_rank" in config:
            yield f"{layer}.self_attn.q_a_layernorm", config["q_lora_rank"]
            yield f"{layer}.self_attn.kv_a_layernorm", config["kv_lora_rank"]
        if config["model_type"].startswith("qwen3"):
            yield f"{layer}.self_attn.q_norm", config["head_dim"]
            yield f"{layer}.self_attn.k_norm", config["head_dim"]


def packed_experts(config: Config) -> Config:
    """gpt-oss's: of each layer all experts in one tensor, gate and up interleaved, in mxfp4: blocks of 32 numbers of 4 bits,
    two to a byte, and for each a power of two."""
    import torch

    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: Config = {}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        found[f"{layer}.self_attn.sinks"] = torch.zeros(config["num_attention_heads"], dtype=torch.bfloat16)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), device=device, dtype=torch.uint8)
            # The numbers' spread is about 2.9: with 2**-7 that of a product's outputs is about 1.
            found[f"{layer}.mlp.experts.{name}_blocks"] = blocks.cpu()
            found[f"{layer}.mlp.experts.{name}_scales"] = torch.full(shape, 127 - 7, dtype=torch.uint8)
            found[f"{layer}.mlp.experts.{name}_bias"] = (
                (torch.randn(experts, rows, device=device) * 0.1).to(torch.bfloat16).cpu()
            )
    return found


def make(shape: str, model: Path, folder: Path, layers: int = 0) -> None:
    """Writes a Hugging Face folder; needs torch, and is quick with a GPU."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text()) | BASE | SHAPES[shape]
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config["dtype"])
    method = config.get("quantization_config", {}).get("quant_method")

    def normal(rows: int, columns: int, scale: float) -> Any:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype).cpu()

    def integers(rows: int, columns: int) -> Any:
        """Eight numbers of four bits each."""
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), device=device, dtype=torch.int64).to(torch.int32).cpu()

    def scales(rows: int, columns: int, spread: float) -> Any:
        return ((torch.rand(rows, columns, device=device) * 0.2 + 0.9) / spread).cpu()

    def weights(name: str, rows: int, columns: int) -> Iterator[tuple[str, Any]]:
        groups, spread = columns // GROUP, columns**0.5
        if method in (None, "mxfp4") or name == "lm_head" or name.endswith(".mlp.gate"):
            yield "weight", normal(rows, columns, 1 / spread)
        elif method == "awq":
            yield "qweight", integers(columns, rows // 8)
            yield "qzeros", integers(groups, rows // 8)
            yield "scales", scales(groups, rows, 6.5 * spread).half()
        elif method == "gptq":  # zeros are stored minus one: these are eight, symmetric
            yield "qweight", integers(columns // 8, rows)
            yield "qzeros", torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
            yield "scales", scales(groups, rows, 4.6 * spread).half()
        else:
            numbers = (torch.randn(rows, columns, device=device) * FP8_SPREAD).clamp(-448, 448)
            yield "weight", numbers.to(torch.float8_e4m3fn).cpu()
            yield "weight_scale_inv", scales(-(-rows // GROUP), -(-columns // GROUP), FP8_SPREAD * spread)

    found = {"model.embed_tokens.weight": normal(config["vocab_size"], config["hidden_size"], 1.0)}
    for name, rows, columns in products(config):
        found |= {f"{name}.{part}": tensor for part, tensor in weights(name, rows, columns)}
        if config["model_type"] in ("qwen2", "qwen2_moe") and name.endswith(("q_proj", "k_proj", "v_proj")):
            found[f"{name}.bias"] = normal(1, rows, 0.1)[0].clone()
        if "kv_lora_rank" in config and name.endswith(".mlp.gate"):
            found[f"{name}.e_score_correction_bias"] = torch.randn(rows).mul_(0.01)
        if config["model_type"] == "gpt_oss" and name != "lm_head":
            found[f"{name}.bias"] = normal(1, rows, 0.1)[0].clone()
    if config["model_type"] == "gpt_oss":
        found |= packed_experts(config)
    found["lm_head.weight"] *= 2
    found |= {f"{name}.weight": torch.ones(size, dtype=dtype) for name, size in norms(config)}

    def save(number: int) -> None:
        part = {name: found[name] for name in list(found)[number::FILES]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})

    with ThreadPoolExecutor(FILES) as threads:
        list(threads.map(save, range(FILES)))


@dataclass
class Making:
    """A model that another process makes."""

    shape: str
    folder: Path
    output: asyncio.Task[tuple[bytes, bytes]]
    process: asyncio.subprocess.Process

    async def ready(self) -> Path:
        """Its folder, when it is complete. Raises AssertionError with the process's output."""
        told, _ = await asyncio.shield(self.output)
        if self.process.returncode:
            raise AssertionError(f"{self.shape} cannot be made: {told.decode(errors='replace')[-800:]}")
        return self.folder

    async def remove(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.output
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


async def begin(shape: str, model: Path, within: Path, layers: int = 0) -> Making:
    process = await python("-m", "tests.gpu.shapes", shape, str(model), str(within / shape), str(layers))
    return Making(shape, within / shape, asyncio.create_task(process.communicate()), process)


if __name__ == "__main__":
    start = time.monotonic()
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else 0)
    print(f"{sys.argv[1]} made in {time.monotonic() - start:.1f} s")
