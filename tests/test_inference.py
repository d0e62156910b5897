"""The tests of hypotheses: closed forms, slow loops, examples by hand, and coverage."""

import math

import numpy as np
import pytest
import simulated_coverage as simulated
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from captionmetrics import Captions, caption_metrics
from experiments.captionscores import (
    bleu_4,
    bleu_of,
    chair_i_of,
    chair_s_of,
    cider_of,
    f1_of,
    image_records,
    precision_of,
    word_counts,
)
from experiments.inference import (
    Estimate,
    added_auc,
    auc_difference,
    bootstrap_p,
    crossed_contrast,
    crossed_draws,
    crossed_estimate,
    crossed_parts,
    holm,
    mean_estimate,
    out_of_fold,
    p_against,
    p_for,
    paired_difference,
    pseudo_values,
    ratio,
    verdicts,
)
from experiments.statistics import draw_images

GENERATOR = np.random.default_rng(0)


def estimate(value, p=0.5, inner=None):
    """An Estimate of which only some fields matter."""
    return Estimate(value, value - 1, value + 1, inner or (value - 0.8, value + 0.8), p)


# ------------------------------------------------------------------------------ of one captioner


def test_the_p_of_draws_by_hand():
    assert bootstrap_p(np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9])) == pytest.approx(2 * 1 / 10)
    assert bootstrap_p(np.array([-1.0, 2, 3, 4, 5, 6, 7, 8, 9])) == pytest.approx(2 * 2 / 10)
    assert bootstrap_p(np.array([1.0, -2, -3, -4, -5, -6, -7, -8, -9])) == pytest.approx(4 / 10)
    assert bootstrap_p(np.array([0.0, 0, 0])) == 1
    assert bootstrap_p(np.array([-1.0, 1])) == 1


def test_a_paired_difference_is_that_of_the_collected_draws():
    images = 12
    first = GENERATOR.random((images, 2)) + 0.5
    second = GENERATOR.random((images, 2)) + 0.5
    counts = draw_images(images, 40)
    slow = []
    for draw in range(40):
        chosen = np.repeat(np.arange(images), counts[:, draw])
        one = first[chosen, 0].sum() / first[chosen, 1].sum()
        two = second[chosen, 0].sum() / second[chosen, 1].sum()
        slow.append(one - two)
    found = paired_difference(first, second, ratio, counts)
    assert found.low == pytest.approx(np.quantile(slow, 0.025))
    assert found.high == pytest.approx(np.quantile(slow, 0.975))
    assert found.inner == pytest.approx(tuple(np.quantile(slow, [0.05, 0.95])))
    assert found.value == pytest.approx(
        first[:, 0].sum() / first[:, 1].sum() - second[:, 0].sum() / second[:, 1].sum()
    )


def test_the_bootstrap_of_a_mean_has_its_closed_form():
    """Of one value an image the bootstrap's deviation is the standard error, to 1/sqrt(2B)."""
    values = GENERATOR.normal(0.1, 1, 400)
    found = mean_estimate(values, np.arange(400), draw_images(400, 4000))
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_words_of_an_image_are_drawn_together():
    """Copies of a word say nothing new: the interval stays, and does not shrink."""
    values = GENERATOR.normal(0, 1, 100)
    counts = draw_images(100, 1000)
    once = mean_estimate(values, np.arange(100), counts)
    five_times = mean_estimate(np.repeat(values, 5), np.repeat(np.arange(100), 5), counts)
    assert five_times.low == pytest.approx(once.low)
    assert five_times.p == once.p


