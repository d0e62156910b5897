"""Every speed claim of RESULTS.md, measured as a ratio within one run.

    python bench.py explain              # an explained caption against the passes through VGG16 that it cannot do without
    python bench.py methods              # every method and captioner against one plain forward and backward
    python bench.py train                # training steps, what fine-tuning adds, and SCST's reward
    python bench.py train --preset coco  # training at COCO's size from cached features: images/s, memory, waiting for data
    python bench.py decode               # captioning in batches against one image at a time
    python bench.py evaluate             # the paper's experiments, an image
    python bench.py all --json bench.json

Each row: name, seconds (median), ratio, and what it is a ratio to.
"""

import functools
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captiondata import CaptionDataset, files_hash
from captioner import METHODS, MODELS, CaptionerConfig, build_captioner, load_captioner
from commandline import (
    CommandLine,
    UserError,
    add_common_flags,
    choose_device,
    provenance,
    run,
    set_seed,
    write_json,
)
from encoder import build_encoder
from experiments import EXPERIMENTS
from experiments.case import Setting, examine
from experiments.records import EXAMINED_AT_ONCE
from featurecache import features_path, lay_out, write_rows
from images import image_transform, load_image
from objectives import CrossEntropy, ImageLRPInference, LRPInference
from preparedataset import prepare
from pycocoevalcap.chair.chair import object_phrases
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.ciderd.ciderd import CiderD
from readers.coco import COCO_TRAIN
from scenes import write_scenes
from train import parse_arguments
from trainer import TrainingStep, build_optimizer, clip_gradients
from vocabulary import Vocabulary, padded

WORDS = 10  # words of the explained caption
VOCABULARY = 10_000
SCENES = 500
REGIONS = (196, 512)  # of VGG16
PAPER_BATCH = 32  # images a step


def seconds(functions, device, repeats):
    """{name: median seconds} of functions called in turn, so that a drifting machine slows all of them alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {
        name: statistics.median(values[1:]) for name, values in times.items()
    }  # the first call warms up


def synchronize(device):
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_vocabulary():
    """A vocabulary of the size of COCO's."""
    return Vocabulary(
        ["<pad>", *(f"word{index}" for index in range(VOCABULARY - 4)), "<unk>", "<start>", "<end>"]
    )


def random_captioner(device, **config):
    """A captioner with random weights and its words; speed does not depend on either."""
    vocabulary = bench_vocabulary()
    config = CaptionerConfig(**config)
    return build_captioner(config, vocabulary, build_encoder(config.encoder, "random")).to(
        device
    ).eval(), vocabulary.words[1:-3]


def write_photograph(folder):
    """A JPEG of a photograph's size; its content does not matter for time."""
    path = Path(folder) / "photograph.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(
        path
    )
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
        {
            "name": "VGG16 forward, one image",
            "seconds": times["forward"],
            "ratio": None,
            "against": None,
        },
        {
            "name": f"two VGG16 forwards + one backward of {WORDS} gradients",
            "seconds": floor,
            "ratio": None,
            "against": None,
        },
        row(
            f"LRP of a {WORDS}-word caption, photograph to pixels", times["explain"], floor, "these"
        ),
    ]


def bench_methods(device, repeats):
    """Every method on a caption of 10 words against the forward passes and one backward of 10 gradients of the same model."""
    rows = []
    for model_type in MODELS:
        captioner, words = random_captioner(device, encoder="vgg16", model_type=model_type)
        image = torch.randn(1, 3, captioner.encoder.image_size, captioner.encoder.image_size)
        ids = [captioner.vocabulary.encode(words[:WORDS])]
        floor = functools.partial(
            forward_and_backward, captioner, image.to(device), torch.tensor(ids, device=device)
        )
        methods = {
            name: functools.partial(captioner.explain, image, [words[:WORDS]], name)
            for name in METHODS
        }
        times = seconds({"floor": floor, **methods}, device, repeats)
        against = f"{model_type}: forward + one backward of {WORDS} gradients"
        rows.append({"name": against, "seconds": times["floor"], "ratio": None, "against": None})
        rows += [
            row(f"{model_type}: {name}", times[name], times["floor"], against) for name in METHODS
        ]
    return rows


