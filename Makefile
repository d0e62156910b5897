# Every target does its own set-up in .venv; only Python 3.11 or newer has to be there.
#   make demo       explain the captions of three photographs and of two drawn scenes
#   make explain IMAGE=photo.jpg    explain the caption of a photograph of yours
#   make figures    make the README's figures again
#   make check      ruff: style, and what it finds wrong
#   make test       all tests
#   make spice      fetch what the SPICE metric needs (390 MB), once, by Maven into data/spice
#   make tuning-experiment    fine-tune every captioner in every way, three seeds (hours), and
#                   print the table of docs/exploratory.md
#   make scenes     draw the embedded dataset and train its captioner again
# On Linux PyPI's PyTorch is the one for NVIDIA GPUs. TORCH=cpu, added to the first `make` or after
# `make clean`, takes the one for CPUs from PyTorch's own index.

PYTHON ?= python3
RUN := .venv/bin/python
MADE := explanations/figures
CORENLP := edu.stanford.nlp:stanford-corenlp:3.6.0
RHINO := org.mozilla:rhino:1.7.15 org.mozilla:rhino-engine:1.7.15
SPICE_JARS := $(CORENLP) $(CORENLP):jar:models $(RHINO)
MVN_COPY := mvn -q dependency:copy -DoutputDirectory=data/spice
ifeq ($(TORCH),cpu)
PIP_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
else ifneq ($(TORCH),)
$(error TORCH=$(TORCH) is unknown: give TORCH=cpu, or nothing for PyPI's PyTorch)
endif

.PHONY: demo explain figures check test spice tuning-experiment scenes clean

demo: .venv/installed
	$(RUN) explain.py data/photographs/*.jpg
	$(RUN) explain.py data/demo/*.jpg --checkpoint checkpoints/scenes-gridtd.pt
	@echo "The figures are in the folder explanations."

explain: .venv/installed
	@test -n "$(IMAGE)" || { echo "of which photograph? make explain IMAGE=photo.jpg"; exit 2; }
	$(RUN) explain.py $(IMAGE)

# correctness.png and scenes.png in docs/ need the scenes: see RESULTS.md and preparedataset.py.
figures: .venv/installed
	$(RUN) explain.py data/demo/*.jpg --checkpoint checkpoints/scenes-gridtd.pt --output $(MADE) \
	    --method lrp guided_gradcam gradcam guided_backprop input_x_gradient attention
	$(RUN) explain.py data/photographs/camera.jpg --output $(MADE)
	$(RUN) counterfactual.py data/photographs/camera.jpg --output $(MADE) --max_area 0.4 \
	    --objects data/photographs/camera.json
	cp $(MADE)/lamb-scenes-gridtd-lrp.png figures/explained.png
	cp $(MADE)/umbrella-scenes-gridtd-lrp.png figures/hallucinated.png
	cp $(MADE)/lamb-scenes-gridtd-methods.png figures/methods.png
	cp $(MADE)/camera-lrp.png figures/photograph.png
	cp $(MADE)/camera-importance.png figures/importance.png

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests

# By Maven; without it by pycocoevalcap's own downloader, whose result needs a Java that still has
# JavaScript (8 to 14).
spice: .venv/installed
	if command -v mvn > /dev/null; \
	then for jar in $(SPICE_JARS); do $(MVN_COPY) -Dartifact=$$jar || exit 1; done; \
	else $(RUN) -c "from pycocoevalcap.spice import get_stanford_models as jars; \
	                jars.get_stanford_models()"; fi

tuning-experiment: .venv/installed
	$(RUN) tuning_experiment.py

scenes: .venv/installed
	$(RUN) preparedataset.py
	$(RUN) train.py
	$(RUN) evaluation.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv; this takes some minutes."
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_INDEX) -r requirements.txt
	touch $@

clean:
	rm -rf .venv