def test_an_auc_difference_is_that_of_the_collected_draws():
    images = 30
    numbers = np.repeat(np.arange(images), 2)
    labels = GENERATOR.random(60) < 0.5
    first = labels + GENERATOR.normal(0, 1, 60)
    second = labels + GENERATOR.normal(0, 3, 60).round()
    counts = draw_images(images, 50)
    slow = []
    for draw in range(50):
        chosen = np.repeat(np.arange(60), counts[numbers, draw])
        drawn_labels = labels[chosen]
        one = roc_auc_score(drawn_labels, first[chosen])
        slow.append(one - roc_auc_score(drawn_labels, second[chosen]))
    found = auc_difference(first, second, labels, numbers, counts)
    assert found.value == pytest.approx(
        roc_auc_score(labels, first) - roc_auc_score(labels, second)
    )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert found.p == bootstrap_p(np.array(slow))


def test_a_word_is_predicted_without_its_image():
    """Against one regression a fold, standardised by hand."""
    numbers = np.repeat(np.arange(20), 3)
    labels = GENERATOR.random(60) < 0.5
    features = GENERATOR.normal(5, 3, (60, 2)) + labels[:, None]
    expected = np.empty(60)
    for train, test in GroupKFold(5).split(features, labels, numbers):
        assert not set(numbers[train]) & set(numbers[test])
        mean = features[train].mean(axis=0)
        deviation = features[train].std(axis=0)
        model = LogisticRegression(max_iter=1000)
        model.fit((features[train] - mean) / deviation, labels[train])
        expected[test] = model.predict_proba((features[test] - mean) / deviation)[:, 1]
    assert out_of_fold(features, labels, numbers) == pytest.approx(expected, abs=1e-6)


def test_what_a_feature_adds_is_found():
    numbers = np.repeat(np.arange(200), 3)
    labels = GENERATOR.random(600) < 0.5
    idle = GENERATOR.normal(0, 1, (600, 1))
    telling = labels[:, None] + GENERATOR.normal(0, 1, (600, 1))
    counts = draw_images(200, 200)
    found = added_auc(idle, telling, labels, numbers, counts)
    assert found.low > 0.1
    assert added_auc(telling, idle, labels, numbers, counts).value < 0.02


# ---------------------------------------------------------------------------- of several trainings


def test_pseudo_values_of_a_mean_are_the_values():
    values = GENERATOR.normal(0, 1, 10)
    columns = np.stack([values, np.ones(10)], axis=1)
    assert pseudo_values(columns, ratio) == pytest.approx(values)


def test_pseudo_values_by_leaving_out_one_image_after_another():
    columns = GENERATOR.random((8, 2)) + 1
    whole = columns[:, 0].sum() / columns[:, 1].sum()
    slow = []
    for image in range(8):
        rest = np.delete(columns, image, axis=0)
        slow.append(8 * whole - 7 * rest[:, 0].sum() / rest[:, 1].sum())
    shift = whole - np.mean(slow)
    found = pseudo_values(columns, ratio)
    assert found == pytest.approx(np.array(slow) + shift)
    assert found.mean() == pytest.approx(whole)


def test_the_error_of_a_ratio_is_that_of_the_delta_method():
    columns = GENERATOR.random((2000, 2)) + 1
    error = pseudo_values(columns, ratio).std() / math.sqrt(2000)
    value = columns[:, 0].sum() / columns[:, 1].sum()
    linear = (columns[:, 0] - value * columns[:, 1]) / columns[:, 1].mean()
    assert error == pytest.approx(linear.std() / math.sqrt(2000), rel=1e-2)


def test_crossed_parts_are_those_of_the_analysis_of_variance():
    """Against sums over single cells."""
    values = GENERATOR.normal(0, 1, (3, 7))
    mean = values.mean()
    units = 0.0
    images = 0.0
    rest = 0.0
    for unit in range(3):
        units += 7 * (values[unit].mean() - mean) ** 2
        for image in range(7):
            fitted = values[unit].mean() + values[:, image].mean() - mean
            rest += (values[unit, image] - fitted) ** 2
    for image in range(7):
        images += 3 * (values[:, image].mean() - mean) ** 2
    expected = (units / 2 / 21, images / 6 / 21, rest / 12 / 21)
    assert crossed_parts(values) == pytest.approx(expected)


