#!/usr/bin/env python3
"""Makes crates/datasets/tests/golden/transforms.safetensors: transforms by torchvision on Pillow images.

The images are made by formula. Each case keeps its steps as the JSON of our pipelines, so that the Rust side
only has to run them. Needs torch, torchvision, Pillow, numpy and safetensors:

    python3 tools/golden/transforms.py
"""

import json
import pathlib

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/datasets/tests/golden/transforms.safetensors"
FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def picture(width, height):
    """Waves in every channel, a few hard edges, saturated and gray places."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 127 + 127 * np.sin(x / 5 + y / 17)
    green = 127 + 127 * np.sin(y / 4 - x / 23)
    blue = np.where((x // 9 + y // 6) % 2 == 0, 30, 220)
    image = np.stack([red, green, blue], 2)
    image[: height // 5, : width // 4] = 128
    image[-height // 6 :, -width // 5 :] = [255, 0, 0]
    return np.round(image).clip(0, 255).astype(np.uint8)


def main():
    tensors, steps = {}, {}
    small, wide = picture(41, 31), picture(67, 20)
    tensors["image.small"], tensors["image.wide"] = small, wide
    images = {"small": Image.fromarray(small), "wide": Image.fromarray(wide)}

    def case(name, image, pipeline, views, box=None):
        views = views if isinstance(views, (list, tuple)) else [views]
        tensors["case." + name] = np.stack([np.asarray(view) for view in views])
        steps[name] = json.dumps({"image": image, "steps": pipeline, "box": box})

    for key, image in images.items():
        for filter_name, mode in FILTERS.items():
            for short in [9, 25, 38]:
                case(
                    f"{key}.{filter_name}.short{short}",
                    key,
                    [{"step": "resize", "short": short, "filter": filter_name}],
                    F.resize(image, short, mode),
                )
            case(
                f"{key}.{filter_name}.both",
                key,
                [{"step": "resize_to", "width": 30, "height": 27, "filter": filter_name}],
                F.resize(image, [27, 30], mode),
            )
            left, top, width, height = 7, 3, 19, 14
            case(
                f"{key}.{filter_name}.part",
                key,
                [
                    {"step": "box_crop"},
                    {"step": "resize_to", "width": 23, "height": 23, "filter": filter_name},
                ],
                F.resized_crop(image, top, left, height, width, [23, 23], mode),
                [left, top, width, height],
            )
        for size in [12, 25, 36, 72]:
            case(f"{key}.center{size}", key, [{"step": "center_crop", "size": size}], F.center_crop(image, size))
        for size in [13, 20]:
            case(f"{key}.five{size}", key, [{"step": "five_crop", "size": size}], F.five_crop(image, size))
            case(f"{key}.ten{size}", key, [{"step": "ten_crop", "size": size}], F.ten_crop(image, size))
        case(f"{key}.mirror", key, [{"step": "mirror"}], [image, F.hflip(image)])
        case(f"{key}.flip", key, [{"step": "horizontal_flip", "p": 1.0}], F.hflip(image))
        case(
            f"{key}.trim",
            key,
            [{"step": "trim_bottom", "rows": 7}],
            image.crop((0, 0, image.width, image.height - 7)),
        )
        case(
            f"{key}.eval",
            key,
            [{"step": "resize", "short": 32}, {"step": "center_crop", "size": 28}],
            F.center_crop(F.resize(image, 32), 28),
        )

    image = images["small"]
    operations = {
        "brightness": (F.adjust_brightness, [0.0, 0.37, 1.0, 1.6]),
        "contrast": (F.adjust_contrast, [0.0, 0.37, 1.0, 1.6]),
        "saturation": (F.adjust_saturation, [0.0, 0.37, 1.0, 1.6]),
        "hue": (F.adjust_hue, [-0.5, -0.13, 0.0, 0.07, 0.5]),
    }
    for name, (operation, factors) in operations.items():
        for factor in factors:
            tensors[f"colour.{name}.{factor}"] = np.asarray(operation(image, factor))

    # fb.resnet.torch's transforms.lua, Lighting, on pixels in 0..1.
    values = torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
        dtype=torch.float64,
    )
    for i, alphas in enumerate([[0.1, -0.2, 0.05], [-0.3, 0.1, 0.2]]):
        alpha = torch.tensor(alphas, dtype=torch.float64)
        shift = (vectors * alpha * values).sum(1)
        lit = (torch.from_numpy(small.astype(np.float64)) / 255 + shift).clamp(0, 1)
        tensors[f"lighting.{i}"] = (lit * 255).round().to(torch.uint8).numpy()

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, TARGET, metadata=steps)
    print(TARGET, TARGET.stat().st_size, "bytes", len(tensors), "tensors")


if __name__ == "__main__":
    main()
