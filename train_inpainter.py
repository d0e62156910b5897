"""Train the generative inpainter on the photographs of a prepared dataset, or measure inpainters.

    python train_inpainter.py --dataset flickr8k               # checkpoints/inpainting-flickr8k.pt
    python train_inpainter.py --dataset flickr8k --steps 500   # a short try
    python train_inpainter.py --dataset flickr8k --evaluate    # all inpainters, on the split val
    python counterfactual.py photo.jpg --objects boxes.json --inpainter generative

Training takes random parts of 128 x 128 pixels of the split train, with random holes. It begins
with the L1 loss alone; then the critic joins. Beside the inpainter, OUTPUT.last.pt holds what is
needed to go on: the same command goes on where an interrupted one stopped. The moving average of
the weights is what is kept.

--evaluate cuts the same random holes into images of a split for all inpainters. PSNR and SSIM are
of the whole image, FID of features of an encoder, which its label names; it is not that of the
Inception of other papers, and compares within one table only.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from commandline import (
    CommandLine,
    Flag,
    UserError,
    add_common_flags,
    add_flags,
    check_limits,
    check_modes,
    choose_device,
    provenance,
    require_writable,
    run,
    set_seed,
    write_json,
    write_tensors,
)
from lateimports import after_parsing, import_what_waits
from names import INPAINTERS
from prepared import dataset_folder

with after_parsing(globals()):
    import numpy as np
    import torch
    from PIL import Image
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from tqdm import tqdm

    from captiondata import CaptionDataset
    from encoder import build_encoder
    from epochtraining import resume_from
    from experiments.statistics import draw_images, mean_with_interval
    from experiments.tables import markdown_table
    from gatedconv import (
        Critic,
        Inpainter,
        critic_loss,
        filled,
        inpainter_loss,
        save_inpainter,
    )
    from holes import random_holes
    from images import image_transform
    from inpainting import SIDE, load_inpainter
    from trainer import WeightAverage

STORED = 144  # pixels a side of the photographs of which parts are taken
READERS = 16  # threads
BETAS = (0.5, 0.999)
AVERAGE_DECAY = 0.999
TRAINING = ("training",)
EVALUATION = ("evaluation",)
MODES = {"training": "training", "evaluation": "--evaluate"}
BASELINE = "telea"  # that the others are compared with
FLAGS = [
    Flag("dataset", "the prepared dataset, by its name under data/ or its folder", "flickr8k"),
    Flag(
        "output",
        "the inpainter's file, or with --evaluate the table's",
        type=Path,
        metavar="FILE",
        shown="checkpoints/inpainting-DATASET.pt, results/counterfactual/inpainters-DATASET.json",
    ),
    Flag("steps", "training steps", 8000, limits=(1, math.inf), modes=TRAINING),
    Flag("batch_size", "images a step", 32, limits=(1, math.inf), modes=TRAINING),
    Flag("width", "channels of the first layer, even", 24, limits=(2, 256), modes=TRAINING),
    Flag("lr", "learning rate of Adam", 1e-4, limits=(0, 1), modes=TRAINING),
    Flag(
        "critic_from",
        "the share of the steps before the critic joins",
        0.25,
        limits=(0, 1),
        modes=TRAINING,
    ),
    Flag(
        "checkpoint_every",
        "steps, of which a kill loses no more",
        250,
        limits=(1, math.inf),
        modes=TRAINING,
    ),
    Flag("evaluate", "measure all inpainters instead of training one", False, switch=True),
    Flag(
        "inpainter",
        f"which, of {', '.join(INPAINTERS)}",
        list(INPAINTERS),
        type=str,
        nargs="+",
        choices=INPAINTERS,
        metavar="NAME",
        shown="all",
        modes=EVALUATION,
    ),
    Flag(
        "inpainter_weights",
        "the generative inpainter's file",
        metavar="FILE",
        shown="what training writes",
        modes=EVALUATION,
    ),
    Flag("split", "which split is measured", "val", modes=EVALUATION),
    Flag("images", "how many images of it", 500, limits=(2, math.inf), modes=EVALUATION),
    Flag("encoder", "whose features FID compares", "timm/tf_efficientnet_lite2", modes=EVALUATION),
    Flag(
        "encoder_weights",
        "its weights, a file",
        metavar="FILE",
        shown="the published ones",
        modes=EVALUATION,
    ),
]


def parse_arguments(arguments=None):
    """The parsed flags; UserError for those that do not go together."""
    parser = CommandLine(description=__doc__)
    add_flags(parser, FLAGS)
    add_common_flags(parser)
    args = parser.parse_args(arguments)
    check_limits(vars(args), FLAGS)
    mode = "evaluation" if args.evaluate else "training"
    check_modes(parser.given(args), FLAGS, mode, MODES)
    if args.width % 2:
        raise UserError(f"--width must be even, not {args.width}")
    return args


# -------------------------------------------------------------------------------------- training


class Training:
    """An inpainter, its critic and their optimizers, step by step.

    photographs: uint8 (N, STORED, STORED, 3) on the device; settings: the flags that say how it is
    done, and that a resumed training has to repeat.
    """

    def __init__(self, photographs, settings, device):
        self.photographs = photographs
        self.settings = settings
        self.device = device
        self.step = 0
        self.inpainter = Inpainter(settings["width"]).to(device, memory_format=torch.channels_last)
        self.critic = Critic().to(device, memory_format=torch.channels_last)
        self.average = WeightAverage(self.inpainter, AVERAGE_DECAY)
        self.optimizers = []
        for network in (self.inpainter, self.critic):
            parameters = network.parameters()
            self.optimizers.append(torch.optim.Adam(parameters, settings["lr"], BETAS))

    def batch(self):
        """The images (B, 3, 128, 128) in -1..1 and the masks (B, 1, 128, 128) of this step.

        They depend on the seed and the step only.
        """
        settings = self.settings
        generator = np.random.default_rng([settings["seed"], self.step])
        count = settings["batch_size"]
        chosen = generator.integers(len(self.photographs), size=count)
        corners = generator.integers(STORED - SIDE + 1, size=(2, count, 1))
        rows = corners[0] + np.arange(SIDE)
        columns = corners[1] + np.arange(SIDE)
        mirrored = generator.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
        places = (chosen[:, None, None], rows[:, :, None], columns[:, None, :])
        places = [torch.from_numpy(place).to(self.device) for place in places]
        images = self.photographs[tuple(places)].permute(0, 3, 1, 2).float() / 127.5 - 1
        masks = torch.from_numpy(random_holes(count, SIDE, generator)).to(self.device)
        return images.contiguous(memory_format=torch.channels_last), masks[:, None].float()

    def train_step(self):
        """One step of both networks; returns the L1 loss and the critic's (0 before it joins)."""
        images, masks = self.batch()
        of_inpainter, of_critic = self.optimizers
        with self.autocast():
            coarse, refined = self.inpainter(images, masks)
            whole = filled(images, masks, refined)
        loss = distance = inpainter_loss(images, coarse.float(), refined.float())
        judged = torch.zeros((), device=self.device)
        if self.step >= self.settings["critic_from"] * self.settings["steps"]:
            judged = self.train_critic(images, whole.detach(), masks, of_critic)
            loss = distance - self.critic(whole.float(), masks).mean()
        of_inpainter.zero_grad(set_to_none=True)
        loss.backward()
        of_inpainter.step()
        self.step += 1
        self.average.update(self.step)
        return distance.detach(), judged.detach()

    def train_critic(self, images, whole, masks, optimizer):
        """One step of the critic; returns its loss."""
        both = self.critic(torch.cat([images, whole.float()]), torch.cat([masks, masks]))
        real, made = both.chunk(2)
        loss = critic_loss(real, made)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    def autocast(self):
        """bfloat16 on a GPU, float32 elsewhere; for the inpainter only, as a spectral norm wants
        more digits."""
        on_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)

    def state(self):
        """All that is needed to go on."""
        return {
            "settings": self.settings,
            "step": self.step,
            "inpainter": self.inpainter.state_dict(),
            "critic": self.critic.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state):
        """Go on with what `state` returned."""
        self.step = state["step"]
        self.inpainter.load_state_dict(state["inpainter"])
        self.critic.load_state_dict(state["critic"])
        self.average.load_state_dict(state["average"])
        for optimizer, held in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(held)


def train_inpainter(args, output, device):
    """Train an inpainter into the file `output`, or go on with that."""
    settings = {name: vars(args)[name] for name in ("steps", "batch_size", "width", "lr")}
    settings |= {"critic_from": args.critic_from, "seed": args.seed}
    settings["dataset"] = str(args.dataset)
    photographs = stored_photographs(dataset_folder(args.dataset)).to(device)
    training = Training(photographs, settings, device)
    last = output.with_suffix(".last.pt")
    if last.exists():
        resume_from(training, last)
        print(f"going on after step {training.step} of {last}")
    parameters = sum(weight.numel() for weight in training.inpainter.parameters())
    print(f"{len(photographs)} photographs, {parameters:,} parameters, on {device}")
    with tqdm(total=args.steps, initial=training.step, unit="step", mininterval=1) as progress:
        while training.step < args.steps:
            distance, judged = training.train_step()
            progress.update()
            saves = training.step % args.checkpoint_every == 0
            if saves or training.step == args.steps:
                progress.set_postfix_str(f"L1 {distance.item():.3f}, critic {judged.item():.3f}")
                write_tensors(last, training.state())
                save_inpainter(output, training.average.captioner())
    last.unlink()
    print(f"the inpainter is {output}")


def stored_photographs(folder):
    """The split train as one uint8 tensor (N, STORED, STORED, 3)."""
    dataset = CaptionDataset(folder, "train")

    def read(index):
        image = dataset.image(index).resize((STORED, STORED), Image.Resampling.LANCZOS)
        return np.asarray(image)

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(read, range(len(dataset)))
        images = list(tqdm(found, total=len(dataset), desc="reading", unit="image", leave=False))
    return torch.from_numpy(np.stack(images))