def forward_and_backward(captioner, images, targets):
    """A teacher-forced forward and one plain batched backward from every word's logit to pixels and embeddings."""
    images = images.clone().requires_grad_()
    embeddings = captioner.embedding(targets).detach().requires_grad_()
    memory = captioner.image_memory(captioner.encoder(images))
    unrolled = captioner.unroll(embeddings.unsqueeze(1), memory)
    logits = captioner.last_layer(unrolled.addends)[:, 0]
    scores = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    seeds = torch.eye(targets.shape[1], device=images.device).unsqueeze(1)
    return torch.autograd.grad(scores, (images, embeddings), seeds, is_grads_batched=True)


def bench_train(device, repeats):
    """Training steps: the multi-head captioner all words at once against word by word, and what fine-tuning adds."""
    return (
        bench_steps(device, repeats)
        + bench_inference(device, repeats)
        + bench_image_inference(device)
        + bench_reward(device, repeats)
    )


def bench_coco(device, repeats):
    """Training at COCO's size, by VGG16's cached features and 32 images x 5 captions a step, of every captioner: from the file by
    DataLoader's workers, against the same batches at hand, which shows how long the device waits for data. Features and captions
    are random, with the shapes of the real ones (captions of 8 to 20 words, 12 in the mean)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_dataset(Path(folder), (repeats + 1) * PAPER_BATCH)
        for model_type in MODELS:
            rows += coco_rows(folder, model_type, device)
    return rows


def coco_rows(folder, model_type, device):
    """The rows of one captioner: one pass over the dataset in `folder`, then once more with its batches at hand."""
    flags = ["--preset", "paper", "--model_type", model_type]
    if device.type == "cuda":
        flags.append("--bfloat16")
    config = parse_arguments(flags).training
    captioner, _ = random_captioner(device, encoder="vgg16", model_type=model_type)
    captioner.encoder.requires_grad_(False)
    optimizer = build_optimizer(captioner.train(), config)
    step = TrainingStep(captioner, CrossEntropy(captioner), True, config.bfloat16)
    dataset = CaptionDataset(folder, "train", features="vgg16")
    loader = DataLoader(
        dataset, config.batch_size, num_workers=config.workers, pin_memory=device.type == "cuda"
    )
    kept = [(inputs.to(device), captions, indices) for inputs, captions, indices in loader]

    def epoch(batches):
        """Seconds a step, without the first, which warms up."""
        for count, (inputs, *rest) in enumerate(batches):
            loss, _ = step(inputs.to(device, non_blocking=True), *rest)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(optimizer, config.grad_clip, config.grad_norm)
            optimizer.step()
            if count == 0:
                synchronize(device)
                started = time.perf_counter()
        synchronize(device)
        return (time.perf_counter() - started) / count

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    at_hand, from_file = epoch(kept), epoch(loader)
    against = f"{model_type}: a step of COCO's size, 32 images x 5 captions, batches at hand"
    numbers = {
        "images/s": config.batch_size / from_file,
        "captions/s": 5 * config.batch_size / from_file,
        "hours for an epoch of 110,000 images": COCO_TRAIN / config.batch_size * from_file / 3600,
        "share of time waiting for data": max(0.0, 1 - at_hand / from_file),
    }
    if device.type == "cuda":
        numbers["GPU memory, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return [
        {"name": against, "seconds": at_hand, "ratio": None, "against": None},
        {
            **row(f"{model_type}: the same from the feature file", from_file, at_hand, against),
            "numbers": numbers,
        },
    ]


def write_random_dataset(folder, images):
    """A prepared dataset of random captions and random features of VGG16's shape, the bench's vocabulary, and no image."""
    chooser, noise = random.Random(0), np.random.default_rng(0)
    captions = [
        [
            [
                chooser.randrange(1, VOCABULARY - 3)
                for _ in range(min(20, 8 + int(chooser.expovariate(1 / 4))))
            ]
            for _ in range(5)
        ]
        for _ in range(images)
    ]
    entries = [
        {
            "image_id": k,
            "file": f"{k}",
            "captions": ["random"] * 5,
            "encoded": encoded,
            "objects": [],
        }
        for k, encoded in enumerate(captions)
    ]
    bench_vocabulary().save(folder / "vocabulary.json")
    write_json(folder / "train.json", entries)
    write_json(
        folder / "info.json",
        {
            "name": "random",
            "images_root": ".",
            "max_length": 20,
            "splits": {"train": images},
            "categories": {},
            "planted_pairs": [],
        },
    )
    path = features_path(folder, "vgg16")
    lay_out(path, {"encoder": "vgg16"}, {"train": (images, files_hash(entries))}, REGIONS)
    for start in range(0, images, 32):
        indices = list(range(start, min(start + 32, images)))
        write_rows(
            path,
            "train",
            indices,
            noise.random((len(indices), *REGIONS), np.float32).astype(np.float16),
        )


def bench_steps(device, repeats):
    """A teacher-forced step of the multi-head captioner, all words at once, against the same model word by word."""
    captioner, _ = random_captioner(device, encoder="vgg16", model_type="aoa")
    features, inputs = training_data(device)

    def all_at_once():
        return captioner.zero_grad() or captioner(features, inputs).logsumexp(-1).mean().backward()

    def word_by_word(look_once):
        captioner.zero_grad()
        stepped_logits(captioner, features, inputs, look_once).logsumexp(-1).mean().backward()

    with torch.no_grad():
        difference = (
            (captioner(features, inputs) - stepped_logits(captioner, features, inputs))
            .abs()
            .max()
            .item()
        )
    captioner.train()  # in eval mode gradients go step by step
    measured = {
        "once": all_at_once,
        "original": functools.partial(word_by_word, False),
        "steps": functools.partial(word_by_word, True),
    }
    times = seconds(measured, device, repeats)
    against = "the same model stepped word by word as the original does"
    return [
        {
            "name": f"aoa, B=32, T=20: {against}",
            "seconds": times["original"],
            "ratio": None,
            "against": None,
        },
        row(
            "aoa: the same with the image projected once",
            times["steps"],
            times["original"],
            against,
        ),
        row(
            f"aoa: all words at once (logits differ by {difference:.0e})",
            times["once"],
            times["original"],
            against,
        ),
    ]


def training_data(device, batch=32):
    """Features of VGG16's shape and captions of 20 words."""
    return torch.rand(batch, *REGIONS, device=device), torch.randint(
        1, VOCABULARY - 3, (batch, 1, 20), device=device
    )


