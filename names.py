"""The names that the flags of commands offer, for --help must not wait for PyTorch.

Those of methods, captioners, encoders and the like are the keys of tables of functions and classes,
which lie in the modules named here. tests/test_startup.py compares them.
"""

# The keys of tables.
METHODS = (  # explanation.METHODS
    "lrp",
    "attnlrp",
    "gradcam",
    "guided_gradcam",
    "guided_backprop",
    "gradient",
    "input_x_gradient",
    "lrp_alpha2beta1",
    "lrp_gamma",
    "lrp_epsilon",
    "layercam",
    "integrated_gradients",
    "smoothgrad",
    "occlusion",
    "rise",
    "attention",
)
PRETRAINED_METHODS = (  # transformermethods.METHODS
    "attnlrp",
    "lrp",
    "gradient",
    "input_x_gradient",
    "relevancy",
    "weighted_relevancy",
    "gradient_weighted_relevancy",
    "rollout",
    "transformer_attribution",
    "partial_lrp",
    "attention_gradcam",
    "attention",
    "occlusion",
)
# What perturbation.py compares, of the methods that a captioner has.
PERTURBED_METHODS = (
    "relevancy",
    "weighted_relevancy",
    "gradient_weighted_relevancy",
    "rollout",
    "transformer_attribution",
    "partial_lrp",
    "attention_gradcam",
    "attention",
    "gradcam",
    "input_x_gradient",
    "attnlrp",
    "lrp",
)
CLIPMAPPER_TASKS = ("caption", "vqa")  # clipmappermodel.TASKS
MODELS = ("adaptive", "gridtd", "aoa", "soft")  # captioner.MODELS
ENCODERS = (  # encoder.ENCODERS
    "scenes_vgg",
    "vgg16",
    "resnet101",
    "squeezenet1_1",
    "inception_v3",
    "inception_v3_6e",
    "bottom_up",
)
DECODERS = (  # decoding.DECODERS
    "beam",
    "diverse_beam",
    "greedy",
    "multinomial",
    "gumbel",
    "top_k",
    "nucleus",
)
STRIP = ("repeats", "bad_endings")  # decoding.STRIP
LRP_CONTROLS = ("none", "random", "shuffled", "magnitude", "temperature")  # of objectives
METRICS = (  # captionmetrics.METRICS
    "bleu",
    "meteor",
    "rouge",
    "cider",
    "ciderd",
    "spice",
    "bertscore",
    "chair",
    "object_words",
    "object_word_ap",
    "diversity",
    "planted",
)
FREQUENT_OBJECT_WORDS = ("flickr", "coco")  # captionmetrics.FREQUENT_OBJECT_WORDS
PAPER_EXPERIMENTS = ("word_ablation", "image_ablation", "correctness", "hallucination")
EXPERIMENTS = (*PAPER_EXPERIMENTS, "faithfulness", "map_quality")
INPAINTERS = ("mean", "blur", "telea", "navier_stokes", "generative")  # inpainting.INPAINTERS
# importance.DISTANCES
DISTANCES = ("sentence", "bertscore", "probability", "attention", "attention_sum")
SOURCES = ("scenes", "coco2017", "flickr30k", "flickr8k", "karpathy", "csv")  # readers.SOURCES
OWN_SOURCES = ("karpathy", "csv")  # those of one's own images

# What has no table. The modules that read these take them from here.
CROSS_ENTROPY = "cross_entropy"  # a mode of training; the others are
TUNING_MODES = ("cider_tune", "lrp_tune", "lrp_cider_tune")
SCHEDULES = ("plateau", "cosine", "constant")  # of the learning rates
DROPOUTS = ("dropout", "embed_dropout", "region_dropout", "attention_dropout")
SCALES = ("caption", "word")  # what shares one scale of colours: all words of a caption, or none
FIGURE_ENDINGS = (".png", ".pdf", ".svg")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SENTENCE_MODEL = "all-MiniLM-L6-v2"  # which compares sentences, see bert/sentences.py
DILATION = 0.1  # of masks, and the next two: see importance.Removal
MAX_AREA = 0.25
NULLS = 2
