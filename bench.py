"""Every speed claim of RESULTS.md, measured as a ratio within one run.

    python bench.py explain              # an explained caption, against the passes that it needs
    python bench.py methods              # every method and captioner, against a plain backward
    python bench.py train                # training steps, what fine-tuning adds, SCST's reward
    python bench.py train --preset coco  # training at COCO's size from cached features
    python bench.py decode               # captioning in batches, against one image at a time
    python bench.py evaluate             # the paper's experiments, an image
    python bench.py growth               # more words, images, or captions a step
    python bench.py all --json bench.json

Each row: name, seconds (median), ratio, and what it is a ratio to. The ratio is the median of the
ratios of five rounds, in which all that is compared is called in turn; the least and the greatest
ratio stand behind it. docs/speed.md says what the ratios mean.
"""

import functools
import math
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    choose_device,
    provenance,
    run,
    set_seed,
    write_json,
)
from lateimports import after_parsing, import_what_waits

with after_parsing(globals()):
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    from captiondata import CaptionDataset, files_hash
    from captioner import MODELS, CaptionerConfig, build_captioner, load_captioner
    from encoder import build_encoder
    from experiments import PAPER_EXPERIMENTS
    from experiments.case import Setting, examine
    from experiments.records import EXAMINED_AT_ONCE
    from explanation import methods_of
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
REWARD_IMAGES = 128
REWARD_CAPTIONS = 6  # of each image
SHIPPED = Path(__file__).parent / "checkpoints/scenes-gridtd.pt"
# Sizes of what grows, the smallest first.
EXPLAINED_WORDS = (1, 5, 10, 20)
EXPLAINED_IMAGES = (1, 4, 16)
DECODED_IMAGES = (1, 16, 64, 256)
BATCHES = (8, 16, 32, 64)


def seconds(functions, device, repeats):
    """{name: seconds (repeats,)} of functions.

    They are called in turn, so that a drifting machine slows all of them alike. The first round
    warms up and does not count.
    """
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in times.items()}


def synchronize(device):
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_row(name, time_taken):
    """A result that others are ratios to; time_taken: the seconds of each round, or of one."""
    return {"name": name, "seconds": float(np.median(time_taken)), "ratio": None, "against": None}


def ratio_row(name, time_taken, reference, against):
    """A result, and the median and the spread of its ratios to a reference, round by round.

    time_taken, reference: the seconds of each round, or of one.
    """
    ratios = np.atleast_1d(time_taken / reference)
    return {
        "name": name,
        "seconds": float(np.median(time_taken)),
        "ratio": float(np.median(ratios)),
        "spread": [float(ratios.min()), float(ratios.max())],
        "against": against,
    }


# ------------------------------------------------------------------------------------ material


def bench_vocabulary():
    """A vocabulary of the size of COCO's."""
    words = [f"word{index}" for index in range(VOCABULARY - 4)]
    return Vocabulary(["<pad>", *words, "<unk>", "<start>", "<end>"])


def random_captioner(device, **sizes):
    """A captioner with random weights, and the words it knows; speed depends on neither."""
    vocabulary = bench_vocabulary()
    config = CaptionerConfig(**sizes)
    encoder = build_encoder(config.encoder, "random")
    captioner = build_captioner(config, vocabulary, encoder)
    return captioner.to(device).eval(), vocabulary.kept


def write_photograph(folder):
    """A JPEG of a photograph's size; its content does not matter for time."""
    path = Path(folder) / "photograph.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def training_data(device, batch=32):
    """Features of VGG16's shape, and token ids of captions of 20 words."""
    features = torch.rand(batch, *REGIONS, device=device)
    token_ids = torch.randint(1, VOCABULARY - 3, (batch, 1, 20), device=device)
    return features, token_ids


# --------------------------------------------------------------------------------- explanations


def bench_explain(device, repeats):
    """LRP of a caption of 10 words, from photograph to pixels.

    It cannot do without two forwards of VGG16 and one backward of 10 gradients.
    """
    captioner, words = random_captioner(device, encoder="vgg16")
    encoder = captioner.encoder
    size = encoder.image_size
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
    name = f"LRP of a {WORDS}-word caption, photograph to pixels"
    return [
        reference_row("VGG16 forward, one image", times["forward"]),
        reference_row(f"two VGG16 forwards + one backward of {WORDS} gradients", floor),
        ratio_row(name, times["explain"], floor, "these"),
    ]