def training_step(captioner, objective, inputs, features, captions, images=None):
    """A function that makes one step of an objective on these captions, without the optimizer."""

    def step():
        captioner.zero_grad()
        loss, _ = objective.loss(features, inputs, captions, images)
        loss.backward()

    return step


def bench_inference(device, repeats):
    """A step of LRP-inference with cross-entropy against one of cross-entropy. Stop words cost nothing, and half of the words of
    COCO's captions are such (or `<end>`), so every second word of the vocabulary stands for one; the dearest case has none."""
    rows = []
    for model_type in MODELS:
        captioner, _ = random_captioner(device, encoder="vgg16", model_type=model_type)
        features, inputs = training_data(device)
        plain, half, none = (
            CrossEntropy(captioner.train()),
            LRPInference(captioner),
            LRPInference(captioner),
        )
        half.quiet = torch.arange(VOCABULARY, device=device) % 2 == 0
        objectives = {"plain": plain, "half": half, "none": none}
        steps = {
            name: training_step(captioner, objective, inputs, features, inputs.roll(-1))
            for name, objective in objectives.items()
        }
        times = seconds(steps, device, repeats)
        against = f"{model_type}: a step of cross-entropy, B=32, T=20, V=10,000"
        rows.append({"name": against, "seconds": times["plain"], "ratio": None, "against": None})
        rows.append(
            row(f"{model_type}: a step of LRP-inference", times["half"], times["plain"], against)
        )
        rows.append(
            row(
                f"{model_type}: the same if no predicted word were a stop word",
                times["none"],
                times["plain"],
                against,
            )
        )
    return rows


