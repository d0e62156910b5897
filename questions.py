"""Questions about the drawn scenes, whose answers are exact.

    questions = read_questions("data/scenes", "test")     # of what preparedataset.py has drawn

A scene's record in `annotations/scenes_SPLIT.json` says what there is, of which colour and where.
Questions are of five kinds:

    count      how many animals are there?                       0 to 3, as in the image
    colour     what colour is the dog?                           one of 13
    position   is the dog to the left or to the right of the ball?     left, right
    relation   what is the man holding?                          an object
    yes/no     is there a red ball?                              yes, no

Nothing can be learned from a question alone: of each wording, all answers that are kept are equally
often right in a split, so who does not see the image is right in one of as many cases as there are
answers. What is left out for that is drawn by a seed (as Goyal et al. 2017 balance VQA v2).
"""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from commandline import UserError, read_json
from scenes import CATEGORIES, SPLITS

KINDS = ("count", "colour", "position", "relation", "yes/no")
# "left" and "right" want this much between the middles, as a share of the image's width.
CLEARLY_BESIDE = 0.08
MOST = 3  # objects that a question counts
GROUPS = {"person": "people", "animal": "animals", "vehicle": "vehicles"}
ASKED = {  # relation of an object to the main one: what asks for the object
    "next to": "what is next to the {main}?",
    "behind": "what is behind the {main}?",
    "far behind": "what is far behind the {main}?",
    "in front of": "what is in front of the {main}?",
    "above": "what is above the {main}?",
    "over": "what is over the {main}?",
    "on": "what is on the {main}?",
    "under": "what is under the {main}?",
    "holding": "what is the {main} holding?",
}


@dataclass(frozen=True)
class Question:
    """A question about an image, and its one answer.

    image_id, file   of the image; the file is relative to the folder of the scenes
    kind             one of KINDS
    text, answer     in lower case
    """

    image_id: int
    file: str
    kind: str
    text: str
    answer: str


def read_questions(folder, split, seed=0):
    """The Questions of a split of the scenes in a folder, in the order of the images.

    seed: draws which questions are left out for balance. UserError if the folder holds no scenes.
    """
    data = read_scene_file(folder, split)
    size = data["info"]["size"]
    everything = []
    for scene in data["scenes"]:
        for kind, text, answer in asked_of(scene, size):
            file = f"{split}/{scene['file_name']}"
            everything.append(Question(scene["image_id"], file, kind, text, answer))
    return balanced(everything, Random(f"{seed} {split}"))


