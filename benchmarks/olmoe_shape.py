"""A checkpoint of the shape of OLMoE-1B-7B with random weights: ``python benchmarks/olmoe_shape.py FOLDER``.

13.8 GB in bfloat16 with all 16 layers; one weight file a layer, experts fused, so that it can be mapped as it lies. It
is written a tensor at a time, and the same every time. Weights are normal with a deviation of 0.02, that of the head of
0.03: behind a norm, router logits then have a deviation of 0.9, so that tokens spread over the experts. The tokenizer
is trained on the relations of this repository and uses the first tokens of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from moescope import pretraining, relations

ROOT = Path(__file__).resolve().parents[1]
#: Where OLMoE-1B-7B-0924 differs from the defaults of its configuration.
SHAPE = {"intermediate_size": 1024, "dtype": "bfloat16", "architectures": ["OlmoeForCausalLM"]}
#: Standard deviations of weights: of matrices, of the head, of norms (around 1).
DEVIATION, OF_HEAD, OF_NORMS = 0.02, 0.03, 0.1
#: Tokens of the tokenizer.
TOKENS = 8_000


def write(folder: Path, layers: int = 16, seed: int = 0, **shape: int) -> None:
    """Write configuration, weights, index and tokenizer; ``shape`` overrides fields of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = OlmoeConfig(**{**SHAPE, "num_hidden_layers": layers, **shape})
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts.setdefault(_part(name), []).append(name)
    index = {}
    for i, names in enumerate(parts.values(), 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        weights = {name: random(name, model.get_parameter(name).shape, seed) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    texts = [fact["text"] for fact in relations.prompts(relations.load(relations.files_of("embedded", ROOT)))]
    pretraining.train_tokenizer(texts, min(TOKENS, config.vocab_size)).save_pretrained(folder)


def random(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The tensor of a name, in bfloat16."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return tensor.normal_(1, OF_NORMS, generator=generator)
    return tensor.normal_(0, OF_HEAD if name.startswith("lm_head") else DEVIATION, generator=generator)


def _part(name: str) -> str:
    """What a tensor shares a file with: its layer, or all that is in none."""
    return name.split(".")[2] if name.startswith("model.layers.") else ""


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.layers, options.seed)


if __name__ == "__main__":
    main()
