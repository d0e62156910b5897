# Every target does its own set-up in .venv; only Python 3.11 or newer has to be there.
#   make demo       explain the captions of two drawn scenes with the captioner that ships
#   make test       all tests
#   make scenes     draw the embedded dataset and train its captioner again (checkpoints/scenes-gridtd.pt)

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test scenes clean

demo: .venv/installed
	$(RUN) explain.py data/demo/*.jpg

test: .venv/installed
	$(RUN) -m pytest -q tests

scenes: .venv/installed
	$(RUN) preparedataset.py
	$(RUN) train.py
	$(RUN) evaluation.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv
