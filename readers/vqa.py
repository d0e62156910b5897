"""VQA v2's own files (Goyal et al. 2017): questions about COCO's photographs, ten answers each.

    questions = read_vqa("v2_OpenEnded_mscoco_val2014_questions.json",
                         "v2_mscoco_val2014_annotations.json")
    soft_accuracy("2", questions[0].answers)

The files are at visualqa.org. `soft_accuracy` is the accuracy that the challenge is scored by.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from commandline import UserError, read_json

AGREEING = 3  # people who make an answer right
NUMBERS = {
    name: str(number)
    for number, name in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True)
class VQAQuestion:
    """A question about a photograph.

    question_id, image_id   whole numbers; the latter is COCO's
    text                    the question
    answers                 what ten people said; empty where the file has none
    kind                    "yes/no", "number" or "other"; "" where the file has no answers
    """

    question_id: int
    image_id: int
    text: str
    answers: tuple = ()
    kind: str = ""


class _Field(NamedTuple):
    description: str
    holds: Callable


_WHOLE = _Field("a whole number", lambda value: type(value) is int)
_TEXT = _Field("a text", lambda value: isinstance(value, str))
_ANSWERS = _Field("a list of objects with an answer", lambda value: _are_answers(value))
QUESTION_FIELDS = {"question_id": _WHOLE, "image_id": _WHOLE, "question": _TEXT}
ANNOTATION_FIELDS = {
    "question_id": _WHOLE,
    "image_id": _WHOLE,
    "answer_type": _TEXT,
    "answers": _ANSWERS,
}


def _are_answers(value):
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in value)


def read_vqa(questions, annotations=None):
    """The VQAQuestions of a file of questions, in its order, with the answers of another file.

    annotations: None for a split whose answers are not public. UserError naming the file for one of
    another kind, a question that is there twice, or one without its answers.
    """
    asked = _records(questions, "questions", QUESTION_FIELDS)
    answered = {}
    if annotations is not None:
        answered = _records(annotations, "annotations", ANNOTATION_FIELDS)
    found = []
    for key, record in asked.items():
        question = VQAQuestion(key, record["image_id"], record["question"])
        if annotations is not None:
            question = _with_answers(question, answered.get(key), annotations)
        found.append(question)
    return found


def _with_answers(question, annotation, path):
    """A VQAQuestion with the answers of its annotation, which may be None."""
    if annotation is None:
        raise UserError(
            f"{path} has no answers to question {question.question_id}; "
            "is it of the same split as the questions?"
        )
    if annotation["image_id"] != question.image_id:
        raise UserError(
            f"{path} asks question {question.question_id} of image {annotation['image_id']}, "
            f"and the questions' file of image {question.image_id}"
        )
    answers = tuple(one["answer"] for one in annotation["answers"])
    return VQAQuestion(
        question.question_id, question.image_id, question.text, answers, annotation["answer_type"]
    )


def _records(path, part, fields):
    """{question id: record} of the list `part` of a file; UserError unless all is as `fields`."""
    data = read_json(path)
    records = data.get(part) if isinstance(data, dict) else None
    if not isinstance(records, list):
        raise UserError(f"{path} is not a file of VQA's {part}: it has no list '{part}'")
    found = {}
    for number, record in enumerate(records):
        for name, wanted in fields.items():
            if not isinstance(record, dict) or name not in record:
                raise UserError(f"{path} is damaged: {part}[{number}] has no '{name}'")
            if not wanted.holds(record[name]):
                shown = repr(record[name])[:80]
                raise UserError(
                    f"{path} is damaged: '{name}' of {part}[{number}] is {shown}, "
                    f"not {wanted.description}"
                )
        if record["question_id"] in found:
            raise UserError(f"{path} has the question {record['question_id']} more than once")
        found[record["question_id"]] = record
    return found


# ------------------------------------------------------------------------------------------ scoring


def soft_accuracy(answer, answers):
    """How right an answer is, from 0 to 1, if these are what people said.

    An answer is right if three people gave it. Each person is left out once, and min(n / 3, 1) is
    averaged, n being how many of the others agree (Antol et al. 2015). If people disagree, case,
    articles, punctuation and number words do not count. As an apostrophe does not, either, "dont"
    is "don't"; the official code has a list of such words instead.
    """
    answer = " ".join(answer.split())
    answers = [" ".join(one.split()) for one in answers]
    if len(set(answers)) > 1:
        answer = plain(answer)
        answers = [plain(one) for one in answers]
    total = 0.0
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(others.count(answer) / AGREEING, 1.0)
    return total / len(answers)


def plain(answer):
    """An answer without punctuation and articles, in lower case, with digits for number words."""
    joined_number = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        at_an_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_an_edge or joined_number else " ")
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "")
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(word for word in words if word not in ARTICLES)