def bench_methods(device, repeats):
    """Every method on a caption of 10 words, for every captioner.

    Against the forward passes and one backward of 10 gradients of the same model.
    """
    rows = []
    for model_type in MODELS:
        captioner, words = random_captioner(device, encoder="vgg16", model_type=model_type)
        size = captioner.encoder.image_size
        image = torch.randn(1, 3, size, size)
        caption = words[:WORDS]
        targets = torch.tensor([captioner.vocabulary.encode(caption)], device=device)
        measured = {}
        for name in methods_of(captioner):
            measured[name] = functools.partial(captioner.explain, image, [caption], name)
        floor = functools.partial(plain_backward, captioner, image.to(device), targets)
        times = seconds({"floor": floor, **measured}, device, repeats)
        against = f"{model_type}: forward + one backward of {WORDS} gradients"
        rows.append(reference_row(against, times["floor"]))
        for name in measured:
            rows.append(ratio_row(f"{model_type}: {name}", times[name], times["floor"], against))
    return rows


def plain_backward(captioner, images, targets):
    """A teacher-forced forward, and one batched backward from the logits of all words.

    images (B, 3, S, S), targets (B, T); the gradients of pixels and embeddings.
    """
    images = images.clone().requires_grad_()
    embeddings = captioner.embedding(targets).detach().requires_grad_()
    memory = captioner.image_memory(captioner.encoder(images))
    unrolled = captioner.unroll(embeddings.unsqueeze(1), memory)
    logits = captioner.last_layer(unrolled.addends)[:, 0]
    scores = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    seeds = torch.eye(targets.shape[1], device=images.device).unsqueeze(1)
    return torch.autograd.grad(scores, (images, embeddings), seeds, is_grads_batched=True)


# ------------------------------------------------------------------------------------- training


def bench_train(device, repeats):
    """Training steps of the multi-head captioner, and what fine-tuning adds."""
    rows = bench_steps(device, repeats)
    rows += bench_inference(device, repeats)
    rows += bench_image_inference(device, repeats)
    rows += bench_reward(device, repeats)
    return rows


