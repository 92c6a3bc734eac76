#!/usr/bin/env python3
"""Times torchvision's loader beside `isqrt bench loader`: the same images, crops and workers.

The PyTorch side is ImageFolder and DataLoader with Pillow: RandomResizedCrop(224), horizontal flip,
ToTensor, Normalize, shuffled, batches collated in the workers, which live on from round to round.

    python3 tools/peers/loader.py --isqrt target/release/isqrt --data IMAGES --workers 2

Needs PyTorch and torchvision. IMAGES is an ImageFolder tree with train/; its images are gone through
again and again until `--images` are read. Each side runs in turn, `--rounds` times after a warm-up;
medians, and their ratio (above 1: ours is faster).
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import PIL
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torch_loader(args):
    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    folder = torchvision.datasets.ImageFolder(os.path.join(args.data, "train"), change)
    again = Subset(folder, [i % len(folder) for i in range(args.images)])
    return DataLoader(
        again,
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )


def torch_rate(loader):
    count, start = 0, time.perf_counter()
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - start)


def our_row(args):
    command = [args.isqrt, "bench", "loader", "--json", "--data", args.ours or args.data]
    command += ["--threads", str(max(args.workers, 1))]
    command += ["--workers", str(args.workers), "--batch", str(args.batch)]
    command += ["--images", str(args.images), "--size", str(args.size), "--rounds", "1"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(lines.splitlines()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isqrt", default="target/release/isqrt", help="the binary")
    parser.add_argument("--data", required=True, help="ImageFolder tree with train/")
    parser.add_argument("--ours", help="another form of the same images, for our side (an archive)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2000, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.workers or 1)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__},"
        f" {args.workers} workers, batch {args.batch}, crops of {args.size}, {args.images} images a round"
    )
    loader = torch_loader(args)
    torch_rate(loader)
    rows, theirs = [], []
    for _ in range(args.rounds):
        rows.append(our_row(args))
        theirs.append(torch_rate(loader))
        print(f"  ours {rows[-1]['images_per_s']:8.1f}   torch {theirs[-1]:8.1f}   images/s", flush=True)
    ours = statistics.median(row["images_per_s"] for row in rows)
    print(
        f"medians: ours {ours:.1f}, torch {statistics.median(theirs):.1f} images/s, "
        f"ratio {ours / statistics.median(theirs):.2f}"
    )


if __name__ == "__main__":
    main()