def bench_image_inference(device):
    """A step of the earlier, image form of LRP-inference, for one image: every word goes back to the pixels."""
    captioner, _ = random_captioner(device, encoder="vgg16")
    images = torch.randn(
        1, 3, captioner.encoder.image_size, captioner.encoder.image_size, device=device
    )
    _, inputs = training_data(device, batch=1)
    features = captioner.encode(images)
    data = inputs, features, inputs.roll(-1), images
    captioner.train()
    steps = {
        kind.__name__: training_step(captioner, kind(captioner), *data)
        for kind in (CrossEntropy, ImageLRPInference)
    }
    times = seconds(steps, device, 1)
    against = "gridtd: a step of cross-entropy, B=1, T=20, V=10,000, features given"
    return [
        {"name": against, "seconds": times["CrossEntropy"], "ratio": None, "against": None},
        row(
            "gridtd: a step of LRP-inference by image heat maps through VGG16",
            times["ImageLRPInference"],
            times["CrossEntropy"],
            against,
        ),
    ]


def bench_reward(device, repeats):
    """CIDEr-D of 128 images x 6 captions of 12 words, 5 references each, against pycocoevalcap's scorer."""
    chooser = random.Random(0)

    def caption():
        return [
            min(VOCABULARY - 4, 1 + int(chooser.expovariate(1 / 300))) for _ in range(12)
        ]  # few words are frequent

    references = [[caption() for _ in range(5)] for _ in range(128)]
    # half of the words from a reference, or nothing would match
    captions = [
        [[*chooser.choice(image)[:6], *caption()[:6]] for _ in range(6)] for image in references
    ]
    scorer = CiderD(references, device=device)
    rows = padded([words for image in references for words in image]).unflatten(0, (128, 5))
    hypotheses = padded([words for image in captions for words in image]).unflatten(0, (128, 6))

    def text(words):
        return " ".join(map(str, words))

    gts = {(i, k): list(map(text, references[i])) for k in range(6) for i in range(128)}
    res = {(i, k): [text(captions[i][k])] for k in range(6) for i in range(128)}
    calls = {
        "ours": lambda: scorer.score(hypotheses, rows),
        "theirs": lambda: Cider().compute_score(gts, res),
    }
    times = seconds(calls, device, repeats)
    against = "pycocoevalcap's CIDEr of 128 images x 6 captions"
    return [
        {"name": against, "seconds": times["theirs"], "ratio": None, "against": None},
        row(
            "CIDEr-D of the same as tensors, corpus known", times["ours"], times["theirs"], against
        ),
    ]


def stepped_logits(captioner, features, inputs, look_once=False):
    """The logits (B, N, T, V) of a captioner stepped word by word; unless look_once it projects the image anew each time."""
    memory, logits = captioner.image_memory(features), []
    state = captioner.initial_state(memory, inputs.shape[1])
    for words in inputs.unbind(dim=2):
        memory = memory if look_once else captioner.image_memory(features)
        output = captioner.step(
            captioner.word_inputs(captioner.embedding(words), memory), state, memory
        )
        state = output.state
        logits.append(captioner.last_layer(output.addends))
    return torch.stack(logits, dim=2)