def bench_coco(device, repeats):
    """Training at COCO's size: VGG16's cached features, 32 images x 5 captions a step.

    Batches that DataLoader's workers read from the file, against the same batches at hand, show how
    long the device waits for data. Features and captions are random and have the shapes of the real
    ones: captions of 8 to 20 words, 12 in the mean.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_dataset(Path(folder), (repeats + 1) * PAPER_BATCH)
        for model_type in MODELS:
            rows += coco_rows(folder, model_type, device)
    return rows


def coco_rows(folder, model_type, device):
    """The rows of one captioner: a pass over the dataset, with its batches at hand and without."""
    flags = ["--preset", "paper", "--model_type", model_type]
    if device.type == "cuda":
        flags.append("--bfloat16")
        torch.cuda.reset_peak_memory_stats(device)
    config = parse_arguments(flags).training
    dataset = CaptionDataset(folder, "train", features="vgg16")
    pinned = device.type == "cuda"
    loader = DataLoader(dataset, config.batch_size, num_workers=config.workers, pin_memory=pinned)
    kept = [(inputs.to(device), captions, indices) for inputs, captions, indices in loader]
    train_step = coco_step(model_type, config, device)
    at_hand = seconds_a_step(train_step, kept, device)
    from_file = seconds_a_step(train_step, loader, device)
    images_a_second = config.batch_size / from_file
    numbers = {
        "images/s": images_a_second,
        "captions/s": 5 * images_a_second,
        "hours for an epoch of 110,000 images": COCO_TRAIN / images_a_second / 3600,
        "share of time waiting for data": max(0.0, 1 - at_hand / from_file),
    }
    if device.type == "cuda":
        numbers["GPU memory, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    against = f"{model_type}: a step of COCO's size, 32 images x 5 captions, batches at hand"
    name = f"{model_type}: the same from the feature file"
    return [
        reference_row(against, at_hand),
        {**ratio_row(name, from_file, at_hand, against), "numbers": numbers},
    ]


def coco_step(model_type, config, device):
    """A function that makes one whole training step of a batch, the optimizer's part included."""
    captioner, _ = random_captioner(device, encoder="vgg16", model_type=model_type)
    captioner.encoder.requires_grad_(False)
    optimizer = build_optimizer(captioner.train(), config)
    objective = CrossEntropy(captioner, attention_penalty=captioner.attention_penalty)
    step = TrainingStep(captioner, objective, True, config.bfloat16)

    def train_step(inputs, captions, indices):
        loss, _ = step(inputs.to(device, non_blocking=True), captions, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(optimizer, config.grad_clip, config.grad_norm)
        optimizer.step()

    return train_step


def seconds_a_step(train_step, batches, device):
    """The mean seconds of a step over batches; the first one warms up and does not count."""
    for count, batch in enumerate(batches):
        train_step(*batch)
        if count == 0:
            synchronize(device)
            started = time.perf_counter()
    synchronize(device)
    return (time.perf_counter() - started) / count


def write_random_dataset(folder, images):
    """A prepared dataset of random captions and features of VGG16's shape, without images."""
    chooser = random.Random(0)
    entries = []
    for index in range(images):
        encoded = [random_caption(chooser) for _ in range(5)]
        entry = {"image_id": index, "file": f"{index}", "captions": ["random"] * 5}
        entries.append({**entry, "encoded": encoded, "objects": []})
    info = {
        "name": "random",
        "images_root": ".",
        "max_length": 20,
        "splits": {"train": images},
        "categories": {},
        "planted_pairs": [],
    }
    bench_vocabulary().save(folder / "vocabulary.json")
    write_json(folder / "train.json", entries)
    write_json(folder / "info.json", info)
    path = features_path(folder, "vgg16")
    lay_out(path, {"encoder": "vgg16"}, {"train": (images, files_hash(entries))}, REGIONS)
    noise = np.random.default_rng(0)
    for start in range(0, images, 32):
        indices = list(range(start, min(start + 32, images)))
        rows = noise.random((len(indices), *REGIONS), np.float32)
        write_rows(path, "train", indices, rows.astype(np.float16))


def random_caption(chooser):
    """The token ids of a random caption of 8 to 20 words."""
    length = min(20, 8 + int(chooser.expovariate(1 / 4)))
    return [chooser.randrange(1, VOCABULARY - 3) for _ in range(length)]


def bench_steps(device, repeats):
    """A teacher-forced step of the multi-head captioner: all words at once, and word by word."""
    captioner, _ = random_captioner(device, encoder="vgg16", model_type="aoa")
    features, inputs = training_data(device)

    def all_at_once():
        captioner.zero_grad()
        captioner(features, inputs).logsumexp(-1).mean().backward()

    def word_by_word(project_once):
        captioner.zero_grad()
        logits = stepped_logits(captioner, features, inputs, project_once)
        logits.logsumexp(-1).mean().backward()

    with torch.no_grad():
        stepped = stepped_logits(captioner, features, inputs, True)
        difference = (captioner(features, inputs) - stepped).abs().max().item()
    captioner.train()  # in eval mode gradients go step by step
    measured = {
        "at once": all_at_once,
        "original": functools.partial(word_by_word, False),
        "projected once": functools.partial(word_by_word, True),
    }
    times = seconds(measured, device, repeats)
    original = times["original"]
    against = "the same model stepped word by word as the original does"
    name = "aoa: the same with the image projected once"
    at_once = f"aoa: all words at once (logits differ by {difference:.0e})"
    return [
        reference_row(f"aoa, B=32, T=20: {against}", original),
        ratio_row(name, times["projected once"], original, against),
        ratio_row(at_once, times["at once"], original, against),
    ]


def stepped_logits(captioner, features, inputs, project_once):
    """The logits (B, N, T, V) of a captioner stepped word by word.

    features (B, L, D), inputs (B, N, T); project_once: whether the image is projected once, or anew
    for each step.
    """
    memory = captioner.image_memory(features)
    state = captioner.initial_state(memory, inputs.shape[1])
    logits = []
    for token_ids in inputs.unbind(dim=2):
        if not project_once:
            memory = captioner.image_memory(features)
        word_input = captioner.word_inputs(captioner.embedding(token_ids), memory)
        output = captioner.step(word_input, state, memory)
        state = output.state
        logits.append(captioner.last_layer(output.addends))
    return torch.stack(logits, dim=2)


def gradient_step(captioner, objective, inputs, features, targets, images=None, bfloat16=False):
    """A function that makes the gradients of an objective on these captions.

    bfloat16: whether to compute in it where that is safe, as training does with the flag.
    """

    def step():
        captioner.zero_grad()
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bfloat16):
            loss, _ = objective.loss(features, inputs, targets, images)
        loss.backward()

    return step