def read_scene_file(folder, split):
    """What `scenes_SPLIT.json` holds in a folder of scenes: "info" and "scenes".

    UserError if there is no such file, or it is of another kind; ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"a split of the scenes is {', '.join(SPLITS)}, not {split}")
    path = Path(folder) / "annotations" / f"scenes_{split}.json"
    if not path.exists():
        raise UserError(
            f"there is no {path}; python preparedataset.py --dataset scenes --output {folder} "
            "draws it"
        )
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("scenes"), list):
        raise UserError(f"{path} holds no scenes")
    return data


def balanced(questions, rng):
    """The Questions that are left when all answers of each wording are equally often right.

    Of a wording's answers those that are right at least n times are kept, each in n questions, with
    the n that keeps most questions; a wording of which one answer alone is left goes. rng draws
    which n. The order stays.
    """
    by_text = defaultdict(lambda: defaultdict(list))
    for number, question in enumerate(questions):
        by_text[question.text][question.answer].append(number)
    kept = set()
    for text in sorted(by_text):
        answers = by_text[text]
        n = best_count([len(numbers) for numbers in answers.values()])
        for answer in sorted(answers):
            if n and len(answers[answer]) >= n:
                kept.update(rng.sample(answers[answer], n))
    return [question for number, question in enumerate(questions) if number in kept]


def best_count(counts):
    """The n for which n times (how many counts are at least n) is largest; 0 if that is one count.

    counts: how often each answer of a wording is right.
    """
    best = 0
    most = 0
    for n in sorted(set(counts)):
        answers = sum(count >= n for count in counts)
        if answers > 1 and n * answers > most:
            best = n
            most = n * answers
    return best


def chance(questions):
    """How often the best guess from the wording alone is right, as a share of the questions."""
    by_text = defaultdict(Counter)
    for question in questions:
        by_text[question.text][question.answer] += 1
    right = sum(max(answers.values()) for answers in by_text.values())
    return right / len(questions)


def answers_of(questions):
    """All answers, sorted."""
    return sorted({question.answer for question in questions})


def as_records(questions):
    """Questions as dicts that JSON knows."""
    return [asdict(question) for question in questions]


# ------------------------------------------------------------------------------------- of one scene


def asked_of(scene, size):
    """Yields (kind, text, answer), all that can be asked of the record of a scene.

    size: the side of the image in pixels, in which its boxes are given.
    """
    yield from counts_of(scene)
    yield from colours_of(scene)
    yield from positions_of(scene, size)
    yield from relations_of(scene)
    yield from existence_of(scene)


def counts_of(scene):
    """How many objects there are, in all and of each group."""
    objects = scene["objects"]
    if len(objects) <= MOST:
        yield "count", "how many objects are there?", str(len(objects))
    for group, plural in GROUPS.items():
        members = [thing for thing in objects if group_of(thing) == group]
        if len(members) <= MOST:
            yield "count", f"how many {plural} are there?", str(len(members))


def group_of(thing):
    """The supercategory of an object."""
    return CATEGORIES[thing["category"]].supercategory


def the_only_ones(scene):
    """The objects of whose category there is no other, in order."""
    counted = Counter(thing["category"] for thing in scene["objects"])
    return [thing for thing in scene["objects"] if counted[thing["category"]] == 1]


def colours_of(scene):
    """The colour of every object that is the only one of its category."""
    for thing in the_only_ones(scene):
        name = thing["category"]
        clothes = CATEGORIES[name].clothes
        owned = f"{name}'s {clothes}" if clothes else name
        yield "colour", f"what colour is the {owned}?", thing["colour"]


def positions_of(scene, size):
    """In which half an object is, and on which side of another one."""
    alone = the_only_ones(scene)
    for thing in alone:
        side = side_of(middle_of(thing) - size / 2, size)
        if side:
            yield "position", f"is the {thing['category']} on the left or on the right?", side
    for thing in alone:
        for other in alone:
            side = side_of(middle_of(thing) - middle_of(other), size)
            if side and thing is not other:
                text = f"is the {thing['category']} left or right of the {other['category']}?"
                yield "position", text, side


def middle_of(thing):
    """The x of the middle of an object's box (x, y, width, height), in pixels."""
    x, _, width, _ = thing["bbox"]
    return x + width / 2


def side_of(difference, size):
    """ "left", "right", or None where the difference in x is too small to tell."""
    if abs(difference) < CLEARLY_BESIDE * size:
        return None
    return "left" if difference < 0 else "right"


def relations_of(scene):
    """What is next to the main object, on it, in its hand and so on, if that is one object."""
    objects = scene["objects"]
    alone = the_only_ones(scene)
    main = objects[0]
    words = Counter(relation for _, relation, _ in scene["relations"])
    for number, relation, to in scene["relations"]:
        clear = words[relation] == 1 and to == 0 and main in alone and objects[number] in alone
        if clear and relation in ASKED:
            text = ASKED[relation].format(main=main["category"])
            yield "relation", text, objects[number]["category"]


def existence_of(scene):
    """Whether there is an object of each category, and one of a category in each of its colours."""
    there = {thing["category"] for thing in scene["objects"]}
    for name in CATEGORIES:
        yield "yes/no", f"is there {with_article(name)}?", "yes" if name in there else "no"
    coloured = {(thing["category"], thing["colour"]) for thing in scene["objects"]}
    for name in sorted(there):
        if CATEGORIES[name].clothes:
            continue
        for colour in CATEGORIES[name].colours.split():
            answer = "yes" if (name, colour) in coloured else "no"
            yield "yes/no", f"is there {with_article(colour)} {name}?", answer


def with_article(name):
    """The name with "a" or "an" before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