def test_without_differences_between_units_only_images_count():
    values = np.tile(GENERATOR.normal(0.5, 1, 50), (4, 1))
    found = crossed_estimate([values])
    expected = stats.ttest_1samp(values[0], 0)
    interval = expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_without_differences_between_images_only_units_count():
    units = np.array([0.1, 0.5, 0.4, 0.9])
    found = crossed_estimate([np.tile(units[:, None], (1, 60))])
    expected = stats.ttest_1samp(units, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.low == pytest.approx(expected.confidence_interval().low)
    narrow = expected.confidence_interval(0.9)
    assert found.inner == pytest.approx((narrow.low, narrow.high))


def test_captioners_count_alike_and_one_unit_is_no_test():
    one = np.full((2, 5), 1.0) + GENERATOR.normal(0, 0.01, (2, 5))
    two = np.full((3, 5), 4.0) + GENERATOR.normal(0, 0.01, (3, 5))
    both = crossed_estimate([one, two])
    assert both.value == pytest.approx((one.mean() + two.mean()) / 2)
    contrast = crossed_contrast(two, one)
    assert contrast.value == pytest.approx(two.mean() - one.mean())
    assert contrast.low < contrast.value < contrast.high
    alone = crossed_estimate([one[:1], two])
    assert alone.p is None
    assert alone.low < alone.value < alone.high


def test_crossed_draws_are_those_of_a_loop():
    images = 6
    draws = 20
    groups = []
    for units in (2, 3):
        pairs = [GENERATOR.random((2, images, 2)) + 1 for _ in range(units)]
        groups.append([(first, second) for first, second in pairs])
    counts = draw_images(images, draws, 5)
    expected = []
    for draw in range(draws):
        means = []
        for number, pairs in enumerate(groups, start=1):
            unit_counts = draw_images(len(pairs), draws, 5 + number)[:, draw]
            values = []
            for (first, second), times in zip(pairs, unit_counts):
                drawn = counts[:, draw, None]
                one = (drawn * first).sum(axis=0)
                two = (drawn * second).sum(axis=0)
                values += [one[0] / one[1] - two[0] / two[1]] * times
            means.append(np.mean(values))
        expected.append(np.mean(means))
    assert crossed_draws(groups, ratio, draws, 5) == pytest.approx(np.array(expected))


# ---------------------------------------------------------------------------------- several tests


def test_holm_by_hand():
    """The example of Holm (1979) in the form of Wright (1992): .01 .04 .03 .005."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_a_claim_needs_all_its_components_and_one_is_enough_against_it():
    assert p_for([estimate(1, 0.01), estimate(2, 0.03)]) == 0.03
    assert p_for([estimate(1, 0.01), estimate(-0.1, 0.9)]) == 1
    assert p_against([estimate(1, 0.01), estimate(-0.1, 0.02)]) == 0.04
    assert p_against([estimate(1, 0.01)]) == 1


def test_verdicts_by_hand():
    hypotheses = {
        "yes": ([estimate(1, 0.001)], [0.5]),
        "no": ([estimate(-1, 0.001)], [0.5]),
        "none": ([estimate(0.1, 0.9, (-0.4, 0.45))], [0.5]),
        "unknown": ([estimate(0.1, 0.9, (-0.4, 0.55))], [0.5]),
        "without margin": ([estimate(0.1, 0.9, (-0.1, 0.1))], [None]),
        "one seed": ([estimate(1, None)], [0.5]),
        "not run": ([], []),
    }
    found = verdicts(hypotheses)
    assert [row["verdict"] for row in found.values()] == [
        "supports",
        "contradicts",
        "no effect of this size",
        "undecided",
        "undecided",
        "not tested",
        "not tested",
    ]
    assert found["yes"]["adjusted p"] == pytest.approx(0.005)  # five are tested
    assert found["not run"]["p"] is None


def test_two_one_sided_tests_are_the_inner_interval():
    """Against the two t-tests themselves, on either side of the margin that they just pass."""
    values = GENERATOR.normal(0.1, 1, 40)
    found = crossed_estimate([np.tile(values, (2, 1))])
    for margin in (0.2, 0.3, 0.4, 0.5, 0.6):
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert found.within(margin) == (max(above, below) < 0.05)


# ------------------------------------------------------------------------------------- of captions

CAPTIONS = Captions(
    predictions={0: "a dog runs on the grass", 1: "a man and a dog", 2: "a cat"},
    references={
        0: ["a dog runs over green grass", "the dog is running on the grass"],
        1: ["a man walks with a cat", "a man is outside"],
        2: ["a black cat sleeps", "a cat on a chair"],
    },
    annotated={0: set(), 1: set(), 2: {"dog"}},
    categories={"dog": ["dog"], "cat": ["cat"], "person": ["man"]},
    object_words=["dog", "man", "cat"],
    use_java=False,
)


def test_image_records_by_hand():
    records = image_records(CAPTIONS)
    assert records[1]["objects"] == 2
    assert records[1]["wrong objects"] == 1  # the dog
    assert records[1]["right"] == ["man"]
    assert records[1]["wrong"] == ["dog"]
    assert records[1]["missed"] == 1  # the cat
    assert records[2]["bleu"] == [2, 1, 0, 0, 2, 1, 0, 0, 2, 4]
    rows = list(records.values())
    assert word_counts(rows) == {"dog": [1, 2], "man": [1, 1], "cat": [1, 1]}
    assert ratio(precision_of(rows).sum(axis=0)) == pytest.approx(75)
    assert ratio(f1_of(rows).sum(axis=0)) == pytest.approx(100 * 6 / (6 + 1 + 1))
    assert ratio(chair_s_of(rows).sum(axis=0)) == pytest.approx(100 / 3)
    assert ratio(chair_i_of(rows).sum(axis=0)) == pytest.approx(25)


def test_the_columns_sum_to_the_metrics_of_the_split():
    rows = list(image_records(CAPTIONS).values())
    predictions = CAPTIONS.words
    metrics = caption_metrics(predictions, CAPTIONS.references)
    assert bleu_4(bleu_of(rows).sum(axis=0)) == pytest.approx(metrics["BLEU-4"])
    assert ratio(cider_of(rows).sum(axis=0)) == pytest.approx(100 * metrics["CIDEr"], abs=1e-4)


def test_drawn_images_give_the_bleu_of_the_drawn_captions():
    rows = list(image_records(CAPTIONS).values())
    drawn = [0, 0, 2]
    predictions = {place: CAPTIONS.words[image] for place, image in enumerate(drawn)}
    references = {place: CAPTIONS.references[image] for place, image in enumerate(drawn)}
    expected = caption_metrics(predictions, references)["BLEU-4"]
    totals = np.array([2, 0, 1]) @ bleu_of(rows)
    assert bleu_4(totals) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------- coverage


def binomial_tolerance(studies):
    """How far a share of so many studies may lie from 0.95: three and a half standard errors."""
    return 3.5 * math.sqrt(0.95 * 0.05 / studies)


def test_intervals_of_shares_and_of_auc_differences_hold_the_truth():
    tolerance = binomial_tolerance(100)
    assert simulated.share_coverage(100, 60, draws=200) == pytest.approx(0.95, abs=tolerance)
    assert simulated.auc_coverage(100, 60, draws=200) == pytest.approx(0.95, abs=tolerance)


@pytest.mark.parametrize("units, spread", [(3, 0.03), (5, 0.01), (5, 0.03)])
def test_crossed_intervals_hold_the_truth(units, spread):
    shares = simulated.crossed_coverage(300, units, 300, spread, bootstrap=False)
    assert shares[0] > 0.95 - binomial_tolerance(300)


def test_images_alone_do_not_hold_the_truth_where_trainings_differ():
    shares = simulated.crossed_coverage(100, 3, 1000, 0.03, bootstrap=False)
    assert shares[2] < 0.75
