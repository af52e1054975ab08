"""`python -m tests.gpu.shapes SHAPE MODEL FOLDER [LAYERS]`: a model of a known shape with random weights, MODEL's tokenizer.

Random weights are the worst case: near-ties everywhere, so that a last bit that differs shows in a token soon.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pair import ROOT

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
GROUP = 128
"""Inputs that share a scale; of fp8, outputs too."""
FP8_SPREAD = 64.0
"""Of the numbers that fp8 holds, which end at 448."""
FILES = 8
"""Written, and by the service digested, at once."""
SHAPES: dict[str, Config] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "llama-8b": LLAMA_8B,
    "llama-8b-awq": LLAMA_8B | {
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        },
    },
    "llama-8b-gptq": LLAMA_8B | {
        "dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    },
    "llama-8b-fp8": LLAMA_8B | {
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP],
        },
    },
    "qwen2-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
        "use_sliding_window": False,
    },
    "qwen3-1.7b": QWEN3,
    "qwen3-moe": QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


def feeds(config: Config, layer: str) -> Iterator[tuple[str, int]]:
    """Name and width of a layer's feed-forward parts."""
    experts = config.get("num_experts", 0)
    for number in range(experts):
        yield f"{layer}.mlp.experts.{number}", config["moe_intermediate_size"]
    if not experts:
        yield f"{layer}.mlp", config["intermediate_size"]


def products(config: Config) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every matrix."""
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "lm_head", config["vocab_size"], hidden
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj", queries, hidden
        yield f"{layer}.self_attn.k_proj", keys, hidden
        yield f"{layer}.self_attn.v_proj", keys, hidden
        yield f"{layer}.self_attn.o_proj", hidden, queries
        if "num_experts" in config:
            yield f"{layer}.mlp.gate", config["num_experts"], hidden
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
        if config["model_type"].startswith("qwen3"):
            yield f"{layer}.self_attn.q_norm", config["head_dim"]
            yield f"{layer}.self_attn.k_norm", config["head_dim"]


def make(shape: str, model: Path, folder: Path, layers: int = 0) -> None:
    """Writes a Hugging Face folder; needs torch, and is quick with a GPU."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text()) | BASE | SHAPES[shape]
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
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
        if method is None or name == "lm_head":
            yield "weight", normal(rows, columns, 1 / spread)
        elif method == "awq":
            yield "qweight", integers(columns, rows // 8)
            yield "qzeros", integers(groups, rows // 8)
            yield "scales", scales(groups, rows, 6.5 * spread).half()
        elif method == "gptq":  # its zeros are one less than they say, so that these are eight: symmetric
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
        if config["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
            found[f"{name}.bias"] = normal(1, rows, 0.1)[0].clone()
    found["lm_head.weight"] *= 2
    found |= {f"{name}.weight": torch.ones(size, dtype=dtype) for name, size in norms(config)}

    def save(number: int) -> None:
        part = {name: found[name] for name in list(found)[number::FILES]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})

    with ThreadPoolExecutor(FILES) as threads:
        list(threads.map(save, range(FILES)))


@dataclass
class Making:
    """A model that another process makes meanwhile."""

    shape: str
    folder: Path
    output: asyncio.Task[tuple[bytes, bytes]]
    process: asyncio.subprocess.Process

    async def ready(self) -> Path:
        """Its folder, once it is there. Raises AssertionError with what went wrong."""
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
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.gpu.shapes", shape, str(model), str(within / shape), str(layers), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    return Making(shape, within / shape, asyncio.create_task(process.communicate()), process)


if __name__ == "__main__":
    start = time.monotonic()
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else 0)
    print(f"{sys.argv[1]} made in {time.monotonic() - start:.1f} s")
