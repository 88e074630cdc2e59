"""The one checkpoint that all systems load: the embedded model, dense in float32, as safetensors.

    embedded model (quantised) --worker.models.load, dense--> model.safetensors, config.json, tokenizer

vLLM's CPU backend takes no MLX-quantised weights, and on the CPU our worker computes with these very values. The end
token is moved to one that the model was never trained to say, because mlx-lm has no `ignore_eos`: every stream then
runs its full length on every system.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

_FORMAT = 1
"""Raise it when what is written here changes."""


def dense_copy(root: Path) -> Path:
    """Folder of the checkpoint below `root`; the first call writes it, in a process of its own."""
    target = root / f"smollm2-float32-v{_FORMAT}"
    if not target.is_dir():
        subprocess.run([sys.executable, __file__, str(target)], check=True)
    return target


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights in `directory`."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def write(target: Path) -> None:
    """Write the checkpoint; whoever looks at `target` sees all of it or nothing."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from pomarium.worker.models import embedded
    from pomarium.worker.models.load import load

    source = embedded.path()
    loaded = load(source, dense=True, dtype=mx.float32)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        parameters = dict(tree_flatten(loaded.model.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), parameters, {"format": "mlx"})
        config = {key: value for key, value in loaded.config.items() if not key.startswith("quantization")}
        silent = _silent_token(source)
        config |= {"dtype": "float32", "torch_dtype": "float32", "eos_token_id": silent}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / file, folder / file)
        os.replace(folder, target)


def _silent_token(directory: Path) -> int:
    """The last of the special tokens that the tokenizer reserves and a chat model never says."""
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return max(int(token["id"]) for token in added if token["special"])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(f"wrote {measure.mebibytes(weight_bytes(Path(sys.argv[1])))} MiB", file=sys.stderr)
