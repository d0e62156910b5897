"""Object importance against slow float64 versions, written from the formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import tiny_transformers
import torch
from helpers import random_captioner
from PIL import Image
from tiny_transformers import SMALL, bert_tokenizer

import importance as module
from bert.sentences import SentenceModel, bertscore_distance, cosine_distance
from captioner import load_captioner
from explanation import Explanation
from importance import (
    EXACT,
    NOTHING,
    NULL,
    OBJECT,
    Area,
    Removal,
    SaysNothing,
    Spoken,
    areas_of,
    common_words,
    dilated,
    effect_of,
    filler_of,
    importance,
    importance_map,
    normalised_sum,
    null_masks,
    resized,
    shares_inside,
    teacher_forced,
    total_variation,
)
from inpainting import INPAINTERS, load_inpainter
from readers.objects import ImageObject, box_mask

WEIGHTS = Path(__file__).resolve().parent.parent / "checkpoints/inpainting-flickr8k.pt"


def random_mask(generator, shape=(13, 17), share=0.1):
    return generator.random(shape) < share


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("share", [0, 0.1, 0.35, 1.0])
def test_dilation_is_by_a_disc(share):
    mask = random_mask(np.random.default_rng(1), share=0.04)
    radius = share * math.sqrt(mask.sum())
    slow = np.zeros_like(mask)
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            for row, column in np.argwhere(mask):
                if math.hypot(y - row, x - column) <= radius:
                    slow[y, x] = True
    assert np.array_equal(dilated(mask, share), slow)
    assert not dilated(np.zeros_like(mask), share).any()


def places_that_fit(shape, occupied):
    """All (top, left) at which a shape touches nothing, one by one."""
    height, width = shape.shape
    found = []
    for top in range(occupied.shape[0] - height + 1):
        for left in range(occupied.shape[1] - width + 1):
            if not (occupied[top : top + height, left : left + width] & shape).any():
                found.append((top, left))
    return found


def test_null_controls_never_touch_an_object():
    generator = np.random.default_rng(2)
    placed = 0
    for trial in range(60):
        mask = np.zeros((13, 17), dtype=bool)
        mask[3:6, 4:8] = generator.random((3, 4)) < 0.7
        if not mask.any():
            continue
        occupied = mask | random_mask(generator, share=0.002 * trial)
        found = null_masks(mask, occupied, 5, generator)
        rows, columns = np.nonzero(mask)
        shape = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        taken = occupied.copy()
        for moved in found:
            assert not (moved & taken).any()
            rows, columns = np.nonzero(moved)
            corner = (rows.min(), columns.min())
            assert corner in places_that_fit(shape, taken)
            again = moved[corner[0] : rows.max() + 1, corner[1] : columns.max() + 1]
            assert np.array_equal(again, shape)
            taken |= moved
        if len(found) < 5:
            assert places_that_fit(shape, taken) == []
        placed += len(found)
    assert placed > 100


def test_areas_skip_large_objects_and_avoid_them():
    size = (40, 30)
    objects = [
        ImageObject("sky", box_mask((0, 0, 40, 12), size), ("sky",)),  # 0.4 of the image
        ImageObject("ball", box_mask((3, 20, 8, 25), size), ("ball",)),
    ]
    areas, removed = areas_of(objects, Removal(nulls=3), key=7)
    assert removed == [1]
    assert [area.kind for area in areas] == [NOTHING, OBJECT, NULL, NULL, NULL]
    assert not areas[0].mask.any()
    assert np.array_equal(areas[1].mask, dilated(objects[1].mask, 0.1))
    for area in areas[2:]:
        assert area.mask.sum() == areas[1].mask.sum()
        assert not (area.mask & (dilated(objects[0].mask, 0.1) | areas[1].mask)).any()
    again, _ = areas_of(objects, Removal(nulls=3), key=7)
    other, _ = areas_of(objects, Removal(nulls=3), key=8)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(areas, again))
    assert not all(np.array_equal(a.mask, b.mask) for a, b in zip(areas, other))


def test_the_size_of_a_mask_and_the_shares_inside():
    generator = np.random.default_rng(3)
    mask = random_mask(generator, (10, 14), 0.5)
    small = resized(mask, (4, 5))
    for y in range(4):
        for x in range(5):
            assert small[y, x] == mask[int((y + 0.5) * 10 / 4), int((x + 0.5) * 14 / 5)]
    maps = torch.from_numpy(generator.normal(size=(3, 4, 5)))
    explanation = Explanation([], None, None, maps, None, None, None, None)
    inside = total = 0.0
    for y in range(4):
        for x in range(5):
            value = max(0.0, sum(float(maps[t, y, x]) for t in range(3)))
            total += value
            inside += value * bool(small[y, x])
    assert shares_inside(explanation, [mask]) == pytest.approx([inside / total], abs=1e-12)
    explanation.image_relevance = -maps.abs()
    assert shares_inside(explanation, [mask]) == [None]


def test_a_map_is_the_mean_of_the_objects_at_a_pixel():
    masks = np.array([[[1, 1, 0]], [[0, 1, 0]]], dtype=bool)
    found = importance_map(masks, [0.2, 0.6])
    assert found[0, :2] == pytest.approx([0.2, 0.4])
    assert np.isnan(found[0, 2])


# --------------------------------------------------------------------------------------- distances


def test_distances_of_attention():
    generator = np.random.default_rng(4)
    one = generator.dirichlet(np.ones(6), size=4)
    other = generator.dirichlet(np.ones(6), size=3)
    slow = sum(abs(one[0][i] - other[0][i]) for i in range(6)) / 2
    assert total_variation(one[0], other[0]) == pytest.approx(slow, abs=1e-15)
    assert total_variation(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert normalised_sum(one) == pytest.approx(one.mean(axis=0))
    words = ["a", "dog", "on", "a"]
    assert common_words(words, ["a", "cat", "a"]) == [("a", 0, 0), ("a", 3, 2)]
    probabilities = generator.random(4)
    original = Spoken(words, one, probabilities)
    changed = Spoken(["a", "cat", "a"], other, generator.random(4))
    effect = effect_of(original, changed, {"sentence": 0.5, "bertscore": 0.25})
    drops = [probabilities[t] - changed.probabilities[t] for t in range(4)]
    assert effect.drops == pytest.approx(drops)
    assert effect.distances["probability"] == pytest.approx(sum(drops) / 4)
    first = np.abs(one[0] - other[0]).sum() / 2
    second = np.abs(one[3] - other[2]).sum() / 2
    assert effect.distances["attention"] == pytest.approx((first + second) / 2)
    together = np.abs(one.mean(axis=0) - other.mean(axis=0)).sum() / 2
    assert effect.distances["attention_sum"] == pytest.approx(together)
    assert effect.distances["sentence"] == 0.5


def test_without_a_common_word_or_any_there_is_no_change_of_attention():
    attention = np.full((1, 2), 0.5)
    original = Spoken(["dog"], attention, np.array([0.5]))
    other = effect_of(original, Spoken(["cat"], attention, np.array([0.1])), {})
    assert other.distances["attention"] is None
    assert other.distances["sentence"] is None
    assert other.distances["attention_sum"] == 0
    silent = effect_of(original, Spoken([], np.zeros((0, 2)), np.array([0.1])), {})
    assert silent.distances["attention_sum"] is None
    assert silent.distances["probability"] == pytest.approx(0.4)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """The folder of a BERT with two small random layers."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {**SMALL, "num_hidden_layers": 2, "vocab_size": 18, "initializer_range": 0.5}
    tokenizer = bert_tokenizer(folder)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SENTENCES = ["a dog on the grass", "a red ball", "the doggy's grass .", "a dog on the grass", ""]


