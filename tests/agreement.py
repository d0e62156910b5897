"""How far every captioner, method and encoder is from the slow float64 oracles, on one photograph.

    python tests/agreement.py [PHOTOGRAPH]        # takes minutes

The default photograph is one of ../shared/data/coco2017, or the demo's where that is missing.
Prints the largest difference as a share of the largest true value, over regions, words and pixels.
Encoders and captioners have random weights, and the batch-norms are calibrated.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.models import inception, resnet, squeezenet

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import random_captioner, relative_difference  # noqa: E402
from oracle_gradients import REFERENCES, all_word_gradients, explain_words  # noqa: E402
from oracle_lrp import gridtd_lrp  # noqa: E402
from oracle_models import adaptive_lrp, aoa_lrp, graph_lrp, soft_lrp  # noqa: E402

from captioner import METHODS  # noqa: E402
from explanation import explain_batch  # noqa: E402
from images import image_transform, load_image  # noqa: E402 (the path comes first)

ENCODERS = ("scenes_vgg", "vgg16", "resnet101", "squeezenet1_1", "inception_v3")
DECODERS = {"adaptive": adaptive_lrp, "gridtd": gridtd_lrp, "aoa": aoa_lrp, "soft": soft_lrp}
CAPTION = [3, 7]


def chain(*modules):
    """Modules one after the other, as the oracle's graph."""
    return ("sequence", [node for node in map(graph, modules) if node is not None])


def inception_branches(block):
    """The branches of an Inception block, in the order of their channels."""
    pool = ("avgpool", 3, 1, 1)
    match block:
        case inception.InceptionA():
            return [
                chain(block.branch1x1),
                chain(block.branch5x5_1, block.branch5x5_2),
                chain(block.branch3x3dbl_1, block.branch3x3dbl_2, block.branch3x3dbl_3),
                ("sequence", [pool, graph(block.branch_pool)]),
            ]
        case inception.InceptionB():
            return [
                chain(block.branch3x3),
                chain(block.branch3x3dbl_1, block.branch3x3dbl_2, block.branch3x3dbl_3),
                ("maxpool", 3, 2),
            ]
        case inception.InceptionC():
            return [
                chain(block.branch1x1),
                chain(block.branch7x7_1, block.branch7x7_2, block.branch7x7_3),
                chain(*(getattr(block, f"branch7x7dbl_{i}") for i in range(1, 6))),
                ("sequence", [pool, graph(block.branch_pool)]),
            ]
        case inception.InceptionD():
            return [
                chain(block.branch3x3_1, block.branch3x3_2),
                chain(*(getattr(block, f"branch7x7x3_{i}") for i in range(1, 5))),
                ("maxpool", 3, 2),
            ]


def graph(module):
    """A folded torchvision module as the oracle's graph; None for one that does nothing."""
    match module:
        case nn.Sequential():
            return chain(*module)
        case nn.Conv2d():
            bias = None if module.bias is None else module.bias.detach().numpy()
            return ("conv", module.weight.detach().numpy(), bias, module.stride, module.padding)
        case nn.ReLU():
            return ("relu",)
        case nn.MaxPool2d():
            return ("maxpool", module.kernel_size, module.stride, module.padding, module.ceil_mode)
        case nn.Identity():
            return None
        case squeezenet.Fire():
            return (
                "sequence",
                [
                    chain(module.squeeze, nn.ReLU()),
                    (
                        "concat",
                        [chain(module.expand1x1, nn.ReLU()), chain(module.expand3x3, nn.ReLU())],
                    ),
                ],
            )
        case inception.BasicConv2d():
            return ("sequence", [graph(module.conv), ("relu",)])
        case resnet.Bottleneck():
            main = chain(module.conv1, nn.ReLU(), module.conv2, nn.ReLU(), module.conv3)
            return ("sequence", [("residual", main, chain(*(module.downsample or []))), ("relu",)])
    return ("concat", inception_branches(module))


def decoder_lrp(captioner, features, ids):
    """The oracle's region relevance (T, L, D), word relevance (T, T) and scores (T,)."""
    parameters = {name: value.numpy() for name, value in captioner.state_dict().items()}
    model_type = captioner.config.model_type
    options = {"heads": captioner.config.num_head} if model_type == "aoa" else {}
    inputs = [captioner.vocabulary.start, *ids[:-1]]
    return DECODERS[model_type](parameters, features, inputs, ids, **options)


def lrp_disagreement(captioner, image, ids):
    """The largest relative differences of LRP's scores, regions, words and pixels.

    image (3, H, W); the pixels are those of the last word.
    """
    # Not captioner.explain, which wants images of the encoder's size: tests use smaller ones.
    (ours,) = explain_batch(captioner, image[None], [ids], METHODS["lrp"])
    with torch.no_grad():
        features = captioner.encoder(image[None])[0]
        maps = captioner.encoder.net(image[None])[0]
    regions, words, scores = decoder_lrp(captioner, features.numpy(), ids)
    relevance = regions[-1].T.reshape(maps.shape)
    pixels = graph_lrp(graph(captioner.encoder.folded().net), image.numpy(), relevance)
    return {
        "scores": relative_difference(ours.scores, scores),
        "regions": relative_difference(ours.region_relevance, regions.sum(-1)),
        "words": relative_difference(ours.word_relevance, words),
        "pixels": relative_difference(ours.image_relevance[-1], pixels.sum(0)),
    }


def gradient_disagreements(captioner, image, ids):
    """The same for every gradient-based method, over all words: {method: {...}}."""
    parameters = {name: value.detach() for name, value in captioner.state_dict().items()}
    config = captioner.config
    encoder = captioner.encoder
    words = all_word_gradients(
        config.model_type,
        parameters,
        encoder,
        config.num_head,
        image,
        ids,
        captioner.vocabulary.start,
    )
    found = {}
    for method in REFERENCES:
        ours = captioner.explain(image[None], [captioner.vocabulary.decode(ids)], method)[0]
        pixels, regions, inputs = explain_words(method, words, encoder.grid)
        found[method] = {
            "regions": relative_difference(ours.region_relevance, regions),
            "pixels": relative_difference(ours.image_relevance, pixels),
        }
        if method != "attention":  # which says nothing of words
            found[method]["words"] = relative_difference(ours.word_relevance, inputs)
    return found


def default_photograph():
    """A photograph of COCO, or a drawing where there is none."""
    photographs = sorted((ROOT / "../shared/data/coco2017/val2017").glob("*.jpg"))
    return photographs[0] if photographs else ROOT / "data/demo/lamb.jpg"


def main():
    """Compare, and print a row for each captioner, encoder and method."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default_photograph()
    image = load_image(path)
    print(f"{'captioner':10s} {'encoder':14s} {'method':17s} largest relative difference")
    for encoder in ENCODERS:
        for model_type in DECODERS:
            captioner = random_captioner(encoder, model_type=model_type)
            pixels = image_transform(captioner.encoder.image_size)(image).double()
            rows = {"lrp": lrp_disagreement(captioner, pixels, CAPTION)}
            rows |= gradient_disagreements(captioner, pixels, CAPTION)
            for method, found in rows.items():
                values = "  ".join(f"{name} {value:.1e}" for name, value in found.items())
                print(f"{model_type:10s} {encoder:14s} {method:17s} {values}", flush=True)


if __name__ == "__main__":
    main()
