"""Every speed claim of the README, measured as a ratio within one run.

    python bench.py explain              # an explained caption against the passes through VGG16 that it cannot do without
    python bench.py all --json bench.json

Each row: name, seconds (median), ratio, and what it is a ratio to.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captiondata import Vocabulary, image_transform, load_image
from captioner import CaptionerConfig, build_captioner
from commandline import add_common_flags, choose_device, provenance, run, set_seed, write_json
from encoder import build_encoder

WORDS = 10  # words of the explained caption
VOCABULARY = 10_000


def seconds(functions, device, repeats):
    """{name: median seconds} of functions called in turn, so that a drifting machine slows all of them alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first call warms up


def random_captioner(device, **config):
    """A captioner with random weights and a vocabulary of the size of COCO's; speed does not depend on either."""
    words = [f"word{index}" for index in range(VOCABULARY - 4)]
    vocabulary = Vocabulary(["<pad>", *words, "<unk>", "<start>", "<end>"])
    config = CaptionerConfig(**config)
    return build_captioner(config, vocabulary, build_encoder(config.encoder, "random")).to(device).eval(), words


def write_photograph(folder):
    """A JPEG of a photograph's size; its content does not matter for time."""
    path = Path(folder) / "photograph.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(path)
    return path


def bench_explain(device, repeats):
    """LRP of a caption of 10 words, photograph to pixels, against two VGG16 forwards and one backward of 10 gradients."""
    captioner, words = random_captioner(device, encoder="vgg16")
    encoder, size = captioner.encoder, captioner.encoder.image_size
    pixels = torch.randn(1, 3, size, size, device=device)

    @torch.no_grad()
    def forward():
        return encoder(pixels)

    def forward_and_backward():
        leaf = pixels.clone().requires_grad_()
        features = encoder(leaf)
        seeds = torch.ones(WORDS, *features.shape, device=device)
        return torch.autograd.grad(features, leaf, seeds, is_grads_batched=True)

    with tempfile.TemporaryDirectory() as folder:
        photograph = write_photograph(folder)

        def explain():
            image = image_transform(size)(load_image(photograph))[None]
            return captioner.explain(image, [words[:WORDS]])

        measured = {"forward": forward, "backward": forward_and_backward, "explain": explain}
        times = seconds(measured, device, repeats)
    floor = times["forward"] + times["backward"]
    return [
        {"name": "VGG16 forward, one image", "seconds": times["forward"], "ratio": None, "against": None},
        {"name": f"two VGG16 forwards + one backward of {WORDS} gradients", "seconds": floor, "ratio": None, "against": None},
        {
            "name": f"LRP of a {WORDS}-word caption, photograph to pixels", "seconds": times["explain"],
            "ratio": times["explain"] / floor, "against": f"two VGG16 forwards + one backward of {WORDS} gradients",
        },
    ]  # fmt: skip


BENCHMARKS = {"explain": bench_explain}


def main():
    """Measure what was asked for and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*BENCHMARKS, "all"), help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="counted calls of everything (default: %(default)s)")
    parser.add_argument("--json", help="also write the rows to this file")
    add_common_flags(parser)
    args = parser.parse_args()
    set_seed(args.seed)
    device = choose_device(args.device)
    names = BENCHMARKS if args.what == "all" else [args.what]
    rows = [row for name in names for row in BENCHMARKS[name](device, args.repeats)]
    for row in rows:
        print(f"{row['name']:58s} {row['seconds']:9.3f} s" + (f"   {row['ratio']:.2f} x {row['against']}" if row["ratio"] else ""))
    if args.json:
        write_json(args.json, {**provenance(args.seed), "device": str(device), "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    run(main)