def bench_inference(device, repeats):
    """A step of LRP-inference with cross-entropy, against one of cross-entropy.

    Stop words cost nothing. Half of the words of COCO's captions are such, or `<end>`, so every
    second word of the vocabulary stands for one. The dearest case has none.
    """
    rows = []
    for model_type in MODELS:
        captioner, _ = random_captioner(device, encoder="vgg16", model_type=model_type)
        captioner.train()
        features, inputs = training_data(device)
        half_quiet = LRPInference(captioner)
        half_quiet.quiet = torch.arange(VOCABULARY, device=device) % 2 == 0
        objectives = {
            "plain": CrossEntropy(captioner),
            "half": half_quiet,
            "none": LRPInference(captioner),
        }
        steps = {}
        for name, objective in objectives.items():
            steps[name] = gradient_step(captioner, objective, inputs, features, inputs.roll(-1))
        steps["bfloat16"] = gradient_step(
            captioner, objectives["plain"], inputs, features, inputs.roll(-1), bfloat16=True
        )
        times = seconds(steps, device, repeats)
        plain = times["plain"]
        against = f"{model_type}: a step of cross-entropy, B=32, T=20, V=10,000"
        dearest = f"{model_type}: the same if no predicted word were a stop word"
        rows.append(reference_row(against, plain))
        rows.append(
            ratio_row(f"{model_type}: a step of LRP-inference", times["half"], plain, against)
        )
        rows.append(ratio_row(dearest, times["none"], plain, against))
        in_bfloat16 = f"{model_type}: a step of cross-entropy in bfloat16"
        rows.append(ratio_row(in_bfloat16, times["bfloat16"], plain, against))
    return rows


def bench_image_inference(device, repeats):
    """A step of LRP-inference's image form for one image: every word goes back to the pixels."""
    captioner, _ = random_captioner(device, encoder="vgg16")
    size = captioner.encoder.image_size
    images = torch.randn(1, 3, size, size, device=device)
    _, inputs = training_data(device, batch=1)
    data = (inputs, captioner.encode(images), inputs.roll(-1), images)
    captioner.train()
    steps = {
        "plain": gradient_step(captioner, CrossEntropy(captioner), *data),
        "image": gradient_step(captioner, ImageLRPInference(captioner), *data),
    }
    times = seconds(steps, device, repeats)
    against = "gridtd: a step of cross-entropy, B=1, T=20, V=10,000, features given"
    name = "gridtd: a step of LRP-inference by image heat maps through VGG16"
    return [
        reference_row(against, times["plain"]),
        ratio_row(name, times["image"], times["plain"], against),
    ]


def bench_reward(device, repeats):
    """CIDEr-D of 128 images x 6 captions, 5 references each, against pycocoevalcap's scorer."""
    references, captions = reward_captions()
    scorer = CiderD(references, device=device)
    rows = padded(sum(references, [])).unflatten(0, (REWARD_IMAGES, 5))
    hypotheses = padded(sum(captions, [])).unflatten(0, (REWARD_IMAGES, REWARD_CAPTIONS))
    gts = {}
    res = {}
    for number in range(REWARD_CAPTIONS):
        for image in range(REWARD_IMAGES):
            gts[image, number] = [as_text(token_ids) for token_ids in references[image]]
            res[image, number] = [as_text(captions[image][number])]
    calls = {
        "ours": functools.partial(scorer.score, hypotheses, rows),
        "theirs": lambda: Cider().compute_score(gts, res),
    }
    times = seconds(calls, device, repeats)
    against = "pycocoevalcap's CIDEr of 128 images x 6 captions"
    name = "CIDEr-D of the same as tensors, corpus known"
    return [
        reference_row(against, times["theirs"]),
        ratio_row(name, times["ours"], times["theirs"], against),
    ]