# ------------------------------------------------------------------------------------- measuring


def evaluate(args, weights, output, device):
    """Measure inpainters on a split, print the table and write it."""
    dataset = CaptionDataset(dataset_folder(args.dataset), args.split)
    encoder = build_encoder(args.encoder, args.encoder_weights).to(device)
    count = min(args.images, len(dataset))
    images = []
    for index in range(count):
        image = dataset.image(index).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        images.append(np.asarray(image))
    masks = random_holes(count, SIDE, np.random.default_rng(args.seed))
    truth = pooled_features(images, encoder, device)
    found = {}
    for name in args.inpainter:
        inpaint = load_inpainter(name, weights, device)
        made = [inpaint(image, mask) for image, mask in zip(images, masks)]
        found[name] = measured(images, made)
        found[name]["FID"] = frechet_distance(truth, pooled_features(made, encoder, device))
    rows = table_of(found, draw_images(count))
    print(markdown_table(rows))
    print(f"FID of the mean features of {args.encoder}; {count} images of {args.split}")
    about = {"images": count, "split": args.split, "encoder": args.encoder, "hole": masks.mean()}
    write_json(output, {**provenance(args.seed), **about, "inpainters": rows})
    print(f"the table is also in {output}")


def measured(images, made):
    """PSNR in dB and SSIM of each image, after an inpainter made it: {"PSNR": [], "SSIM": []}."""
    found = {"PSNR": [], "SSIM": []}
    for image, other in zip(images, made):
        found["PSNR"].append(float(peak_signal_noise_ratio(image, other, data_range=255)))
        similarity = structural_similarity(image, other, channel_axis=2, data_range=255)
        found["SSIM"].append(float(similarity))
    return found


def pooled_features(images, encoder, device, at_once=32):
    """An encoder's features of uint8 images (H, W, 3), means over the regions: (N, D) float64."""
    transform = image_transform(encoder.image_size)
    found = []
    for start in range(0, len(images), at_once):
        batch = [transform(Image.fromarray(image)) for image in images[start : start + at_once]]
        with torch.inference_mode():
            features = encoder(torch.stack(batch).to(device))
        found.append(features.mean(dim=1).cpu().double())
    return torch.cat(found).numpy()


def frechet_distance(first, second):
    """The Fréchet distance of two normal distributions, of whose samples these are, (N, D) each.

    |m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1 S2)^½) (Heusel et al. 2017). The last trace is the sum
    of the singular values of X1 X2ᵀ / (N - 1), where X are the samples less their mean; so no root
    of a D x D matrix is taken.
    """
    centred = [sample - sample.mean(axis=0) for sample in (first, second)]
    scale = math.sqrt((len(first) - 1) * (len(second) - 1))
    common = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / scale
    spreads = [(part**2).sum() / (len(part) - 1) for part in centred]
    apart = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    return float(apart + sum(spreads) - 2 * common)


def table_of(found, counts):
    """A row for each inpainter: its figures, and what PSNR and SSIM are above the baseline's, with
    95 % intervals over images.

    found: {name: {"PSNR", "SSIM": a value an image, "FID"}}; counts: as of `draw_images`.
    """
    numbers = list(range(len(counts)))
    rows = []
    for name, figures in found.items():
        row = {"inpainter": name}
        for measure in ("PSNR", "SSIM"):
            row[measure] = float(np.mean(figures[measure]))
            if BASELINE in found and name != BASELINE:
                differences = np.subtract(figures[measure], found[BASELINE][measure])
                mean, low, high = mean_with_interval(differences.tolist(), numbers, counts)
                row[f"{measure} - {BASELINE}"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        row["FID"] = figures["FID"]
        rows.append(row)
    return rows


def main(arguments=None):
    """Train, or measure."""
    args = parse_arguments(arguments)
    import_what_waits()
    set_seed(args.seed)
    device = choose_device(args.device)
    name = dataset_folder(args.dataset).name
    trained = Path(f"checkpoints/inpainting-{name}.pt")
    if args.evaluate:
        output = args.output or Path(f"results/counterfactual/inpainters-{name}.json")
        require_writable(output)
        evaluate(args, args.inpainter_weights or trained, output, device)
    else:
        output = args.output or trained
        require_writable(output)
        train_inpainter(args, output, device)


def command():
    """The command `lrp-train-inpainter` of an installation."""
    run(main)


if __name__ == "__main__":
    run(main)