def bench_decode(device, repeats):
    """500 scenes by the captioner that ships, 3 beams: in one call against one image at a time, with and without the encoder."""
    captioner = load_captioner(Path(__file__).parent / "checkpoints/scenes-gridtd.pt", device)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, 1, 1, SCENES)
        paths = sorted(Path(folder, "test").glob("*.jpg"))
        images = torch.stack(
            [image_transform(captioner.encoder.image_size)(load_image(path)) for path in paths]
        )
    features = torch.cat([captioner.encode(batch) for batch in images.split(64)])
    calls = {
        "images": lambda: captioner.caption(images),
        "images, one by one": lambda: [captioner.caption(image)[0] for image in images.split(1)],
        "features": lambda: [
            words for batch in features.split(64) for words in captioner.decode(batch)
        ],
        "features, one by one": lambda: [captioner.decode(one)[0] for one in features.split(1)],
    }
    captions = [call() for call in calls.values()]
    different = max(
        sum(one != other for one, other in zip(captions[0], others)) for others in captions
    )
    times = seconds(calls, device, repeats)
    rows = []
    for what in ("images", "features"):
        against = f"captioning {SCENES} scenes from {what}, one by one"
        rows.append(
            {
                "name": against,
                "seconds": times[f"{what}, one by one"],
                "ratio": None,
                "against": None,
            }
        )
        rows.append(
            row(
                f"in batches ({different} captions differ)",
                times[what],
                times[f"{what}, one by one"],
                against,
            )
        )
    return rows


def bench_evaluate(device, repeats):
    """All four experiments with four methods on scenes, batch after batch: what an image costs, and whether the last costs more than
    the first. (Nothing is repeated: the batches are the repetitions.)"""
    captioner = load_captioner(Path(__file__).parent / "checkpoints/scenes-gridtd.pt", device)
    methods = ("lrp", "gradcam", "guided_gradcam", "attention")
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, 40, 4, 7 * EXAMINED_AT_ONCE)
        prepare("scenes", folder, folder)
        dataset = CaptionDataset(folder, "test", image_transform(captioner.encoder.image_size))
        phrases = object_phrases(dataset.info["categories"])
        words = [word for (word, *more), category in phrases.items() if category and not more]
        setting = Setting(captioner, methods, phrases, words, {"method": "beam"})
        times = []
        for images, _, indices in DataLoader(dataset, EXAMINED_AT_ONCE):
            started = time.perf_counter()
            entries = [dataset.entries[index] for index in indices]
            examine(images, indices.tolist(), entries, EXPERIMENTS, setting)
            times.append((time.perf_counter() - started) / len(indices))
    first, last = (
        statistics.mean(part) for part in (times[1:4], times[4:])
    )  # the first batch warms up
    against = "four experiments, four methods: one scene, in batches 2 to 4"
    return [
        {"name": against, "seconds": first, "ratio": None, "against": None},
        row("one scene, in batches 5 to 7", last, first, against),
    ]


def row(name, time_taken, reference, against):
    """A result with its ratio."""
    return {
        "name": name,
        "seconds": time_taken,
        "ratio": time_taken / reference,
        "against": against,
    }


BENCHMARKS = {
    "explain": bench_explain,
    "methods": bench_methods,
    "train": bench_train,
    "decode": bench_decode,
    "evaluate": bench_evaluate,
}


def main():
    """Measure what was asked for and print the rows."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("what", choices=(*BENCHMARKS, "all"), help="what to measure")
    parser.add_argument(
        "--preset",
        choices=("coco",),
        help="for train: training at COCO's size (default: single steps and their parts)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="counted calls of everything (default: %(default)s)"
    )
    parser.add_argument("--json", help="also write the rows to this file")
    add_common_flags(parser)
    args = parser.parse_args()
    set_seed(args.seed)
    device = choose_device(args.device)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    if args.preset and args.what != "train":
        raise UserError(f"--preset {args.preset} goes with train")
    names = BENCHMARKS if args.what == "all" else [args.what]
    benchmarks = [bench_coco] if args.preset else [BENCHMARKS[name] for name in names]
    rows = [row for benchmark in benchmarks for row in benchmark(device, args.repeats)]
    for result in rows:
        ratio = f"   {result['ratio']:.2f} x {result['against']}" if result["ratio"] else ""
        print(f"{result['name']:58s} {result['seconds']:9.3f} s{ratio}")
        for name, value in result.get("numbers", {}).items():
            print(f"    {name:54s} {value:9.3f}")
    if args.json:
        write_json(
            args.json,
            {
                **provenance(args.seed),
                "device": str(device),
                "threads": torch.get_num_threads(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    run(main)
