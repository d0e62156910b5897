"""The experiments, a file each, all of one form: see `Experiment` in case.py. First those of the
paper (§4).

    setting = Setting(captioner, ["lrp", "gradcam"], phrases, object_words)
    records = examine(images, indices, entries, EXPERIMENTS, setting)     # of a batch: case.py
    records = examine_split(dataset, EXPERIMENTS, setting, path, header)  # of a split: records.py
    tables = tables_of(records, EXPERIMENTS, model_type)                  # tables.py

The replication (docs/PROTOCOL.md, study.py) adds sign.py, an experiment; captionscores.py, what
each image contributes to the caption metrics; hypotheses.py, what is tested; inference.py, how; and
report.py, its tables.

Object importance (docs/counterfactual.md) adds counterfactual.py, what is kept of each image, and
how robust captions are; importance_questions.py, what is asked of that; and ranks.py, rank
correlations.

A new experiment is a file with `run`, `table` and an EXPERIMENT, and a row of EXPERIMENTS.
"""

from experiments import (
    correctness,
    faithfulness,
    hallucination,
    image_ablation,
    map_quality,
    word_ablation,
)

PAPER_EXPERIMENTS = {
    "word_ablation": word_ablation.EXPERIMENT,
    "image_ablation": image_ablation.EXPERIMENT,
    "correctness": correctness.EXPERIMENT,
    "hallucination": hallucination.EXPERIMENT,
}
# What a reader of today asks of explanations beside that.
EXPERIMENTS = PAPER_EXPERIMENTS | {
    "faithfulness": faithfulness.EXPERIMENT,
    "map_quality": map_quality.EXPERIMENT,
}