def reward_captions():
    """Token ids of random references and captions of 12 words, of REWARD_IMAGES images.

    Few words are frequent. Half of a caption's words come from a reference, or nothing would match.
    """
    chooser = random.Random(0)

    def caption():
        numbers = [int(chooser.expovariate(1 / 300)) for _ in range(12)]
        return [min(VOCABULARY - 4, 1 + number) for number in numbers]

    references = []
    for _ in range(REWARD_IMAGES):
        references.append([caption() for _ in range(5)])
    captions = []
    for image in references:
        of_image = []
        for _ in range(REWARD_CAPTIONS):
            of_image.append([*chooser.choice(image)[:6], *caption()[:6]])
        captions.append(of_image)
    return references, captions


def as_text(token_ids):
    """Token ids as a sentence of numbers."""
    return " ".join(map(str, token_ids))


# ------------------------------------------------------------------------- decoding, experiments


def bench_decode(device, repeats):
    """500 scenes by the captioner that ships, 3 beams: in batches, against one image at a time."""
    captioner = load_captioner(SHIPPED, device)
    transform = image_transform(captioner.encoder.image_size)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, 1, 1, SCENES)
        paths = sorted(Path(folder, "test").glob("*.jpg"))
        images = torch.stack([transform(load_image(path)) for path in paths])
    features = torch.cat([captioner.encode(batch) for batch in images.split(64)])

    def decoded(batch_size):
        captions = []
        for batch in features.split(batch_size):
            captions += captioner.decode(batch)
        return captions

    def captioned_one_by_one():
        return [captioner.caption(image)[0] for image in images.split(1)]

    calls = {
        "images": functools.partial(captioner.caption, images),
        "images, one by one": captioned_one_by_one,
        "features": functools.partial(decoded, 64),
        "features, one by one": functools.partial(decoded, 1),
    }
    different = most_different([call() for call in calls.values()])
    times = seconds(calls, device, repeats)
    rows = []
    for what in ("images", "features"):
        against = f"captioning {SCENES} scenes from {what}, one by one"
        reference = times[f"{what}, one by one"]
        rows.append(reference_row(against, reference))
        name = f"in batches ({different} captions differ)"
        rows.append(ratio_row(name, times[what], reference, against))
    return rows


def most_different(lists):
    """In how many places a list differs from the first one, at the most."""
    most = 0
    for others in lists:
        most = max(most, sum(one != other for one, other in zip(lists[0], others)))
    return most


def bench_evaluate(device, repeats):
    """All four experiments with four methods on scenes, batch after batch.

    What an image costs, and whether the last one costs more than the first. Nothing is repeated:
    the batches are the repetitions.
    """
    captioner = load_captioner(SHIPPED, device)
    methods = ("lrp", "gradcam", "guided_gradcam", "attention")
    times = []
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, 40, 4, 7 * EXAMINED_AT_ONCE)
        prepare("scenes", folder, folder)
        dataset = CaptionDataset(folder, "test", image_transform(captioner.encoder.image_size))
        phrases = object_phrases(dataset.info["categories"])
        words = [phrase[0] for phrase in phrases if len(phrase) == 1 and phrases[phrase]]
        setting = Setting(captioner, methods, phrases, words, {"method": "beam"})
        for images, _, indices in DataLoader(dataset, EXAMINED_AT_ONCE):
            started = time.perf_counter()
            entries = [dataset.entries[index] for index in indices]
            examine(images, indices.tolist(), entries, PAPER_EXPERIMENTS, setting)
            times.append((time.perf_counter() - started) / len(indices))
    first = statistics.mean(times[1:4])  # the first batch warms up
    last = statistics.mean(times[4:])
    against = "four experiments, four methods: one scene, in batches 2 to 4"
    return [
        reference_row(against, first),
        ratio_row("one scene, in batches 5 to 7", last, first, against),
    ]


# --------------------------------------------------------------------------------------- growth


def bench_growth(device, repeats):
    """How the time grows with words, images and captions."""
    rows = explaining_growth(device, repeats)
    rows += decoding_growth(device, repeats)
    rows += training_growth(device, repeats)
    return rows


def growth_rows(what, calls, device, repeats):
    """A row for each size: how much longer than the smallest it takes, and how long each one.

    what: with a place for the size; calls: {size: function}, the smallest size first.
    """
    times = seconds(calls, device, repeats)
    smallest, *others = calls
    against = what.format(smallest)
    rows = [reference_row(against, times[smallest])]
    for size in others:
        row = ratio_row(what.format(size), times[size], times[smallest], against)
        rows.append({**row, "numbers": {"seconds each": row["seconds"] / size}})
    return rows


