"""The README of an exported synthetic set: what it is, whether it is normalised, and a few lines that load it."""

from __future__ import annotations

from typing import Any, Literal

SyntheticSet = Any  # synthetic_set.SyntheticSet; that module imports `export.py`, which imports this one
Format = Literal["imagefolder", "videofolder", "parquet folder", "parquet file", "pt"]

FRONT_MATTER = """\
---
license: other
license_name: as-the-source-data
{}---

"""  # read by `datasets` and the Hugging Face Hub
DATA_FILES = """\
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*.parquet
"""
CLASS_FOLDERS = "Folders sort in the order of the labels: label i is the i-th folder and line i of `classes.txt`."


def readme(synthetic: SyntheticSet, kind: Format, name: str) -> str:
    """Markdown for the export of this kind to a folder or file called `name`."""
    card, of_tensors, classes = synthetic.card, synthetic.kind == "tensors", len(synthetic.class_names)
    how = [f"`{card.get('method', 'unknown')}`"]
    units = {"images_per_class": "per class", "steps": "steps"}
    how += [f"{card[key]} {unit}" for key, unit in units.items() if key in card]
    shape = list(synthetic.images.shape[1:])
    lines = [
        f"{len(synthetic)} {synthetic.kind} of shape {shape} in {classes} classes.",
        f"Made by distill_at_scale with the method {', '.join(how)}. The card has all settings.",
    ]
    if fingerprint := (card.get("fingerprints") or {}).get("distill"):
        run = f"`{synthetic.folder.parent.name}`, " if synthetic.folder is not None else ""
        lines.append(f"From the run {run}fingerprint of its distillation {fingerprint[:16]}.")
    if kind in ("imagefolder", "videofolder"):
        lines.append(CLASS_FOLDERS)
    facts = card["normalization"]
    formula = f"({'x' if of_tensors else 'x / 255'} - mean) / std with mean {facts['mean']}, std {facts['std']}"
    if kind == "pt":
        lines.append(f"**Normalised already**: {formula}. Do not normalise again.")
    else:
        stored = "Values are on the scale of the real data" if of_tensors else "Pixels are stored as 0..255"
        lines.append(f"{stored}. Networks expect {formula}. The lines below do this.")
    if card.get("whitening"):
        where = {
            "pt": "done already, with whitening_mean and whitening_matrix",
            "parquet file": "this file lacks both tensors, an export to a folder has them",
        }.get(kind, "the lines below leave it out, whitening.safetensors has both tensors")
        lines.append(f"After that comes ZCA whitening, (flat values - mean) @ matrix: {where}.")
    if (factor := card.get("formation", 1)) > 1:
        parts = "cut it and enlarge the parts, as `as_dataset()` of distill_at_scale does"
        lines.append(f"Each image holds {factor} x {factor} training images: {parts}.")
    labels = card.get("protocol", {}).get("labels", "hard")
    if labels == "views" or (labels == "soft" and kind != "pt"):
        lines.append("The set has soft labels, which are not here; `train_loader()` of distill_at_scale has them.")
    lines.append("License: that of the source data. Check it before you share this set.")
    facts_of_set = "\n".join(f"- {line}" for line in lines)
    text = f"# Synthetic set of {classes} classes\n\n{facts_of_set}\n\n```python\n{loading(synthetic, kind, name)}```\n"
    return FRONT_MATTER.format(DATA_FILES if kind == "parquet folder" else "") + text


def loading(synthetic: SyntheticSet, kind: Format, name: str) -> str:
    """Lines of Python that load the export, run from the folder that holds it."""
    normalization, shape = synthetic.card["normalization"], list(synthetic.images.shape[1:])
    mean, std, clips = normalization["mean"], normalization["std"], len(shape) == 4
    apply = f"- torch.tensor({mean}).view(-1, 1, 1)) / torch.tensor({std}).view(-1, 1, 1)"
    steps = f"v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize({mean}, {std})"
    if kind == "pt":
        return (
            "import torch\n"
            f's = torch.load("{name}", weights_only=True)\n'
            's["images"], s["labels"], s["card"]  # normalised float32, int64, the settings\n'
        )
    if kind.startswith("parquet"):
        data = f'load_dataset("{name}"' if kind == "parquet folder" else f'load_dataset("parquet", data_files="{name}"'
        if synthetic.kind == "tensors":
            axes = (-1, *(1,) * normalization.get("inner", 0))
            apply = f"- torch.tensor({mean}).view{axes}) / torch.tensor({std}).view{axes}".replace(",)", ")")
            return (
                "import torch\nfrom datasets import load_dataset\n"
                f'data = {data}, split="train").with_format("torch")\n'
                f'x, label = (data[0]["values"] {apply}, data[0]["label"]\n'
            )
        one = 'torch.stack([steps(frame) for frame in row["frames"]])' if clips else 'steps(row["image"])'
        return (
            "import torch\nfrom datasets import load_dataset\nfrom torchvision.transforms import v2\n"
            f"steps = v2.Compose([{steps}])\n"
            f'data = {data}, split="train")\n'
            f'samples = [({one}, row["label"]) for row in data]\n'
        )
    if kind == "videofolder":
        return (
            "import av, numpy as np, torch\nfrom pathlib import Path\n"
            f'path = sorted(Path("{name}").glob("*/*.mp4"))[0]  # its folder is the class\n'
            "frames = av.open(str(path)).decode(video=0)\n"
            f'pixels = np.stack([f.to_ndarray(format="rgb24")[::2, ::2, :{shape[1]}] for f in frames])  # stored as 2 x 2\n'
            f"clip = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 {apply}\n"
        )
    if clips:
        return (
            "import numpy as np, torch\nfrom pathlib import Path\nfrom PIL import Image\n"
            f'folders = [path for path in sorted(Path("{name}").glob("*/*")) if path.is_dir()]  # a clip each, in its class\n'
            "pixels = np.stack([[np.array(Image.open(f)) for f in sorted(folder.iterdir())] for folder in folders])\n"
            f"clips = (torch.from_numpy(pixels).view(*pixels.shape[:4], -1).movedim(-1, 2) / 255 {apply}\n"
        )
    grey = "v2.Grayscale(), " if shape[0] == 1 else ""
    return (
        "import torch\nfrom torchvision.datasets import ImageFolder\nfrom torchvision.transforms import v2\n"
        f"steps = [{grey}{steps}]\n"
        f'data = ImageFolder("{name}", v2.Compose(steps))  # data[i] is (float32 {shape}, label)\n'
    )