def slow_distances(folder, one, other):
    """Both distances, token by token, each sentence through the model by itself."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval().double()
    with torch.no_grad():
        states = []
        for text in (one, other):
            inputs = tokenizer(text, return_tensors="pt")
            states.append(model(**inputs).last_hidden_state[0].tolist())

    def cosine(u, v):
        dot = sum(a * b for a, b in zip(u, v))
        return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))

    means = [[sum(column) / len(state) for column in zip(*state)] for state in states]
    reference, candidate = states
    precision = [max(cosine(token, other) for other in reference) for token in candidate[1:-1]]
    recall = [max(cosine(token, other) for other in candidate) for token in reference[1:-1]]
    p = sum(precision) / len(precision)
    r = sum(recall) / len(recall)
    return 1 - cosine(*means), 1 - 2 * p * r / (p + r)


def test_distances_of_sentences_equal_their_formulas(tiny_bert):
    model = SentenceModel(str(tiny_bert))
    found = model.distances(SENTENCES[0], SENTENCES)
    for row in (1, 2):
        sentence, bertscore = slow_distances(tiny_bert, SENTENCES[0], SENTENCES[row])
        assert found["sentence"][row] == pytest.approx(sentence, abs=1e-6)
        assert found["bertscore"][row] == pytest.approx(bertscore, abs=1e-6)
        assert bertscore > 1e-3
    for distances in found.values():
        assert distances[0] == distances[3] == 0  # exactly
        assert distances[4] == 1


def test_bertscore_equals_the_package(tiny_bert):
    from bert.bertscore import BertScore

    model = SentenceModel(str(tiny_bert))
    ours = model.distances(SENTENCES[0], SENTENCES[1:3])["bertscore"]
    scorer = BertScore(str(tiny_bert))
    for distance, text in zip(ours, SENTENCES[1:3]):
        f, _ = scorer.compute_score({0: [SENTENCES[0]]}, {0: [text]}, idf=False)
        assert distance == pytest.approx(1 - f, abs=1e-6)


def test_an_opposite_sentence_is_two_and_an_unrelated_one_is_one():
    assert cosine_distance(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert cosine_distance(np.array([1.0, 0]), np.array([-1.0, 0])) == 2
    tokens = np.eye(4)
    assert bertscore_distance(tokens, tokens) == 0


# ---------------------------------------------------------------------------------- the captioner


@pytest.mark.parametrize("model_type", ["gridtd", "aoa", "soft", "adaptive"])
def test_teacher_forcing_equals_one_step_after_the_other(model_type):
    captioner = random_captioner(model_type=model_type)
    features = captioner.encode(torch.randn(2, 3, 128, 128, dtype=torch.float64))
    captions = [["w1", "w2", "w3"], ["w4"]]
    found = teacher_forced(captioner, features, captions)
    with torch.no_grad():
        for row, words in enumerate(captions):
            memory = captioner.image_memory(features[row : row + 1])
            state = captioner.initial_state(memory)
            before = captioner.vocabulary.start
            for position, word in enumerate(words):
                tokens = torch.tensor([[before]])
                inputs = captioner.word_inputs(captioner.embedding(tokens), memory)
                output = captioner.step(inputs, state, memory)
                state = output.state
                (before,) = captioner.vocabulary.encode([word])
                probability = captioner.last_layer(output.addends).softmax(-1)[0, 0, before]
                probabilities, attention = found[row]
                assert probabilities[position] == pytest.approx(float(probability), rel=1e-9)
                expected = output.attention[0, 0].mean(dim=0).numpy()
                assert attention[position] == pytest.approx(expected, rel=1e-9)
            assert len(found[row][0]) == len(words)


def scene_and_objects():
    generator = np.random.default_rng(5)
    image = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    boxes = {"ball": (4, 4, 12, 12), "dog": (20, 24, 32, 36)}
    objects = [ImageObject(name, box_mask(box, (40, 40)), (name,)) for name, box in boxes.items()]
    return image, objects


def test_removing_nothing_changes_exactly_nothing(tiny_bert):
    captioner = random_captioner()
    image, objects = scene_and_objects()
    fillers = {name: filler_of(load_inpainter(name, WEIGHTS)) for name in INPAINTERS}
    model = SentenceModel(str(tiny_bert))
    found = importance(captioner, image, objects, fillers, Removal(nulls=1), model)
    for name in INPAINTERS:
        effects = found.effects[name]
        assert [area.kind for area in found.areas] == [NOTHING, OBJECT, NULL, OBJECT, NULL]
        assert all(value in (0, None) for value in effects[0].distances.values())
        assert effects[0].distances["sentence"] == 0
        assert effects[0].drops == [0] * len(found.original.caption)
        assert found.effect(name, 1) is effects[3]
        assert effects[1].distances["probability"] != 0
    # The same image anew: nothing but rounding.
    spoken = module.observe(captioner, [image, image.copy()], {})
    assert spoken[0].caption == spoken[1].caption
    assert np.abs(spoken[0].probabilities - spoken[1].probabilities).max() < 1e-12


def test_importance_is_the_change_of_the_caption_of_the_filled_image():
    captioner = random_captioner()
    image, objects = scene_and_objects()
    black = {"black": lambda image, area: np.where(area.mask[..., None], 0, image).astype(np.uint8)}
    found = importance(captioner, image, objects, black, Removal(nulls=0))
    filled = image.copy()
    filled[dilated(objects[1].mask, 0.1)] = 0
    assert np.array_equal(found.images["black"][2], filled)
    words, changed = captioner.caption([Image.fromarray(one) for one in (image, filled)])
    assert found.original.caption == words
    assert found.effect("black", 1).caption == changed
    pixels = captioner.pixels_of([Image.fromarray(image), Image.fromarray(filled)])
    before, after = captioner.explain(pixels, [words, words], method="attention")
    drops = (before.probabilities - after.probabilities).tolist()
    assert found.effect("black", 1).drops == pytest.approx(drops, abs=1e-9)


@pytest.mark.parametrize("family", ["blip", "vit_gpt2"])
def test_a_captioner_of_transformers(family, tmp_path):
    captioner = load_captioner(tiny_transformers.save(family, tmp_path / family))
    image, objects = scene_and_objects()
    fill = {"mean": filler_of(load_inpainter("mean"))}
    found = importance(captioner, image, objects, fill, Removal(nulls=0))
    (words,) = captioner.caption([Image.fromarray(image)])
    assert found.original.caption == words
    assert found.original.attention.sum(axis=1).max() <= 1 + 1e-6
    effects = found.effects["mean"]
    assert effects[0].distances["probability"] == 0
    assert effects[1].distances["probability"] != 0
    before = captioner.explain([Image.fromarray(image)], [words], method="attention")[0]
    assert found.original.probabilities == pytest.approx(before.probabilities.numpy(), rel=1e-5)


def test_a_filler_may_know_no_answer():
    captioner = random_captioner()
    image, objects = scene_and_objects()

    def exact(image, area):
        return None if area.kind == NULL else image

    found = importance(captioner, image, objects, {EXACT: exact}, Removal(nulls=1))
    assert [effect is None for effect in found.effects[EXACT]] == [False, False, True, False, True]


def test_what_cannot_be_asked_is_said(monkeypatch):
    captioner = random_captioner()
    image, objects = scene_and_objects()
    fill = {"mean": filler_of(load_inpainter("mean"))}
    with pytest.raises(module.UserError, match="no object"):
        importance(captioner, image, [], fill)
    monkeypatch.setattr(captioner, "decode", lambda features, **options: [[]] * len(features))
    with pytest.raises(SaysNothing):
        importance(captioner, image, objects, fill)


@pytest.mark.parametrize("name", INPAINTERS)
def test_an_inpainter_fills_the_mask_only(name):
    image, objects = scene_and_objects()
    mask = objects[0].mask
    inpaint = load_inpainter(name, WEIGHTS)
    filled = filler_of(inpaint)(image, Area(OBJECT, 0, mask))
    assert filled.dtype == np.uint8
    assert np.array_equal(filled[~mask], image[~mask])
    assert not np.array_equal(filled[mask], image[mask])
    assert np.array_equal(inpaint(image, np.zeros_like(mask)), image)
    even = np.full_like(image, 77)
    holed = np.where(mask[..., None], 0, even).astype(np.uint8)
    # Telea's method in OpenCV is off by up to two grey levels; a network has learnt something.
    error = np.abs(inpaint(holed, mask).astype(int) - 77).max()
    assert error <= 2 or name == "generative"