def explaining_growth(device, repeats):
    """LRP through VGG16: of more words of one image, and of 10 words of more images."""
    captioner, words = random_captioner(device, encoder="vgg16")
    size = captioner.encoder.image_size
    images = torch.randn(max(EXPLAINED_IMAGES), 3, size, size)
    by_words = {}
    for count in EXPLAINED_WORDS:
        by_words[count] = functools.partial(captioner.explain, images[:1], [words[:count]])
    by_images = {}
    for count in EXPLAINED_IMAGES:
        captions = [words[:WORDS]] * count
        by_images[count] = functools.partial(captioner.explain, images[:count], captions)
    rows = growth_rows("LRP of one image, words: {}", by_words, device, repeats)
    rows += growth_rows(f"LRP of {WORDS} words each, images: {{}}", by_images, device, repeats)
    return rows


def decoding_growth(device, repeats):
    """Captions of more images at once from their features, 3 beams of 20 words."""
    captioner, _ = random_captioner(device, encoder="vgg16")
    features = torch.rand(max(DECODED_IMAGES), *REGIONS, device=device)
    calls = {}
    for count in DECODED_IMAGES:
        calls[count] = functools.partial(captioner.decode, features[:count], max_length=20)
    return growth_rows("decoding from features, images: {}", calls, device, repeats)


def training_growth(device, repeats):
    """The gradients of a step of cross-entropy, of more captions of 20 words."""
    captioner, _ = random_captioner(device, encoder="vgg16")
    captioner.train()
    objective = CrossEntropy(captioner)
    calls = {}
    for count in BATCHES:
        features, inputs = training_data(device, count)
        calls[count] = gradient_step(captioner, objective, inputs, features, inputs.roll(-1))
    return growth_rows("a step of cross-entropy, captions: {}", calls, device, repeats)


BENCHMARKS = {
    "explain": bench_explain,
    "methods": bench_methods,
    "train": bench_train,
    "decode": bench_decode,
    "evaluate": bench_evaluate,
    "growth": bench_growth,
}
FLAGS = [
    Flag(
        "preset",
        "for train: training at COCO's size",
        choices=("coco",),
        shown="single steps and their parts",
    ),
    Flag("repeats", "counted calls of everything", default=5, limits=(1, math.inf)),
    Flag("json", "also write the rows to this file", shown="none"),
]


def chosen_benchmarks(args):
    """The benchmarks that the flags ask for."""
    check_limits(vars(args), FLAGS)
    if args.preset and args.what != "train":
        raise UserError(f"--preset {args.preset} goes with train")
    if args.preset:
        return [bench_coco]
    if args.what == "all":
        return list(BENCHMARKS.values())
    return [BENCHMARKS[args.what]]


def show(result):
    """Print a row."""
    ratio = ""
    if result["ratio"] is not None:
        least, greatest = result["spread"]
        ratio = f"   {result['ratio']:.2f} [{least:.2f}, {greatest:.2f}] x {result['against']}"
    print(f"{result['name']:58s} {result['seconds']:9.3f} s{ratio}", flush=True)
    for name, value in result.get("numbers", {}).items():
        print(f"    {name:54s} {value:9.3f}")


def describe_machine(device):
    """What the seconds depend on: {name: value}."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "gpu": gpu,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def main():
    """Measure what was asked for and print the rows."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("what", choices=(*BENCHMARKS, "all"), help="what to measure")
    add_flags(parser, FLAGS)
    add_common_flags(parser)
    args = parser.parse_args()
    benchmarks = chosen_benchmarks(args)
    import_what_waits()
    set_seed(args.seed)
    device = choose_device(args.device)
    machine = describe_machine(device)
    source = provenance(args.seed)
    for name, value in {**machine, **source["versions"]}.items():
        print(f"{name}: {value}")
    rows = []
    for benchmark in benchmarks:
        found = benchmark(device, args.repeats)
        for result in found:
            show(result)
        rows += found
        if args.json:  # what was measured stays, if the rest is broken off
            write_json(args.json, {**source, **machine, "rows": rows})


if __name__ == "__main__":
    run(main)
